"""Outputs written into a caller's arrays: the same values in the same place by every backend, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from latentrelay.runtime.backend import open_backend, writable
from latentrelay.runtime.coreml_backend import CoreMLBackend
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import BackendSpec, Component, CoreMLPackage, Port
from onnx import TensorProto as T

SHAPE = (2, 3)
PORTS = (Port("ladder", "feature_ladder", "float16", SHAPE), Port("step", "step", "int64", ()))
NEWS = (Port("next_ladder", "feature_ladder", "float16", SHAPE), Port("next_latents", "latents", "float32", (3,)))
COMPONENT = Component("step_full", "step.onnx", PORTS, NEWS)


class Doubles:
    """What a Core ML package of the graph below answers."""

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        new = inputs["ladder"] * np.float16(2) + inputs["step"]
        return {"next_ladder": new, "next_latents": new[0].astype(np.float32)}


@pytest.fixture(params=["onnxruntime", "openvino", "coreml"])
def graph(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """next_ladder = 2 ladder + step; next_latents, its first row in float32."""
    if request.param == "coreml":
        package = CoreMLPackage("step_full", "m", 1, "fp16", 60.0, "iOS17", "ALL", PORTS, NEWS)
        return CoreMLBackend(BackendSpec("coreml", ()), [package], None, lambda *_: Doubles()).load(Path(), COMPONENT)
    pytest.importorskip(request.param)
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Cast", ["step"], ["s"], to=T.FLOAT16),
        make("Add", ["ladder", "ladder"], ["twice"]),
        make("Add", ["twice", "s"], ["next_ladder"]),
        make("Gather", ["next_ladder", "zero"], ["row"]),
        make("Cast", ["row"], ["next_latents"], to=T.FLOAT),
    ]
    inputs = [value("ladder", T.FLOAT16, SHAPE), value("step", T.INT64, [])]
    outputs = [value("next_ladder", T.FLOAT16, SHAPE), value("next_latents", T.FLOAT, [3])]
    zero = [onnx.numpy_helper.from_array(np.array(0), "zero")]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", inputs, outputs, zero),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "step.onnx")
    return open_backend(BackendSpec(request.param, ()), threads=1).load(tmp_path / "step.onnx", COMPONENT)


def test_results_are_written_where_the_caller_says(graph: Any) -> None:
    first, second = np.ones(SHAPE, np.float16), np.full(SHAPE, 9, np.float16)
    made = graph.run({"ladder": first, "step": np.array(1)}, {"next_ladder": second})
    assert made["next_ladder"] is second
    np.testing.assert_array_equal(second, np.full(SHAPE, 3))
    np.testing.assert_array_equal(made["next_latents"], [3, 3, 3])
    made = graph.run({"ladder": second, "step": np.array(0)}, {"next_ladder": first})  # the other way round
    np.testing.assert_array_equal(first, np.full(SHAPE, 6))
    np.testing.assert_array_equal(second, np.full(SHAPE, 3))


def test_other_outputs_are_fresh_and_given_arrays_are_left_alone_later(graph: Any) -> None:
    ladder, target = np.ones(SHAPE, np.float16), np.zeros(SHAPE, np.float16)
    one = graph.run({"ladder": ladder, "step": np.array(1)}, {"next_ladder": target})["next_latents"]
    plain = graph.run({"ladder": ladder, "step": np.array(2)})
    again = graph.run({"ladder": ladder, "step": np.array(5)})
    np.testing.assert_array_equal(one, [3, 3, 3])
    np.testing.assert_array_equal(plain["next_ladder"], np.full(SHAPE, 4))
    np.testing.assert_array_equal(target, np.full(SHAPE, 3))
    np.testing.assert_array_equal(again["next_ladder"], np.full(SHAPE, 7))
    np.testing.assert_array_equal(ladder, np.ones(SHAPE))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (lambda ladder: {"colour": ladder}, "has no such output: got colour"),
        (lambda ladder: {"next_ladder": np.zeros(SHAPE, np.float32)}, r"got float32 \(2, 3\), expected float16"),
        (lambda ladder: {"next_ladder": np.zeros((3, 2), np.float16)}, r"got float16 \(3, 2\)"),
        (lambda ladder: {"next_ladder": np.zeros((3, 2), np.float16).T}, "cannot be written"),
        (lambda ladder: {"next_ladder": ladder}, "shares no memory"),
        (lambda ladder: {"next_ladder": np.broadcast_to(np.float16(0), SHAPE)}, "cannot be written"),
    ],
)
def test_arrays_that_cannot_take_the_result(graph: Any, outputs: Callable[..., Any], words: str) -> None:
    ladder = np.ones(SHAPE, np.float16)
    with pytest.raises(RequestError, match=words):
        graph.run({"ladder": ladder, "step": np.array(0)}, outputs(ladder))


def test_two_outputs_in_one_place_are_refused() -> None:
    ports = tuple(Port(name, name, "float32", SHAPE) for name in ("a", "b"))
    whole = np.zeros((3, 3), np.float32)
    with pytest.raises(RequestError, match="array for b cannot be written"):
        writable(Component("g", "g.onnx", (), ports), {}, {"a": whole[:2], "b": whole[1:]})
