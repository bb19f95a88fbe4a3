"""Bar: a w8a8 bundle of the 224M geometry is built within 8 GiB, and built again it runs no stage twice.

Random weights, SD 1.4's text encoder and light decoder, a process of its own whose peak is read off VmHWM. The cloud's
model is the 224M U-Net itself, since what is bounded is the building; a full-size cloud model is 3.4 GB more in memory.
Some ten minutes; figures go to docs/measured/quantised_build.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.tools.cli import app
from typer.testing import CliRunner

pytestmark = pytest.mark.full_size

LIMIT_MIB = 8192

BUILD = """
import importlib.util, json, sys, time
from pathlib import Path
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from latentrelay.compress.geometry import sd14
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.export import export
from latentrelay.export.calibration import Calibration

unet, tiny, out, work = (Path(word) for word in sys.argv[1:5])
spec = importlib.util.spec_from_file_location("tiny_pipeline", tiny)
factory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(factory)
torch.manual_seed(0)
geometry = sd14()
parts = {"text_encoder": geometry.build_text_encoder(), "vae": geometry.build_vae()}
for name, module in parts.items():
    if next(module.parameters()).is_meta:
        parts[name] = module = module.to_empty(device="cpu")
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer_name, buffer in module.named_buffers():
            if buffer_name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
pipeline = StableDiffusionPipeline(
    **parts,
    unet=StudentUNet2DConditionModel.from_pretrained(unet),
    tokenizer=factory.make_tokenizer(work.parent / "tokenizer", max_length=77),
    scheduler=DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)
started = time.perf_counter()
done = export(
    pipeline, "x86-laptop-vnni", out, num_steps=3, precision="w8a8", work=work, overwrite=True,
    calibration=Calibration(("a red cat", "the cat in the rain"), ("a cat on the grass", "the red thing")),
)
peak = next(int(row.split()[1]) / 1024 for row in open("/proc/self/status") if row.startswith("VmHWM"))
sizes = {path.name: path.stat().st_size for path in (out / "unet").iterdir()}
print(json.dumps({
    "peak_memory_mib": round(peak), "seconds": round(time.perf_counter() - started, 1), "reused": list(done.reused),
    "stages_s": dict(done.seconds), "unet_bytes": sizes, "parity_db": dict(done.parity_db),
    "kernels": dict(done.quality["kernels"]),
}))
"""


def build(unet: Path, folder: Path) -> dict[str, Any]:
    """One build in a fresh process; its figures."""
    tiny = Path(__file__).parents[1] / "tiny_pipeline.py"
    command = [sys.executable, "-c", BUILD, str(unet), str(tiny), str(folder / "bundle"), str(folder / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_224m_geometry_builds_within_8_gib_and_not_twice(
    measured: Callable[[str, dict[str, Any]], Path], tmp_path: Path
) -> None:
    arguments = ["compress", "--geometry", "sd14", "--recipe", "hybrid-sd-224m", "-o", str(tmp_path / "student")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    first = build(tmp_path / "student" / "unet", tmp_path)
    again = build(tmp_path / "student" / "unet", tmp_path)
    measured("quantised_build", {"limit_mib": LIMIT_MIB, "first": first, "again": again})
    assert first["peak_memory_mib"] <= LIMIT_MIB
    assert first["reused"] == []
    stages = {"reference_run", "text_encoder", "vae_decoder", "unet", "parity", "ranges", "quantise", "kernels"}
    assert stages <= set(again["reused"])
    assert again["unet_bytes"] == first["unet_bytes"]
