"""How long the device's parts take: measured here with the bundle, else scaled from a figure of the device's profile.

In: a bundle, or a student's `Work`, and a `DeviceProfile`. Out: `DeviceTimes`, milliseconds with a label (measured,
published, estimate) and a source in words. A student that was timed on the machine of the packaged sweeps is scaled by
what SD 1.x's U-Net takes on the device and there; any other network by its FLOPs, which makes small ones look too fast.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.device_profiles.schema import DeviceProfile, LatencyAnchor
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import LatentRelayError
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.prediction_check import FULL, PREDICTED, STEP_FULL
from latentrelay.runtime.session import Session

# FLOPs of SD 1.x at 512x512, counted by compress/flops.py: one guided step (two branches), one decode, two prompts.
SD_STEP, SD_DECODE, SD_TEXT = 1_606_546_882_560, 2_514_518_933_504, 26_597_007_360
SD_PARAMETERS, SD_PIXELS = 859_520_964, 64 * 64
# One call of SD 1.5's U-Net on the machine of the packaged sweeps: the profile x86-laptop-vnni, fp32, one thread.
EPYC_CALL_MS, EPYC = 5000.0, "AMD EPYC"
RUNS, WARM_UPS = 5, 2
_SMALL = 0.05
_PROMPT = "a red circle on sand"


class NoFigureError(LatentRelayError):
    """Neither a measurement nor a figure of the profile says how fast the device is."""

    exit_status = 3


@dataclass(frozen=True)
class Work:
    """FLOPs of one guided step, one decode and one pair of prompts; `how` they were come by. `epyc_ms`: a guided step
    and a decode in milliseconds, fp32 on one thread of the machine of the packaged sweeps, where they were timed."""

    step: float
    decode: float
    text: float
    how: str
    epyc_ms: tuple[float, float] | None = None

    @property
    def step_ratio(self) -> float:
        """A guided step's share of SD 1.x's."""
        return self.epyc_ms[0] / (2 * EPYC_CALL_MS) if self.epyc_ms else self.step / SD_STEP

    @property
    def text_ratio(self) -> float:
        """Both prompts' time over a guided step's: by FLOPs."""
        return self.text / self.step


@dataclass(frozen=True)
class DeviceTimes:
    """Milliseconds on the device. `predicted_ms` None where nothing is predicted or nobody knows."""

    step_ms: float
    decode_ms: float
    text_ms: float
    label: str
    source: str
    predicted_ms: float | None = None

    def steps_ms(self, computed: int, predicted: int) -> float | None:
        """All steps of a run; None where the predicted ones' time is not known."""
        if predicted and self.predicted_ms is None:
            return None
        return computed * self.step_ms + predicted * (self.predicted_ms or 0.0)


def is_this_machine(profile: DeviceProfile) -> bool:
    """Whether `devices measure` wrote the profile on a machine with this processor and as many cores."""
    from latentrelay.tools.machine import read_machine

    machine = read_machine()
    measured = any(source.id == "measured-here" for source in profile.sources)
    return measured and profile.chipset == machine.cpu and profile.backend.threads == min(machine.cores, 256)


def measured(folder: Path, runs: int = RUNS) -> DeviceTimes:
    """Time a bundle's parts here, with its own backend: medians of `runs`. Raises BundleError, SessionError."""
    bundle = Bundle.open(folder)
    with Session(bundle) as session:
        text = _median(lambda: session.encode(_PROMPT), runs)
        embeds = session.encode(_PROMPT)
        found: dict[str, list[float]] = {FULL: [], PREDICTED: []}
        session.release("text_encoder")
        for turn in range(WARM_UPS + runs):
            for split in _timed_splits(bundle.manifest):
                for event in _run(session, split, embeds):
                    if turn >= WARM_UPS and event.kind in found:
                        found[event.kind].append(event.ms)
        session.release(STEP_FULL)
        latents = session.initial_latents(0)
        decode = _median(lambda: session.decode(latents), runs)
        words = f"measured here, {', '.join(session.providers_used)}"
    predicted = statistics.median(found[PREDICTED]) if found[PREDICTED] else None
    return DeviceTimes(statistics.median(found[FULL]), decode, text, "measured", words, predicted)


