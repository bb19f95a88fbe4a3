"""A tiny U-Net through the integer path: names, fused attention, ranges, the quantised graph, its kernels, faults."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from latentrelay.compress.precision import PrecisionRecipe, recipe_for
from latentrelay.export.activation_ranges import Ranges, record_ranges
from latentrelay.export.errors import (
    ActivationError,
    ExportError,
    LayerRuleError,
    RangeExplodedError,
    UnfusedLayerError,
)
from latentrelay.export.integer_kernels import count_integer_kernels
from latentrelay.export.layers import activation_products, layers_of
from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx
from latentrelay.export.parity import open_session, snr_db
from latentrelay.export.quantise_graph import integer_weight, quantise

X64, OPENVINO = "onnxruntime-x64", "openvino"
CONV1 = "down_blocks.0.resnets.0.conv1"
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def unet(tiny: Any) -> Any:
    torch.manual_seed(5)
    return tiny.make_unet().eval()


@pytest.fixture(scope="module")
def graphs(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for kernels in (X64, OPENVINO):
        found[kernels] = tmp_path_factory.mktemp(kernels) / "model.onnx"
        export_onnx(
            UNetGraph(unet),
            [torch.zeros(2, 4, 8, 8), torch.tensor(1.0), torch.zeros(2, 16, 16)],
            found[kernels],
            inputs=["sample", "timestep", "encoder_hidden_states"],
            outputs=["out_sample"],
            opset=20,
            batched=["sample", "encoder_hidden_states"],
            external=UNET_DATA,
            kernels=kernels,
        )
    return found


def feeds(step: int) -> dict[str, Any]:
    return {
        "sample": RNG.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array(980.0 - 100 * step, dtype=np.float32),
        "encoder_hidden_states": RNG.standard_normal((2, 16, 16)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def samples() -> list[tuple[int, dict[str, Any]]]:
    return [(step, feeds(step)) for step in range(5)]


@pytest.fixture(scope="module")
def ranges(graphs: dict[str, Path], samples: list[tuple[int, dict[str, Any]]]) -> Ranges:
    return record_ranges(graphs[X64], samples, threads=1)


def recipe(graph: Path, kernels: str = X64) -> PrecisionRecipe:
    return recipe_for(layers_of(onnx_ir.load(graph)), "w8a8", kernels)


@pytest.fixture(scope="module")
def quantised(graphs: dict[str, Path], ranges: Ranges, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("w8a8") / "model.onnx"
    quantise(graphs[X64], recipe(graphs[X64]), ranges, out)
    return out


def run(path: Path, inputs: dict[str, Any]) -> Any:
    return open_session(path).run(None, inputs)[0]


# ---- layers and attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", [X64, OPENVINO])
def test_layers_are_the_torch_modules_with_their_shapes_and_products(
    unet: Any, graphs: dict[str, Path], kernels: str
) -> None:
    macs: dict[str, int] = {}

    def counts(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            channels = output.shape[1] if isinstance(module, torch.nn.Conv2d) else output.shape[-1]
            macs[name] = module.weight.numel() * output.numel() // channels

        return hook

    modules = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    hooks = [module.register_forward_hook(counts(name)) for name, module in modules.items()]
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 3, torch.zeros(1, 16, 16))
    for hook in hooks:
        hook.remove()
    found = {layer.name: layer for layer in layers_of(onnx_ir.load(graphs[kernels]))}
    assert {name: layer.shape for name, layer in found.items()} == {
        n: tuple(m.weight.shape) for n, m in modules.items()
    }
    assert {name: layer.macs for name, layer in found.items()} == macs
    roles = {layer.name: layer.role for layer in found.values() if layer.role != "body"}
    assert roles["conv_in"] == "first"
    assert roles["conv_out"] == "last"
    assert {name for name, role in roles.items() if role == "time"} == {n for n in modules if "time_emb" in n}


def test_attention_is_one_node_or_the_textbook_form_and_computes_the_same(unet: Any, graphs: dict[str, Path]) -> None:
    inputs = feeds(1)
    with torch.no_grad():
        expected = unet(*(torch.from_numpy(array) for array in inputs.values()), return_dict=False)[0].numpy()
    attentions = sum(name.endswith((".attn1", ".attn2")) for name, _ in unet.named_modules())
    for kernels, path in graphs.items():
        kinds = [node.op_type for node in onnx_ir.load(path).graph]
        assert kinds.count("MultiHeadAttention") == (attentions if kernels == X64 else 0)
        assert kinds.count("Softmax") == (0 if kernels == X64 else attentions)
        assert "Identity" not in kinds
        assert kinds.count("Shape") <= 1
        assert snr_db(expected, run(path, inputs)) > 90.0
        one = {**inputs, "sample": inputs["sample"][:1], "encoder_hidden_states": inputs["encoder_hidden_states"][:1]}
        assert snr_db(expected[:1], run(path, one)) > 90.0  # the batch stayed dynamic


# ---- ranges --------------------------------------------------------------------------------------------------------


def test_ranges_are_what_torch_sees(unet: Any, ranges: Ranges, samples: list[tuple[int, dict[str, Any]]]) -> None:
    seen: dict[str, list[torch.Tensor]] = {"in": [], "out": []}

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
        seen["in"].append(inputs[0])
        seen["out"].append(output)

    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    handle = unet.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        for _, inputs in samples:
            unet(*(torch.from_numpy(array) for array in inputs.values()))
    handle.remove()
    assert ranges.steps == (0, 1, 2, 3, 4)
    for found, side in ((ranges.inputs[name], "in"), (ranges.outputs[name], "out")):
        np.testing.assert_allclose(found.lo, [float(x.min()) for x in seen[side]], rtol=1e-4)
        np.testing.assert_allclose(found.hi, [float(x.max()) for x in seen[side]], rtol=1e-4)
        rows = [[float(row.square().mean().sqrt()) for row in x] for x in seen[side]]
        np.testing.assert_allclose(found.rms, [max(each) for each in rows], rtol=1e-4)
        assert found.whole == (min(found.lo), max(found.hi))
    back = Ranges.from_json(ranges.to_json())
    assert back.inputs[name].lo == pytest.approx(ranges.inputs[name].lo, rel=1e-5)


def test_a_planted_nan_is_named_with_its_step(graphs: dict[str, Path], tmp_path: Path) -> None:
    model = onnx_ir.load(graphs[X64])
    bias = model.graph.initializers[f"{CONV1}.bias"]
    values = bias.const_value.numpy().copy()  # type: ignore[union-attr]
    values[0] = np.nan
    bias.const_value = onnx_ir.tensor(values, name=bias.name)
    onnx_ir.save(model, tmp_path / "model.onnx", external_data=UNET_DATA)
    with pytest.raises(ActivationError, match=f"the output of {CONV1} is not finite at step 7") as caught:
        record_ranges(tmp_path / "model.onnx", [(7, feeds(7))], threads=1)
    assert (caught.value.step, caught.value.exit_status) == (7, 3)


def test_a_range_that_explodes_at_one_step_is_named(
    graphs: dict[str, Path], samples: list[tuple[int, dict[str, Any]]]
) -> None:
    broken = [(step, {**f, "sample": f["sample"] * (100 if step == 3 else 1)}) for step, f in samples]
    with pytest.raises(RangeExplodedError, match="the input of conv_in explodes at step 3") as caught:
        record_ranges(graphs[X64], broken, threads=1)
    assert caught.value.step == 3
    assert 50 < caught.value.times < 200


def test_no_samples_is_an_error(graphs: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="need samples"):
        record_ranges(graphs[X64], [], threads=1)


# ---- the quantised graph -------------------------------------------------------------------------------------------


def test_integer_weights_by_hand() -> None:
    weight = np.array([[1.27, -0.5, 0.01], [0.0, 0.0, 0.0]], dtype=np.float32)
    codes, scales = integer_weight(weight)
    assert codes.tolist() == [[127, -50, 1], [0, 0, 0]]
    np.testing.assert_allclose(scales[0], 0.01, rtol=1e-6)
    assert np.isfinite(scales).all()


def test_every_layer_is_an_integer_kernel_and_the_float_list_is_small(
    graphs: dict[str, Path], quantised: Path, samples: list[tuple[int, dict[str, Any]]]
) -> None:
    rules = recipe(graphs[X64])
    counted = count_integer_kernels(quantised, rules)
    assert counted.integer_convs + counted.integer_linears == sum(rule.integer for rule in rules.rules.values())
    assert counted.integer_convs > 0
    assert counted.kernels["Conv"] == 2  # the first and the last
    assert counted.activation_products == len(activation_products(onnx_ir.load(graphs[X64])))
    assert set(counted.float_list) == {name for name, rule in rules.rules.items() if not rule.integer}
    for _, inputs in samples:
        assert snr_db(run(graphs[X64], inputs), run(quantised, inputs)) > 25.0


def test_the_step_graph_can_be_merged_and_bytes_shrink(graphs: dict[str, Path], quantised: Path) -> None:
    weights = {value.name: value.dtype for value in onnx_ir.load(quantised).graph.initializers.values()}
    assert weights[f"{CONV1}.weight_q"] == onnx_ir.DataType.INT8
    assert f"{CONV1}.weight" not in weights
    assert weights["conv_in.weight"] == onnx_ir.DataType.FLOAT
    size = [sum(each.stat().st_size for each in path.parent.glob(f"*{UNET_DATA}")) for path in (graphs[X64], quantised)]
    assert size[1] < 0.75 * size[0]  # the time path is much of so small a network


def test_openvino_gets_standard_operators_and_quantised_inputs_only(
    graphs: dict[str, Path], samples: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    found = record_ranges(graphs[OPENVINO], samples, threads=1)
    quantise(graphs[OPENVINO], recipe(graphs[OPENVINO], OPENVINO), found, tmp_path / "model.onnx")
    model = onnx_ir.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph} == {""}
    read = {node.inputs[0].producer().op_type for node in model.graph if node.name == CONV1}  # type: ignore[union-attr]
    written = {user.op_type for node in model.graph if node.name == CONV1 for user in node.outputs[0].consumers()}
    assert read == {"DequantizeLinear"}
    assert "QuantizeLinear" not in written
    products = [node for node in model.graph if (node.name or "").endswith((".attn1/scores", ".attn2/mixed"))]
    made_by = [value.producer().op_type for node in products for value in node.inputs]  # type: ignore[union-attr]
    assert made_by
    assert set(made_by) == {"DequantizeLinear"}
    inputs = samples[2][1]
    assert snr_db(run(graphs[OPENVINO], inputs), run(tmp_path / "model.onnx", inputs)) > 25.0


def test_openvino_runs_every_layer_on_integers(
    graphs: dict[str, Path], samples: list[tuple[int, dict[str, Any]]], tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    path, rules = tmp_path / "model.onnx", recipe(graphs[OPENVINO], OPENVINO)
    found = record_ranges(graphs[OPENVINO], samples, threads=1)
    quantise(graphs[OPENVINO], rules, found, path)
    counted = count_integer_kernels(path, rules)
    assert counted.integer_convs + counted.integer_linears == sum(rule.integer for rule in rules.rules.values())
    assert counted.integer_convs > 0
    assert counted.activation_products == len(activation_products(onnx_ir.load(graphs[X64])))
    wanted = recipe_for(layers_of(onnx_ir.load(graphs[OPENVINO])), "w8a8", OPENVINO, [CONV1])
    quantise(
        graphs[OPENVINO], wanted, record_ranges(graphs[OPENVINO], samples, threads=1), tmp_path / "b" / "model.onnx"
    )
    with pytest.raises(UnfusedLayerError, match=CONV1):  # the recipe says integer, the graph left it in float
        count_integer_kernels(tmp_path / "b" / "model.onnx", rules)


def test_arm_pairs_signed_integers(graphs: dict[str, Path], ranges: Ranges, tmp_path: Path) -> None:
    quantise(graphs[X64], recipe(graphs[X64], "onnxruntime-arm"), ranges, tmp_path / "model.onnx")
    model = onnx_ir.load(tmp_path / "model.onnx")
    zeros = [value.dtype for name, value in model.graph.initializers.items() if name.endswith("put_zero")]
    assert set(zeros) == {onnx_ir.DataType.INT8}
    rules = recipe(graphs[X64], "onnxruntime-arm")
    counted = count_integer_kernels(tmp_path / "model.onnx", rules)
    assert counted.integer_convs + counted.integer_linears == sum(rule.integer for rule in rules.rules.values())


# ---- faults --------------------------------------------------------------------------------------------------------


def test_a_convolution_that_does_not_fuse_is_named(graphs: dict[str, Path], quantised: Path, tmp_path: Path) -> None:
    model = onnx_ir.load(quantised)
    node = next(node for node in model.graph if node.name == CONV1)
    down = node.outputs[0].consumers()[0]
    up = down.outputs[0].consumers()[0]
    up.outputs[0].replace_all_uses_with(node.outputs[0])  # its output is not quantised any more
    model.graph.remove([up, down], safe=True)
    onnx_ir.save(model, tmp_path / "model.onnx", external_data=UNET_DATA)
    with pytest.raises(UnfusedLayerError, match=f"{CONV1} did not fuse") as caught:
        count_integer_kernels(tmp_path / "model.onnx", recipe(graphs[X64]))
    assert caught.value.layer == CONV1


def test_refusals_say_what_is_missing(graphs: dict[str, Path], ranges: Ranges, tmp_path: Path) -> None:
    rules = recipe(graphs[X64])
    with pytest.raises(ExportError, match="folder of its own"):
        quantise(graphs[X64], rules, ranges, graphs[X64].with_name("other.onnx"))
    fewer = PrecisionRecipe("w8a8", X64, {name: r for name, r in rules.rules.items() if name != CONV1})
    with pytest.raises(ExportError, match="another network's"):
        quantise(graphs[X64], fewer, ranges, tmp_path / "model.onnx")
    with pytest.raises(LayerRuleError, match="not measured"):
        quantise(graphs[X64], rules, None, tmp_path / "model.onnx")
