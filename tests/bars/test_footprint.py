"""Bar: on SD 1.4's geometry the automatic student is as large as a device's limits admit, and never above them.

For each profile: the student's shape, its U-Net exported, its files weighed, and a fresh process that runs the text
encoder, two steps and (once for all) the decoder through the runtime's own backend, in the runtime's own order, its
peak read off VmHWM. Random weights. About ten quiet minutes and 6 GiB; figures go to docs/measured/footprint.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.full_size

PROFILES = ("galaxy-s24", "generic-android", "galaxy-s25", "jetson-orin-nano", "raspberry-pi-5", "iphone-15-pro")
WITHIN = 0.20  # prediction against measurement
CLOSE = 0.03  # the student below the largest that is admitted
MIB = 2**20

# One picture's stages in the runtime's order, each graph released before the next is opened.
RUN = """
import json, sys
from pathlib import Path
import numpy as np
import latentrelay.runtime, latentrelay.runtime.generate, latentrelay.runtime.picture
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from latentrelay.runtime.backend import open_backend

stages, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
spec = BackendSpec("onnxruntime", ("CPUExecutionProvider",), options)
backend = open_backend(spec, providers=None, threads=1)
peaks, rng = {}, np.random.default_rng(0)
for name, path, runs, inputs, outputs in stages:
    ports = [tuple(Port(port, port, dtype, tuple(shape)) for port, dtype, shape in side) for side in (inputs, outputs)]
    graph = backend.load(Path(path), Component(name, path, *ports))
    feeds = {p.name: np.asarray(rng.standard_normal(p.shape) if p.dtype == "float32" else np.ones(p.shape), p.dtype)
             for p in ports[0]}
    for _ in range(runs):
        graph.run(feeds)
    del graph
    peaks[name] = next(int(row.split()[1]) / 1024 for row in open("/proc/self/status") if row.startswith("VmHWM"))
print(json.dumps(peaks))
"""


def run_stages(stages: list[Any], options: dict[str, bool]) -> dict[str, float]:
    """VmHWM in MiB of a fresh process after each stage."""
    command = [sys.executable, "-c", RUN, json.dumps(stages), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def export_parts(geometry: Any, folder: Path) -> tuple[list[Any], list[Any]]:
    """Text encoder and decoder with random weights as stages to run; written where they are not yet."""
    from latentrelay.export.onnx_graphs import TextEncoderGraph, VaeDecoderGraph, export_onnx

    text, decoder = folder / "text_encoder" / "model.onnx", folder / "vae_decoder" / "model.onnx"
    ids, latents = (
        torch.zeros(1, geometry.tokens, dtype=torch.int64),
        torch.zeros(1, 4, geometry.rows, geometry.columns),
    )
    outputs = ["last_hidden_state", "pooler_output"]
    if not text.exists():
        text.parent.mkdir(parents=True)
        module = materialised(geometry.build_text_encoder())
        export_onnx(TextEncoderGraph(module), [ids], text, inputs=["input_ids"], outputs=outputs, opset=20)
    if not decoder.exists():
        decoder.parent.mkdir(parents=True)
        module = materialised(geometry.build_vae())
        export_onnx(VaeDecoderGraph(module), [latents], decoder, inputs=["latent_sample"], outputs=["sample"], opset=20)
    width, side = geometry.text_encoder["hidden_size"], geometry.rows * geometry.downscale
    return (
        ["text_encoder", str(text), 2, [["input_ids", "int64", ids.shape]],
         [["last_hidden_state", "float32", [1, geometry.tokens, width]]]],
        ["vae_decoder", str(decoder), 1, [["latent_sample", "float32", latents.shape]],
         [["sample", "float32", [1, 3, side, side]]]],
    )  # fmt: skip


def export_unet(geometry: Any, unet: Any, folder: Path) -> list[Any]:
    """The U-Net of a step as a stage to run: two guided steps."""
    from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx

    path = folder / "unet" / "model.onnx"
    path.parent.mkdir(parents=True)
    sample = torch.zeros(2, 4, geometry.rows, geometry.columns)
    states = torch.zeros(2, geometry.tokens, geometry.text_encoder["hidden_size"])
    names = ["sample", "timestep", "encoder_hidden_states"]
    inputs = [sample, torch.tensor(1.0), states]
    export_onnx(UNetGraph(unet), inputs, path, inputs=names, outputs=["out_sample"], opset=20, external=UNET_DATA)
    ports = [[name, "float32", each.shape] for name, each in zip(names, inputs, strict=True)]
    return ["steps", str(path), 2, ports, [["out_sample", "float32", sample.shape]]]


def materialised(module: Any) -> Any:
    """A module of the meta device with small random weights; buffers are made anew by their class's constructor."""
    generator = torch.Generator().manual_seed(0)
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module.eval()


def test_students_fill_their_devices(tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    from latentrelay.compress.budget import budget_of, planned_unet, student_within
    from latentrelay.compress.footprint import RULES, footprint
    from latentrelay.compress.geometry import sd14
    from latentrelay.compress.prunable_units import prunable_units
    from latentrelay.compress.sensitivity import score_prior
    from latentrelay.device_profiles import load_profile

    geometry, options = sd14(), dict(RULES.session_options)
    source = geometry.build_unet()
    scores = score_prior(prunable_units(source))
    text, decoder = export_parts(geometry, tmp_path)
    rows = []
    for name in PROFILES:
        profile = load_profile(name)
        within = student_within(source, scores, budget_of(profile), geometry, rules=RULES)
        shape = planned_unet(source, within.plan)
        predicted = footprint(geometry.with_unet(dict(shape.config)), rules=RULES, num_steps=2)
        folder = tmp_path / name
        steps = export_unet(geometry, materialised(shape), folder)
        peaks = run_stages([text, steps] if rows else [text, steps, decoder], options)
        if not rows:
            alone = run_stages([decoder], options)["vae_decoder"]
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for path in folder.rglob("*.onnx_data"):
            path.unlink()
        rows.append(
            {
                "profile": name,
                "parameters": within.plan.parameters,
                "admitted": within.admitted.parameters,
                "limited_by": within.admitted.limiting,
                "heads_at_most_tokens": within.heads,
                "predicted_peak_mib": predicted.peak_memory_mib,
                "measured_peak_mib": round(max(peaks["steps"], alone), 1),
                "ceiling_mib": profile.memory.application_ceiling_mib,
                "predicted_decoder_mib": predicted.stage("vae_decoder").peak_mib,
                "measured_decoder_mib": round(alone, 1),
                "predicted_largest_file_bytes": predicted.largest_file_bytes,
                "measured_largest_file_bytes": max(files.values()),
                "largest_file_mib": profile.memory.largest_file_mib,
            }
        )
        measured("footprint", {"geometry": "sd14", "session_options": options, "rows": rows})
    for row in rows:
        assert (1 - CLOSE) * row["admitted"] <= row["parameters"] <= row["admitted"], row
        assert row["measured_peak_mib"] <= row["ceiling_mib"], row
        assert row["measured_largest_file_bytes"] <= row["largest_file_mib"] * MIB, row
        assert abs(row["predicted_peak_mib"] / row["measured_peak_mib"] - 1) <= WITHIN, row
        assert abs(row["predicted_decoder_mib"] / row["measured_decoder_mib"] - 1) <= WITHIN, row
