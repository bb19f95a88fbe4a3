"""Core ML packages of the reference pipeline with a released student: every component for three Apple profiles, and
bytes and dB of each precision and each encoding of weights. Everything is run by the interpreter (on a Mac by Core ML).
"""

import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROFILES = ("iphone-15-pro", "iphone-13-pro", "ipad-m2")
PRECISIONS = ("w8a16", "w8a8", "w4a16", "w4a8")
ENCODINGS = ("palette8", "palette6", "palette4", "palette4_group16")
STUDENT = "phone-high"
STEPS = 25


@pytest.fixture(scope="module")
def parts_and_samples(reference_pipeline: Any) -> Any:
    """(CoreMLParts, plan, samples, the reference run) of the reference pipeline with the student's U-Net."""
    import copy

    from latentrelay.compress.plan import PlanSource, full_plan
    from latentrelay.compress.solver_tables import solver_table
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel
    from latentrelay.export.coreml_bundle import CoreMLParts
    from latentrelay.export.parity import collect_samples
    from latentrelay.export.reference_run import record_run
    from latentrelay.reference.pipeline import GUIDANCE, reference_path
    from latentrelay.runtime.samplers import sampler_rule

    pipeline = copy.copy(reference_pipeline)
    pipeline.unet = StudentUNet2DConditionModel.from_pretrained(
        reference_path() / "students" / STUDENT / "unet", use_safetensors=True
    ).eval()
    rule = sampler_rule("dpmsolver++")
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **rule.overrides)
    source = PlanSource("reference", "sha256:0", "sd1")
    plan = full_plan(source, {}, "dpmsolver++", rule.scheduler_class, "sha256:0", solver_table(scheduler, STEPS))
    run = record_run(pipeline, scheduler, STEPS, 128, 128, GUIDANCE, rule)
    parts = CoreMLParts(pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return parts, plan, collect_samples(pipeline, plan, run, rule), run


def final_psnr_db(step: Callable[[dict[str, Any]], dict[str, Any]], run: Any) -> float:
    """Final latents of a whole run by the package against torch's, PSNR with peak max |ref|."""
    latents, memory = run.latents[0], run.x0_prev[0]
    for i in range(STEPS):
        made = step(
            {
                "latents": latents,
                "step": np.array([i], np.int32),
                "prompt_embeds": run.prompt_embeds,
                "guidance": np.array([run.guidance], np.float32),
                "x0_prev": memory,
            }
        )
        latents, memory = made["next_latents"], made["next_x0_prev"]
    error = np.mean(np.square(latents.astype(np.float64) - run.latents[-1]))
    return round(float(10 * np.log10(np.abs(run.latents[-1]).max() ** 2 / error)), 2)


@pytest.mark.slow
def test_coreml(parts_and_samples: Any, measured: Callable[..., Path], tmp_path: Path) -> None:
    from latentrelay.device_profiles import load_profile
    from latentrelay.export.coreml_bundle import write_coreml
    from latentrelay.export.coreml_convert import package_bytes
    from latentrelay.export.mil_interpreter import MilProgram

    parts, plan, samples, run = parts_and_samples
    rows: list[dict[str, Any]] = []

    def add(device: str, precision: str, encoding: str | None = None) -> None:
        folder = tmp_path / f"{device}-{precision}-{encoding}"
        folder.mkdir()
        start = time.perf_counter()
        packages = write_coreml(folder, parts, plan, load_profile(device), precision, samples, encoding=encoding)
        step = MilProgram(folder / next(each.path for each in packages if each.role == "step_full"))
        rows.append(
            {
                "device": device,
                "deployment_target": packages[0].deployment_target,
                "precision": precision,
                "encoding": encoding,
                "components": {
                    each.role: {
                        "path": each.path,
                        "bytes": package_bytes(folder / each.path),
                        "precision": each.precision,
                        "parity_db": each.parity_db,
                    }
                    for each in packages
                },
                "final_latents_psnr_db": final_psnr_db(step, run),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        settings = {"coremltools": metadata.version("coremltools"), "student": STUDENT, "num_steps": STEPS}
        measured("coreml", {**settings, "run_by": _run_by(), "rows": rows})

    for device in PROFILES:
        add(device, "fp16")
    for precision in PRECISIONS:
        add(PROFILES[0], precision)
    for encoding in ENCODINGS:
        add(PROFILES[0], "w8a16" if encoding == "palette8" else "w4a16", encoding)
    for row in rows:
        if row["precision"] == "fp16":
            assert all(each["parity_db"] >= 35.0 for each in row["components"].values()), row
    step = {(row["precision"], row["encoding"]): row["components"]["step_full"] for row in rows}
    half = step["fp16", None]["bytes"]
    assert step["w8a16", None]["bytes"] < 0.62 * half
    assert step["w4a16", None]["bytes"] < 0.45 * half
    text = {row["precision"]: row["components"]["text_encoder"]["bytes"] for row in rows if row["encoding"] is None}
    assert text["w8a16"] < 0.3 * 2 * text["fp16"]  # of the float32 bytes


def _run_by() -> str:
    from latentrelay.export.coreml_bundle import parity_method

    return parity_method()
