"""Cuts of a U-Net's graph: where they are in float and quantised graphs; the pieces give what the whole does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import recipe_for
from latentrelay.export.activation_ranges import record_ranges
from latentrelay.export.cut_unet import cut_graph, cut_points, module_output, probe_value, shape_of
from latentrelay.export.errors import CutError
from latentrelay.export.layers import layers_of
from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx
from latentrelay.export.parity import open_session
from latentrelay.export.quantise_graph import quantise
from latentrelay.export.staged_onnx import StagedOnnx, write_cuts
from latentrelay.runtime.manifest import BackendSpec

SPEC = BackendSpec("onnxruntime", ("CPUExecutionProvider",), {})
RNG = np.random.default_rng(3)
FEEDS = {
    "sample": RNG.standard_normal((2, 4, 8, 8)).astype(np.float32),
    "timestep": np.array(500.0, np.float32),
    "encoder_hidden_states": RNG.standard_normal((2, 16, 16)).astype(np.float32),
}


@pytest.fixture(scope="module")
def unet(tiny: Any) -> Any:
    """SD 1.x's layout in three levels of two layers: cross-attention everywhere but in the deepest."""
    torch.manual_seed(5)
    return tiny.make_unet(widths=(8, 16, 16), layers_per_block=2).eval()


@pytest.fixture(scope="module")
def graph(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    export_onnx(
        UNetGraph(unet),
        [torch.zeros(2, 4, 8, 8), torch.tensor(1.0), torch.zeros(2, 16, 16)],
        path,
        inputs=["sample", "timestep", "encoder_hidden_states"],
        outputs=["out_sample"],
        opset=20,
        batched=["sample", "encoder_hidden_states"],
        external=UNET_DATA,
        kernels="onnxruntime-x64",
    )
    return path


@pytest.fixture(scope="module")
def quantised(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8") / "model.onnx"
    ranges = record_ranges(graph, [(step, FEEDS) for step in range(3)], threads=1)
    quantise(graph, recipe_for(layers_of(onnx_ir.load(graph)), "w8a8", "onnxruntime-x64"), ranges, path)
    return path


def inner(unet: Any) -> dict[str, np.ndarray]:
    """The cut values of the torch network by hooks."""
    found: dict[str, Any] = {}
    last, first = unet.up_blocks[-1].resnets[-1], unet.down_blocks[0].resnets[0]
    hooks = [
        last.register_forward_pre_hook(lambda m, a: found.update(joined=a[0])),
        unet.conv_in.register_forward_hook(lambda m, a, o: found.update(P0=o)),
        first.norm2.register_forward_pre_hook(lambda m, a: found.update(P1=a[0])),
        first.register_forward_hook(lambda m, a, o: found.update(P2=o)),
        unet.down_blocks[0].attentions[0].register_forward_hook(lambda m, a, o: found.update(P3=o[0])),
        unet.down_blocks[0]
        .attentions[0]
        .transformer_blocks[0]
        .attn1.register_forward_hook(lambda m, a, o: found.update(attn1=o)),
        unet.down_blocks[0]
        .attentions[0]
        .transformer_blocks[0]
        .ff.register_forward_hook(lambda m, a, o: found.update(ff=o)),
        unet.up_blocks[1].resnets[1].register_forward_hook(lambda m, a, o: found.update(resnet=o)),
    ]
    with torch.no_grad():
        unet(*(torch.from_numpy(array) for array in FEEDS.values()))
    for hook in hooks:
        hook.remove()
    found["deep"] = found["joined"][:, : found["joined"].shape[1] - found["P0"].shape[1]]
    return {name: value.numpy() for name, value in found.items()}


def value_of(path: Path, value: str) -> np.ndarray:
    """One inner value of a graph."""
    model = onnx.load(str(path), load_external_data=False)
    cut = path.with_name("value.onnx")
    onnx.save(cut_graph(model, {}, {value: "value"}), str(cut))
    session = open_session(cut)
    return session.run(["value"], {port.name: FEEDS[port.name] for port in session.get_inputs()})[0]


def test_the_cuts_are_torchs_values(graph: Path, unet: Any) -> None:
    model, expected = onnx.load(str(graph), load_external_data=False), inner(unet)
    points = cut_points(model)
    assert sorted(points.probes) == ["P0", "P1", "P2", "P3"]
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    values = {
        "deep": points.deep,
        **points.probes,
        "attn1": module_output(model, f"{block}.attn1"),
        "ff": module_output(model, f"{block}.ff"),
        "resnet": module_output(model, "up_blocks.1.resnets.1"),
    }
    for name, value in values.items():
        np.testing.assert_allclose(value_of(graph, value), expected[name], atol=2e-5, err_msg=name)
    assert shape_of(model, points.deep) == ("batch", 8, 8, 8)


def test_a_quantised_graph_is_cut_at_the_same_places(quantised: Path, unet: Any) -> None:
    model, expected = onnx.load(str(quantised), load_external_data=False), inner(unet)
    points = cut_points(model)
    for name, value in {"deep": points.deep, **points.probes}.items():
        got = value_of(quantised, value)
        assert got.dtype == np.float32
        assert np.corrcoef(got.ravel(), expected[name].ravel())[0, 1] > 0.99, name


@pytest.mark.parametrize("which", ["graph", "quantised"])
def test_probe_and_shallow_path_give_what_the_whole_does(
    which: str, tmp_path: Path, tiny_bundle: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    table = Plan.load(tiny_bundle).recipe.solver_table
    staged = StagedOnnx(path, tmp_path, table, SPEC, (4, 8, 8), (16, 16), threads=1)
    latents, states = FEEDS["sample"][:1], FEEDS["encoder_hidden_states"]
    whole = staged.full(latents, 3, states)
    assert whole.probe is not None
    assert whole.feature.shape == (2, 8, 8, 8)
    assert np.array_equal(staged.probe(latents, 3, states), whole.probe)
    assert np.array_equal(staged.shallow(latents, 3, states, whole.feature), whole.noise_pred)
    other = staged.shallow(latents, 3, states, whole.feature + 1.0)
    assert np.abs(other - whole.noise_pred).max() > 1e-3  # so the feature is read
    assert staged.reads_states("shallow")
    assert not staged.reads_states("probe")
    assert staged.providers == ("CPUExecutionProvider",)


def test_a_cut_holds_fewer_nodes_and_no_weights(graph: Path, tmp_path: Path) -> None:
    paths = write_cuts(graph, tmp_path, "P1")
    nodes = {name: len(onnx.load(str(path), load_external_data=False).graph.node) for name, path in paths.items()}
    assert nodes["probe"] < nodes["shallow"] < nodes["full"] / 2
    assert (tmp_path / UNET_DATA).read_bytes() == graph.with_name(UNET_DATA).read_bytes()
    assert all(path.stat().st_size < graph.stat().st_size * 1.1 for path in paths.values())


def test_any_values_can_be_inputs(graph: Path) -> None:
    """What a cache of attentions and feed-forwards needs: those results are given, the rest is computed."""
    model = onnx.load(str(graph), load_external_data=False)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    values = {module_output(model, f"{block}.{name}"): f"{name}_in" for name in ("attn1", "attn2", "ff")}
    names = {value: f"{name}_out" for value, name in values.items()}
    onnx.save(cut_graph(model, {}, {"out_sample": "out_sample", **names}), str(graph.with_name("a.onnx")))
    onnx.save(cut_graph(model, values, {"out_sample": "out_sample"}), str(graph.with_name("b.onnx")))
    first, second = open_session(graph.with_name("a.onnx")), open_session(graph.with_name("b.onnx"))
    found = dict(zip([port.name for port in first.get_outputs()], first.run(None, FEEDS), strict=True))
    given = {name: found[names[value]] for value, name in values.items()}
    assert np.array_equal(second.run(["out_sample"], {**FEEDS, **given})[0], found["out_sample"])
    assert len(second.get_inputs()) == 6


def test_an_input_may_come_out_again(graph: Path) -> None:
    model = onnx.load(str(graph), load_external_data=False)
    deep = cut_points(model).deep
    cut = cut_graph(model, {deep: "given"}, {deep: "returned"})
    assert [node.op_type for node in cut.graph.node] == ["Identity"]
    assert [value.name for value in cut.graph.input] == ["given"]


def test_what_cannot_be_cut_is_refused_by_name(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(str(graph), load_external_data=False)
    points = cut_points(model)
    with pytest.raises(CutError, match="nowhere"):
        cut_graph(model, {}, {"nowhere": "x"})
    with pytest.raises(CutError, match="timestep"):
        cut_graph(model, {points.deep: "timestep"}, {"out_sample": "out_sample"})
    with pytest.raises(CutError, match="P7"):
        probe_value(points, "P7")
    with pytest.raises(CutError, match=r"mid_block\.attn"):
        module_output(model, "mid_block.attn")
    swapped = onnx.ModelProto()
    swapped.CopyFrom(model)
    concat = next(node for node in swapped.graph.node if list(node.input) == [points.deep, points.skip])
    concat.input[:] = [points.skip, points.deep]
    with pytest.raises(CutError, match="hidden state first") as caught:
        cut_points(swapped)
    assert caught.value.exit_status == 3
    assert "up_blocks.2.resnets.2" in caught.value.place
    concat.input[:] = [points.deep, points.deep, points.skip]
    with pytest.raises(CutError, match="3 values"):
        cut_points(swapped)
    nameless = onnx.ModelProto()
    nameless.CopyFrom(model)
    for node in nameless.graph.node:
        node.name = ""
    with pytest.raises(CutError, match="up_blocks"):
        cut_points(nameless)
    spec = BackendSpec("onnxruntime", ("CPUExecutionProvider",), {})
    staged = StagedOnnx(graph, tmp_path / "c", _table(), spec, (4, 8, 8), (16, 16), 1, None)
    with pytest.raises(CutError, match="none was asked for"):
        staged.probe(FEEDS["sample"][:1], 0, FEEDS["encoder_hidden_states"])


def _table() -> Any:
    from latentrelay.compress.solver_tables import SolverRow, SolverTable

    return SolverTable((SolverRow(1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0),), (500,), 1.0)
