"""The rows of a sweep: scores, FLOPs, seconds and bytes of one student at one split, as they go into sweep.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentrelay.compress import flops as counting
from latentrelay.compress.flops import RunFlops
from latentrelay.compress.light_vae import load_light_vae
from latentrelay.reference.judge import Statistics
from latentrelay.tools.picture_scores import Scored, summary
from latentrelay.tools.students import Student
from latentrelay.tools.sweep_clock import Clock
from latentrelay.tools.teacher_runs import Teacher


def count(teacher: Teacher, student: Student, light_vae: Path | None) -> RunFlops:
    """FLOPs of the parts of a student's runs; the device decodes with the light VAE of a folder, or the source's."""
    pipeline = teacher.pipeline
    side, tokens = pipeline.unet.config.sample_size, pipeline.tokenizer.model_max_length
    vae: Any = pipeline.vae if light_vae is None else load_light_vae(light_vae)
    return RunFlops(
        num_steps=teacher.num_steps,
        cloud_step=counting.unet_step_flops(pipeline.unet, side, side, tokens),
        device_step=counting.unet_step_flops(student.unet, side, side, tokens),
        text_encoder=counting.text_encoder_flops(pipeline.text_encoder, tokens),
        cloud_decode=counting.decode_flops(pipeline.vae, side, side),
        device_decode=counting.decode_flops(vae, side, side),
    )


def parts(flops: RunFlops) -> dict[str, int]:
    """The counted parts; one step is one call of the U-Net at batch 2."""
    return {name: value for name, value in asdict(flops).items() if name != "num_steps"}


@dataclass(frozen=True)
class Figures:
    """Everything measured. `scored` holds a student's scores by split, `baseline` those of the all-cloud run."""

    scored: Mapping[str, Mapping[int, Scored]]
    baseline: Scored
    renderings: Statistics
    flops: Mapping[str, RunFlops]
    clock: Clock
    decoder: str

    def row(self, name: str, split: int) -> dict[str, Any]:
        """One student at one split. At k = N the all-cloud run: source decoder, the picture crosses as a PNG."""
        flops, clock = self.flops[name], self.clock
        if split == flops.num_steps:
            return {
                "student": name,
                "split": split,
                "decoder": "source, in the cloud",
                **summary(self.baseline, self.baseline, self.renderings),
                "cloud_flops": flops.cloud(split) + flops.cloud_decode,
                "cloud_flops_saving": 0.0,
                "cloud_flops_saving_without_decode": 0.0,
                "cloud_decode_flops": flops.cloud_decode,
                "device_flops": 0,
                "device_decode_flops": 0,
                "cloud_seconds": round(clock.cloud[split] + clock.cloud_decode, 5),
                "cloud_decode_seconds": round(clock.cloud_decode, 5),
                "device_seconds": 0.0,
                "device_decode_seconds": 0.0,
                "handoff_bytes": 0,
                "wire_bytes": clock.png_bytes,
            }
        return self._shared(name, split)

    def decoded_on_device(self, name: str) -> dict[str, Any]:
        """All steps in the cloud, decoded on the device: what the device's decoder alone changes."""
        return {**self._shared(name, self.flops[name].num_steps), "student": None}

    def _shared(self, name: str, split: int) -> dict[str, Any]:
        flops, clock = self.flops[name], self.clock
        return {
            "student": name,
            "split": split,
            "decoder": f"{self.decoder}, on the device",
            **summary(self.scored[name][split], self.baseline, self.renderings),
            "cloud_flops": flops.cloud(split),
            "cloud_flops_saving": flops.saving(split),
            "cloud_flops_saving_without_decode": flops.saving_without_decode(split),
            "cloud_decode_flops": 0,
            "device_flops": flops.device(split) + flops.device_decode,
            "device_decode_flops": flops.device_decode,
            "cloud_seconds": round(clock.cloud[split], 5),
            "cloud_decode_seconds": 0.0,
            "device_seconds": round(clock.device[name][split], 5),
            "device_decode_seconds": round(clock.device_decode[name], 5),
            "handoff_bytes": clock.handoff_bytes[split],
            "wire_bytes": clock.handoff_bytes[split],
        }
