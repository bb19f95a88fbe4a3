"""The reference's teacher and every released student can be cut: shallow path and probe of the exported graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.export.cut_unet import cut_points, module_output, shape_of
from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx
from latentrelay.export.staged_onnx import StagedOnnx
from latentrelay.reference import pipeline
from latentrelay.reference.students import student_path
from latentrelay.runtime.manifest import BackendSpec

pytestmark = pytest.mark.slow
TABLE = SolverTable((SolverRow(1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0),), (500,), 1.0)
SPEC = BackendSpec("onnxruntime", ("CPUExecutionProvider",), {})


def _network(name: str) -> Any:
    if name == "teacher":
        return pipeline.load().unet
    return StudentUNet2DConditionModel.from_pretrained(student_path(name) / "unet")


@pytest.mark.parametrize("name", ["teacher", "phone-high", "phone-mid", "pi"])
def test_released_networks_are_cut(name: str, tmp_path: Path) -> None:
    unet = _network(name).eval()
    size, width = int(unet.config.sample_size), int(unet.config.cross_attention_dim)
    graph = tmp_path / "whole" / "model.onnx"
    graph.parent.mkdir()
    export_onnx(
        UNetGraph(unet),
        [torch.zeros(2, 4, size, size), torch.tensor(1.0), torch.zeros(2, 8, width)],
        graph,
        inputs=["sample", "timestep", "encoder_hidden_states"],
        outputs=["out_sample"],
        opset=20,
        external=UNET_DATA,
        kernels="onnxruntime-x64",
    )
    model = onnx.load(str(graph), load_external_data=False)
    points = cut_points(model)
    assert sorted(points.probes) == ["P0", "P1", "P2", "P3"]
    assert shape_of(model, points.deep)[2:] == (size, size)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert len({module_output(model, f"{block}.{part}") for part in ("attn1", "attn2", "ff")}) == 3
    staged = StagedOnnx(graph, tmp_path / "cut", TABLE, SPEC, (4, size, size), (8, width))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 4, size, size)).astype(np.float32)
    states = rng.standard_normal((2, 8, width)).astype(np.float32)
    whole = staged.full(latents, 0, states)
    assert np.array_equal(staged.shallow(latents, 0, states, whole.feature), whole.noise_pred)
    assert np.array_equal(staged.probe(latents, 0, states), whole.probe)
