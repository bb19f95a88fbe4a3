"""Every form of a compressed layer, run by ONNX Runtime (and OpenVINO where installed) against NumPy."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from latentrelay.compress.precision import Layer, LayerRule
from latentrelay.compress.weight_fit import fit_weight
from latentrelay.export.errors import LayerRuleError
from latentrelay.export.weight_only import apply_weight_only, fit_layer, kernel_group, layer_weight

RNG = np.random.default_rng(7)
ORT = "onnxruntime-x64"


def linear_model(out: int, columns: int, *, gemm: bool = False) -> tuple[onnx_ir.Model, np.ndarray, np.ndarray]:
    """y = x W^T (+ 1 for a Gemm) as the exporter writes it; x is (1, 5, columns), a Gemm's (5, columns)."""
    weight = RNG.standard_normal((out, columns)).astype(np.float32)
    shape = [5, columns] if gemm else [1, 5, columns]
    x = onnx.helper.make_tensor_value_info("x", 1, shape)
    y = onnx.helper.make_tensor_value_info("y", 1, [*shape[:-1], out])
    stored = weight if gemm else np.ascontiguousarray(weight.T)
    inits = [onnx.numpy_helper.from_array(stored, "layer.weight")]
    if gemm:
        inits.append(onnx.numpy_helper.from_array(np.ones(out, np.float32), "layer.bias"))
        node = onnx.helper.make_node("Gemm", ["x", "layer.weight", "layer.bias"], ["y"], name="layer", transB=1)
    else:
        node = onnx.helper.make_node("MatMul", ["x", "layer.weight"], ["y"], name="layer")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [x], [y], inits),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=9,
    )
    return onnx_ir.serde.deserialize_model(model), weight, RNG.standard_normal(shape).astype(np.float32)


def conv_model(out: int, columns: int) -> tuple[onnx_ir.Model, np.ndarray, np.ndarray]:
    weight = RNG.standard_normal((out, columns, 3, 3)).astype(np.float32)
    x = onnx.helper.make_tensor_value_info("x", 1, [1, columns, 6, 6])
    y = onnx.helper.make_tensor_value_info("y", 1, [1, out, 4, 4])
    node = onnx.helper.make_node("Conv", ["x", "layer.weight"], ["y"], name="layer")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weight, "layer.weight")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    return onnx_ir.serde.deserialize_model(model), weight, RNG.standard_normal((1, columns, 6, 6)).astype(np.float32)


def layer_of(weight: np.ndarray) -> Layer:
    return Layer("layer", "conv" if weight.ndim == 4 else "linear", weight.shape, 1, "body")


def run(model: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    proto = onnx_ir.serde.serialize_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["y"]
    return session.run(None, {"x": x})[0]


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(1, 2))
    return np.einsum("cijkl,ockl->oij", windows, weight)[None]


def applied(model: onnx_ir.Model, weight: np.ndarray, rule: LayerRule, kernels: str = ORT) -> np.ndarray:
    """Replace the layer; returns what the device multiplies by, of the layer's own shape."""
    layer = layer_of(weight)
    fit = fit_weight(weight, replace(rule, group=kernel_group(layer, rule, kernels)))
    apply_weight_only(model, model.graph[0], layer, rule, kernels)
    return fit.dense().reshape(weight.shape)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("columns", [8, 48, 200])
@pytest.mark.parametrize("gemm", [False, True])
def test_linear_on_onnx_runtime_multiplies_by_the_rounded_weights(weights, columns, gemm):
    model, weight, x = linear_model(24, columns, gemm=gemm)
    dense = applied(model, weight, LayerRule(weights, "float32", group=32 if weights == "int4" else 0))
    assert next(iter(model.graph)).op_type == "MatMulNBits"
    np.testing.assert_allclose(run(model, x), x @ dense.T + gemm, rtol=1e-4, atol=1e-4)
    assert "layer.weight" not in model.graph.initializers


@pytest.mark.parametrize("rank", [0, 4])
def test_dynamic_activations_are_accuracy_level_4(rank):
    model, weight, x = linear_model(24, 64)
    dense = applied(model, weight, LayerRule("int4", "dynamic", group=32, rank=rank))
    assert model.graph.node("layer").attributes["accuracy_level"].value == 4
    want, got = x @ dense.T, run(model, x)
    error = np.sum((want - got) ** 2) / np.sum(want**2)
    assert 1e-7 < error < 1e-3  # 8-bit activations: not exact, and near


