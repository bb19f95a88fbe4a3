"""A linear or 1x1 convolution as com.microsoft.MatMulIntegerToFloat: integers in, floats with the bias out, one kernel.

In: an ONNX Runtime graph, a MatMul or a pointwise Conv, its quantised input (B,...,in) and its integer weights
(in,out). Out: the same graph with that node, the addition of its bias and the split of a gated feed-forward's two
halves replaced; each half becomes a product of its own, because cutting floats in two costs a third of the product. A
pointwise convolution is a linear on pixels, and written as one it needs no quantised output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir
from latentrelay.compress.precision import Layer
from latentrelay.export.attention_nodes import MICROSOFT
from numpy.typing import NDArray

CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class Constants(Protocol):
    """Registers an array as an initializer of the graph under a name."""

    def __call__(self, name: str, array: NDArray[Any], /) -> onnx_ir.Value:
        """The initializer's value."""


@dataclass(frozen=True)
class IntegerInput:
    """A quantised activation, channels last: its integers, scale () and zero point ()."""

    integers: onnx_ir.Value
    scale: onnx_ir.Value
    zero: onnx_ir.Value


def is_pointwise(node: onnx_ir.Node, layer: Layer) -> bool:
    """True for a 1x1 convolution that touches every pixel once, without padding or groups."""
    attributes = node.attributes
    plain = attributes.get_int("group", 1) == 1 and set(attributes.get_ints("strides", [1])) == {1}
    return layer.kind == "conv" and layer.shape[2:] == (1, 1) and plain and not any(attributes.get_ints("pads", [0]))


def replace_linear(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    layer: Layer,
    source: IntegerInput,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    constant: Constants,
) -> None:
    """Replace a MatMul and what follows it; `codes` (in,out) int8, `scales` (out,)."""
    result, done = node.outputs[0], [node]
    bias: onnx_ir.Value | None = None
    users = result.consumers()
    if len(users) == 1 and users[0].op_type == "Add":
        bias = next((value for value in users[0].inputs if value is not None and _fits(value, len(scales))), None)
        if bias is not None:
            result, done = users[0].outputs[0], [users[0], node]
    halves = _halves(result)
    if halves is not None:
        done, size = [halves, *done], len(scales) // 2
        cuts = (("value", slice(0, size)), ("gate", slice(size, None)))
        for (label, cut), old in zip(cuts, halves.outputs, strict=True):
            name = f"{layer.name}/{label}"
            added = None
            if bias is not None and bias.const_value is not None:
                added = constant(f"{name}.bias", np.ascontiguousarray(bias.const_value.numpy().reshape(-1)[cut]))
            made = _product(name, source, codes[:, cut], scales[cut], added, constant)
            graph.insert_before(halves, made)
            _take_over(old, made.outputs[0])
    else:
        made = _product(layer.name, source, codes, scales, bias, constant)
        graph.insert_before(done[0], made)
        _take_over(result, made.outputs[0])
    _remove(graph, done)


def replace_pointwise(
    graph: onnx_ir.Graph,
    node: onnx_ir.Node,
    layer: Layer,
    source: IntegerInput,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    constant: Constants,
) -> None:
    """Replace a 1x1 Conv; `codes` (in,out) int8. The result is turned back to (B,C,h,w) where something wants it so."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    made = _product(layer.name, source, codes, scales, bias, constant)
    graph.insert_before(node, made)
    result, first = node.outputs[0], made.outputs[0]
    first.name = f"{layer.name}/channels_last"
    if result.shape is not None:
        first.shape = onnx_ir.Shape([result.shape[axis] for axis in CHANNELS_LAST])
        first.type = result.type
    users = result.consumers()
    if users and all(is_transpose(user, CHANNELS_LAST) for user in users):
        for user in users:
            _take_over(user.outputs[0], first)
        _remove(graph, [*users, node])
        return
    back = onnx_ir.node("Transpose", [first], {"perm": list(CHANNELS_FIRST)}, name=f"{layer.name}/channels_first")
    graph.insert_before(node, back)
    _take_over(result, back.outputs[0])
    _remove(graph, [node])


def is_transpose(node: onnx_ir.Node | None, perm: Sequence[int]) -> bool:
    """True for a Transpose by exactly this permutation."""
    return node is not None and node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [*perm]


def _product(
    name: str,
    source: IntegerInput,
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    bias: onnx_ir.Value | None,
    constant: Constants,
) -> onnx_ir.Node:
    weight = constant(f"{name}.weight_q", np.ascontiguousarray(codes))
    scale = constant(f"{name}.weight_scale", np.ascontiguousarray(scales))
    inputs = [source.integers, weight, source.scale, scale, source.zero, None, bias]
    return onnx_ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT, name=name)


def _fits(value: onnx_ir.Value, size: int) -> bool:
    return value.const_value is not None and value.const_value.size == size


def _halves(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The node that cuts the last axis in two equal parts and is all that reads the value."""
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != "Split" or len(users[0].outputs) != 2 or value.shape is None:
        return None
    last = users[0].attributes.get_int("axis", 0) in (-1, len(value.shape) - 1)
    return users[0] if last and users[0].attributes.get_int("num_outputs", 0) == 2 else None


def _take_over(old: onnx_ir.Value, new: onnx_ir.Value) -> None:
    if new.shape is None:
        new.shape, new.type = old.shape, old.type
    if new.name is None:
        new.name = f"{old.name}/integer"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _remove(graph: onnx_ir.Graph, nodes: Sequence[onnx_ir.Node]) -> None:
    """Remove nodes, readers first, and the constants that only they read."""
    for node in nodes:
        constants = [value for value in node.inputs if value is not None and value.is_initializer()]
        graph.remove(node, safe=True)
        for value in constants:
            if value.name is not None and value.name in graph.initializers and not value.uses():
                del graph.initializers[value.name]
