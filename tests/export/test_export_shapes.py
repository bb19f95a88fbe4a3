"""Pipelines nobody prepared: other widths, depths, heads, text widths, prediction types; dynamic batch; the gate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.export import export
from latentrelay.export.errors import ParityError
from latentrelay.export.onnx_graphs import VaeDecoderGraph, export_onnx
from latentrelay.export.parity import Sample, check_components, open_session, snr_db
from latentrelay.runtime.manifest import Manifest

ODD: dict[str, Any] = {
    "sampler": "ddim",
    "prediction_type": "v_prediction",
    "widths": (8, 24),
    "heads": (1, 3),
    "layers_per_block": 2,
    "text_dim": 24,
    "text_layers": 2,
    "max_length": 12,
    "pad_token": "!",
    "vae_widths": (4, 8, 8),
    "mid_block_type": "UNetMidBlock2D",  # a mid block without attention
    "use_linear_projection": True,
}


def test_an_odd_pipeline_passes_the_gates_with_ddim(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "made", **ODD), tmp_path / "odd", half=True)
    result = export(str(folder), "pixel-8", tmp_path / "bundle", num_steps=5, height=40, width=24)
    assert min(result.parity_db.values()) >= 60.0
    manifest = Manifest.from_json_bytes((result.bundle / "manifest.json").read_bytes())
    assert (manifest.schedule.sampler, manifest.schedule.needs_x0_prev) == ("ddim", False)
    assert (manifest.latent.height, manifest.latent.width, manifest.latent.downscale) == (10, 6, 4)
    assert [port.name for port in manifest.components["step_full"].outputs] == ["next_latents"]
    assert manifest.prediction_type == "v_prediction"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_dynamic_batch_takes_any_batch(tiny_pipeline: Any, tmp_path: Path) -> None:
    module = VaeDecoderGraph(tiny_pipeline.vae)
    export_onnx(
        module,
        [torch.randn(2, 4, 4, 4)],
        tmp_path / "model.onnx",
        inputs=["latent_sample"],
        outputs=["sample"],
        opset=20,
        batched=["latent_sample"],
    )
    session = open_session(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 4, 4, 4]
    for batch in (1, 3):
        latents = torch.randn(batch, 4, 4, 4)
        with torch.no_grad():
            expected = module(latents).numpy()
        (got,) = session.run(None, {"latent_sample": latents.numpy()})
        assert snr_db(expected, got) >= 60.0


@pytest.mark.slow
def test_a_profile_with_dynamic_shapes_gets_a_dynamic_batch(tiny: Any, tmp_path: Path) -> None:
    result = export(tiny.make_pipeline(tmp_path / "made"), "x86-laptop-vnni", tmp_path / "bundle", num_steps=4)
    assert open_session(result.bundle / "unet" / "model.onnx").get_inputs()[0].shape == ["batch", 4, 8, 8]
    step = open_session(result.bundle / "unet" / "step_full.onnx")
    assert {value.name: value.shape for value in step.get_inputs()}["prompt_embeds"] == [2, 16, 16]


def test_the_gate_refuses_a_graph_that_disagrees(tiny_bundle: Path) -> None:
    tokens = np.arange(16, dtype=np.int64)[None]
    wrong = Sample({"input_ids": tokens}, {"last_hidden_state": np.ones((1, 16, 16), np.float32)})
    paths = {"text_encoder": tiny_bundle / "text_encoder" / "model.onnx"}
    with pytest.raises(ParityError) as caught:
        check_components(paths, {"text_encoder": [wrong]}, lambda words: None)
    assert caught.value.component == "text_encoder"
    assert caught.value.snr_db < 60.0
    assert caught.value.exit_status == 3


def test_snr_by_hand() -> None:
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, np.array([3.0, 4.5])) == pytest.approx(20.0)
    assert snr_db(reference, reference) == 200.0
    assert snr_db(reference, np.array([3.0, np.nan])) == -np.inf