@pytest.mark.parametrize("kernels", [ORT, "openvino"])
def test_low_rank_branch_is_added(kernels):
    model, weight, x = linear_model(24, 64)
    rule = LayerRule("int4", "float32", group=32, rank=4)
    layer = layer_of(weight)
    fit = fit_layer(model.graph[0], layer, rule, kernels)
    apply_weight_only(model, model.graph[0], layer, rule, kernels, {"layer": fit})
    plain = fit_layer(linear_model(24, 64)[0].graph[0], layer, replace(rule, rank=0), kernels)
    assert fit.branch is not None
    assert fit.branch.up.shape == (24, 4)
    assert plain.branch is None
    if kernels == ORT:
        np.testing.assert_allclose(run(model, x), x @ fit.dense().T, rtol=1e-4, atol=1e-4)
    assert np.sum((fit.dense() - weight) ** 2) < np.sum((fit.rounded.dense() - weight) ** 2)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_convolution_is_dequantised_in_front(weights):
    model, weight, x = conv_model(16, 24)
    dense = applied(model, weight, LayerRule(weights, "float32", group=32 if weights == "int4" else 0))
    np.testing.assert_allclose(run(model, x), convolved(x, dense), rtol=1e-4, atol=1e-3)
    assert model.graph.opset_imports[""] == (21 if weights == "int4" else 20)


@pytest.mark.parametrize(("model", "weight", "x"), [linear_model(24, 64), conv_model(8, 8)])
def test_half_weights_are_widened(model, weight, x):
    apply_weight_only(model, model.graph[0], layer_of(weight), LayerRule("float16", "float32"), ORT)
    half = weight.astype(np.float16).astype(np.float32)
    want = x @ half.T if weight.ndim == 2 else convolved(x, half)
    np.testing.assert_allclose(run(model, x), want, rtol=1e-4, atol=1e-4)
    assert model.graph.initializers["layer.weight_half"].const_value.nbytes == weight.nbytes // 2


def test_bytes_of_a_layer():
    model, weight, _ = linear_model(64, 128)
    applied(model, weight, LayerRule("int4", "float32", group=32))
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    assert stored == 64 * 128 // 2 + 64 * 4 * 4  # half a byte a weight, a float a group of 32


def test_float32_is_left_alone():
    model, weight, _ = linear_model(4, 8)
    apply_weight_only(model, model.graph[0], layer_of(weight), LayerRule(), ORT)
    assert [node.op_type for node in model.graph] == ["MatMul"]


@pytest.mark.parametrize(
    ("rule", "kernels"), [(LayerRule("int8", "uint8"), ORT), (LayerRule("int8", "float32"), "coreml")]
)
def test_what_has_no_form_here_names_the_layer(rule, kernels):
    model, weight, _ = linear_model(4, 32)
    with pytest.raises(LayerRuleError, match=r"^layer: "):
        apply_weight_only(model, model.graph[0], layer_of(weight), rule, kernels)


def test_groups_fit_the_kernels():
    def group(columns: int, rule: LayerRule, kernels: str) -> int:
        return kernel_group(Layer("a", "linear", (8, columns), 1, "body"), rule, kernels)

    int4, int8 = LayerRule("int4", "float32", group=32), LayerRule("int8", "float32")
    assert [group(k, int4, ORT) for k in (8, 16, 200)] == [16, 16, 32]
    assert [group(k, int8, ORT) for k in (32, 64, 320, 128)] == [32, 64, 64, 128]
    assert [group(k, int4, "openvino") for k in (8, 48, 200, 7)] == [8, 24, 20, 0]
    assert group(64, int8, "openvino") == 0


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("columns", [64, 200])
def test_openvino_keeps_the_weights_compressed(weights, columns, tmp_path: Path):
    openvino = pytest.importorskip("openvino")
    model, weight, x = linear_model(24, columns)
    dense = applied(model, weight, LayerRule(weights, "float32", group=32 if weights == "int4" else 0), "openvino")
    onnx_ir.save(model, tmp_path / "model.onnx")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", settings)
    np.testing.assert_allclose(compiled({"x": x})[0], x @ dense.T, rtol=1e-4, atol=1e-3)
    kinds = {node.get_output_element_type(0).get_type_name() for node in compiled.get_runtime_model().get_ops()}
    assert kinds & {"i8", "u8", "i4", "u4"}


def test_weights_are_read_in_torchs_order():
    model, weight, _ = linear_model(3, 8)
    np.testing.assert_array_equal(layer_weight(model.graph[0]), weight)
