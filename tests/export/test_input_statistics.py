"""Gram matrices and moments against NumPy on a small graph; what is not finite is named."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from latentrelay.compress.precision import PrecisionRecipe, recipe_for
from latentrelay.compress.weight_rounding import relative_error
from latentrelay.export.errors import ExportError
from latentrelay.export.input_statistics import record_inputs
from latentrelay.export.layers import layers_of
from latentrelay.export.weight_only import fit_layers, layer_weight

RNG = np.random.default_rng(0)
W1, W2 = RNG.standard_normal((12, 32)).astype(np.float32), RNG.standard_normal((32, 16)).astype(np.float32)
KERNEL = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x (1,T,12) -> "a" -> Relu -> "b"; "a2" reads x too; z (1,3,4,4) -> convolution "c"."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("MatMul", ["x", "a.weight"], ["h"], name="a"),
        make("Relu", ["h"], ["r"]),
        make("MatMul", ["r", "b.weight"], ["y"], name="b"),
        make("MatMul", ["x", "a2.weight"], ["y2"], name="a2"),
        make("Conv", ["z", "c.weight"], ["y3"], name="c"),
    ]
    weights = {"a.weight": W1, "b.weight": W2, "a2.weight": W1, "c.weight": KERNEL}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, [1, 5, 12]), info("z", 1, [1, 3, 4, 4])],
        [info("y", 1, [1, 5, 16]), info("y2", 1, [1, 5, 32]), info("y3", 1, [1, 4, 4, 4])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def samples(count: int = 3) -> list[tuple[int, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(1)
    shapes = {"x": (1, 5, 12), "z": (1, 3, 4, 4)}
    return [
        (step, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
        for step in range(count)
    ]


def test_sums_are_numpys(graph):
    found = record_inputs(graph, iter(samples()))
    x = np.concatenate([feeds["x"][0] for _, feeds in samples()])
    z = np.concatenate([feeds["z"][0].reshape(3, -1).T for _, feeds in samples()])
    hidden = np.maximum(x @ W1, 0)
    np.testing.assert_allclose(found["a"].gram, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(found["b"].gram, hidden.T @ hidden, rtol=1e-5)
    np.testing.assert_allclose(found["b"].moments, np.sum(hidden**2, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["c"].moments, np.sum(z**2, axis=0), rtol=1e-5)
    assert found["c"].gram is None
    assert found["a2"].gram is found["a"].gram
    assert set(record_inputs(graph, samples(), names=["c"])) == {"c"}


def test_fitted_layers_use_them(graph):
    layers = layers_of(onnx_ir.load(graph))
    statistics = record_inputs(graph, samples(40))
    recipe = recipe_for(layers, "w4a8", "onnxruntime-x64", float_layers=["a2"])
    fits = fit_layers(graph, recipe, statistics)
    assert set(fits) == {"a", "b"}  # the convolution's activations are static, a2 is float
    blind = fit_layers(graph, recipe)
    weight = layer_weight(onnx_ir.load(graph).graph.node("b"))
    gram = statistics["b"].gram
    errors = [relative_error(weight, each["b"].dense(), gram) for each in (fits, blind)]
    assert errors[0] < errors[1]
    assert fit_layers(graph, PrecisionRecipe("fp32", "openvino", {})) == {}


def test_what_is_not_finite_is_named(graph):
    bad = samples()
    bad[2][1]["x"][0, 0, 0] = np.nan
    with pytest.raises(ExportError, match=r"^a: its input holds 1 values that are NaN or Inf at step 2"):
        record_inputs(graph, bad)
    with pytest.raises(ExportError, match="no samples"):
        record_inputs(graph, [])
