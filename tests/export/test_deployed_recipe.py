"""A recipe as a running network, on a tiny U-Net: near the float one, rounded once, spared layers closer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.compress.precision import recipe_for
from latentrelay.compress.recipe_choice import spare
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import step_feeds
from latentrelay.export.activation_ranges import record_ranges
from latentrelay.export.deployed import TorchDenoiser
from latentrelay.export.deployed_recipe import RecipeDeployment
from latentrelay.export.input_statistics import record_inputs
from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx
from latentrelay.export.parity import snr_db
from latentrelay.runtime.manifest import BackendSpec

KERNELS = "onnxruntime-x64"
TABLE = SolverTable((SolverRow(1.0, -0.5, 0.0, 0.0, 1.0, -0.5, 1.0),) * 3, (900, 500, 100), 1.0)


@pytest.fixture(scope="module")
def network(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RecipeDeployment, TorchDenoiser]:
    torch.manual_seed(0)
    unet = tiny.make_unet(widths=(16, 32), text_dim=32).eval()
    graph = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(
        UNetGraph(unet),
        [torch.zeros(2, 4, 8, 8), torch.tensor(1.0), torch.zeros(2, 6, 32)],
        graph,
        inputs=["sample", "timestep", "encoder_hidden_states"],
        outputs=["out_sample"],
        opset=20,
        batched=["sample", "encoder_hidden_states"],
        external=UNET_DATA,
        kernels=KERNELS,
    )
    rng = np.random.default_rng(1)
    feeds = [
        (step, step_feeds(TABLE, _normal(rng, 1, 4, 8, 8), step, _normal(rng, 2, 6, 32)))
        for step in range(3)
        for _ in range(3)
    ]
    spec = BackendSpec("onnxruntime", ("CPUExecutionProvider",))
    ranges, statistics = record_ranges(graph, feeds, threads=1), record_inputs(graph, feeds)
    deployment = RecipeDeployment(graph, ranges, statistics, TABLE, spec, (4, 8, 8), (6, 32))
    return deployment, TorchDenoiser(unet, TABLE)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_recipes_run_and_sparing_all_is_float(network, tmp_path: Path):
    deployment, floating = network
    rng = np.random.default_rng(2)
    inputs = (_normal(rng, 1, 4, 8, 8), 1, _normal(rng, 2, 6, 32))
    want = floating(*inputs)
    plain = recipe_for(deployment.layers, "w4a8", KERNELS)
    convolutions = [layer.name for layer in deployment.layers if layer.kind == "conv"]
    quarter = spare(plain, convolutions)
    found = [snr_db(want, deployment(recipe)(*inputs)) for recipe in (plain, quarter)]
    assert 10 < found[0] < found[1]
    everything = spare(spare(quarter, plain.rules), plain.rules)  # 4 bits to 8, 8 bits to float
    assert not [rule for rule in everything.rules.values() if rule.integer]
    assert snr_db(want, deployment(everything)(*inputs)) > 90
    sizes = [deployment.write(recipe, tmp_path / str(i) / "model.onnx") for i, recipe in enumerate((plain, everything))]
    assert sizes[0] < sizes[1]


def test_weights_are_rounded_once(network):
    deployment, _ = network
    recipe = recipe_for(deployment.layers, "w4a8", KERNELS)
    first, second = deployment.fits(recipe), deployment.fits(recipe)
    four = [name for name, rule in recipe.rules.items() if rule.weights == "int4"]
    assert four
    assert all(first[name] is second[name] for name in four)