def scaled(profile: DeviceProfile, precision: str, work: Work, predicted_over_full: float | None) -> DeviceTimes:
    """The profile's figures for SD 1.x, scaled by FLOPs; `predicted_over_full` was measured when the bundle was built.

    A figure in the bundle's precision goes before the profile's first. Raises NoFigureError.
    """
    anchor = _anchor(profile, "unet", precision)
    if anchor is None:
        raise NoFigureError(
            "the device's speed is not known", got=profile.name, expected="a figure for the U-Net in the profile",
            do="Measure there: latentrelay devices measure.",
        )  # fmt: skip
    step, decoder = 2 * anchor.ms * work.step_ratio, _anchor(profile, "vae_decoder", precision)
    if work.epyc_ms is not None:
        decode = work.epyc_ms[1] * anchor.ms / EPYC_CALL_MS
    else:
        decode = work.decode * (decoder.ms / SD_DECODE if decoder else 2 * anchor.ms / SD_STEP)
    encode = step * work.text_ratio
    same = work.epyc_ms is None and work.step == SD_STEP and anchor.precision == precision
    words = f"{anchor.label} {anchor.ms:g} ms a call ({anchor.device}, {anchor.model}, {anchor.precision})"
    if work.epyc_ms is not None:
        words += f", over {EPYC_CALL_MS:g} ms on {EPYC}, one thread, where this student was timed"
    elif not same:
        small = "; a network this small takes longer than its FLOPs say" if work.step_ratio < _SMALL else ""
        words += f", scaled by FLOPs ({work.how}){small}"
    if anchor.precision != precision:
        words += f"; no figure in {precision}"
    predicted = None if predicted_over_full is None else step * predicted_over_full
    return DeviceTimes(step, decode, encode, anchor.label if same else "estimate", words, predicted)


def own_anchors(profile: DeviceProfile, manifest: Manifest, predicted_over_full: float | None) -> DeviceTimes | None:
    """Figures that `devices measure --bundle` wrote for just this bundle, or None."""
    about = f"bundle {manifest.digest[:19]}:"
    mine = {each.component: each for each in profile.latency if (each.conditions or "").startswith(about)}
    if not {"unet", "vae_decoder", "text_encoder"} <= set(mine):
        return None
    branches, anchor = manifest.guidance.branches, mine["unet"]
    step, text = branches * anchor.ms, branches * mine["text_encoder"].ms
    predicted = None if predicted_over_full is None else step * predicted_over_full
    words = f"{anchor.label} for this bundle ({anchor.device})"
    return DeviceTimes(step, mine["vae_decoder"].ms, text, anchor.label, words, predicted)


def work_of(manifest: Manifest, student: Mapping[str, Any] | None, sweeps: Sequence[Mapping[str, Any]] = ()) -> Work:
    """A bundle's work: what was counted and timed of a known student, else by parameters and latents against SD 1.x."""
    if student is not None:
        return work_of_student(student, sweeps)
    pixels = manifest.latent.height * manifest.latent.width / SD_PIXELS
    ratio = parameters_of(manifest) / SD_PARAMETERS
    return Work(SD_STEP * ratio * pixels, SD_DECODE * pixels, SD_TEXT, "by parameters and latent size")


def work_of_student(student: Mapping[str, Any], sweeps: Sequence[Mapping[str, Any]]) -> Work:
    """A swept student's FLOPs, and its quickest time a step and decode where a sweep ran on the known machine."""
    flops, times = student["flops"], []
    for sweep in sweeps:
        known = (sweep.get("machine") or {}).get("processor") == EPYC and sweep.get("threads") == 1
        for row in sweep["rows"] if known else ():
            if row["student"] == student["name"] and row["split"] == 0:
                decode = 1e3 * row["device_decode_seconds"]
                times.append(((1e3 * row["device_seconds"] - decode) / sweep["num_steps"], decode))
    quickest = min(times, default=None)
    return Work(flops["device_step"], flops["device_decode"], flops["text_encoder"], "counted", quickest)


def parameters_of(manifest: Manifest) -> float:
    """The U-Net's parameters: the student's as recorded, else its files' bytes over the bytes of a weight."""
    student = manifest.additional_metadata.get("student")
    if isinstance(student, Mapping) and isinstance(student.get("parameters"), int):
        return float(student["parameters"])
    width = {"fp32": 4.0, "fp16": 2.0, "w4a16": 0.5, "w4a8": 0.5}.get(manifest.precision, 1.0)
    return sum(entry.bytes for entry in manifest.files if entry.path.startswith("unet/")) / width


def _anchor(profile: DeviceProfile, component: str, precision: str) -> LatencyAnchor | None:
    mine = [each for each in profile.latency if each.component == component and each.model.startswith("SD ")]
    exact = (each for each in mine if each.precision == precision)
    return next(exact, mine[0] if mine else None)


def _timed_splits(manifest: Manifest) -> list[int]:
    """The last split that predicts, which has both kinds of steps; without masks one near the end."""
    masks = [mask for mask in (manifest.prediction.masks if manifest.prediction else ()) if PREDICTED in mask.mask]
    return [max(mask.split for mask in masks)] if masks else [max(0, manifest.schedule.num_steps - 4)]


def _run(session: Session, split: int, embeds: Any) -> Any:
    manifest = session.manifest
    latents = session.initial_latents(0)
    memory = np.zeros_like(latents) if split else None
    return session.run_steps(latents, memory, split, embeds, manifest.guidance.default, seed=0)


def _median(call: Any, runs: int) -> float:
    times = []
    for _ in range(WARM_UPS + runs):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UPS:])
