"""Attention as few nodes: the two dozen that torch.onnx writes for each one become one, or the five that fuse.

In: a graph straight from the exporter, where softmax(scale q k^T) v is spelled out with the shape of k taken apart and
put together again. On ONNX Runtime it becomes one com.microsoft.MultiHeadAttention on (B,S,heads*width), no transposes
around it, whose CPU kernel never stores the S x S scores. Elsewhere it becomes the textbook form of standard operators,
which OpenVINO fuses itself. The result is the same up to rounding; the graph is modified in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir
from latentrelay.export.errors import ExportError

MICROSOFT = "com.microsoft"
_SHAPING = ("Reshape", "Transpose", "Identity")


@dataclass(frozen=True)
class _Attention:
    """One attention found: query (B,S,heads*width), key and value (B,L,heads*width), result as the query."""

    name: str
    query: onnx_ir.Value
    key: onnx_ir.Value
    value: onnx_ir.Value
    result: onnx_ir.Value
    heads: int
    width: int
    scale: float


def fuse_attention(model: onnx_ir.Model, kernels: str) -> int:
    """Rewrite every attention for `kernels`; returns how many there were. Dead nodes are left to the caller's clean-up.

    Raises ExportError where a softmax is not part of an attention of this form.
    """
    found = [_around(node) for node in model.graph if node.op_type == "Softmax"]
    for attention in found:
        new = list(_fused(attention) if kernels.startswith("onnxruntime") else _textbook(attention))
        last = attention.result.producer()
        if last is None:
            raise ExportError(f"{attention.name}: its output has no producer", do="Report the model.")
        model.graph.insert_before(last, new)
        made = new[-1].outputs[0]
        made.shape, made.type = attention.result.shape, attention.result.type
        attention.result.replace_all_uses_with(made, replace_graph_outputs=True)
    if found and kernels.startswith("onnxruntime"):
        model.graph.opset_imports[MICROSOFT] = 1
    return len(found)


def _around(softmax: onnx_ir.Node) -> _Attention:
    """Climb from the scores to the three projections and down to where the heads are side by side again.

    It is called by its module's path ("...attn1"), or by the exporter's number where the query is no layer's output.
    """
    name = (softmax.name or "softmax").replace("node_", "")
    scores, product = _producer(softmax.inputs[0], "MatMul", name), _consumer(softmax.outputs[0], "MatMul", name)
    side_by_side = _consumer(_consumer(product.outputs[0], "Transpose", name).outputs[0], "Reshape", name)
    shape = _need(scores.inputs[0], name).shape
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        raise ExportError(
            f"{name}: attention of an unknown shape", got=str(shape), expected="(batch, heads, tokens, width)"
        )
    query, first = _climb(_need(scores.inputs[0], name))
    key, second = _climb(_need(scores.inputs[1], name))
    value, _ = _climb(_need(product.inputs[1], name))
    result = side_by_side.outputs[0]
    projection = query.producer()
    if projection is not None and (projection.name or "").endswith(".to_q"):
        name = (projection.name or "").removesuffix(".to_q")
    return _Attention(name, query, key, value, result, shape[1], shape[3], first * second)


def _climb(value: onnx_ir.Value) -> tuple[onnx_ir.Value, float]:
    """The value before reshapes, transposes and multiplications by one number, and the product of those numbers."""
    scale = 1.0
    while (node := value.producer()) is not None:
        source = node.inputs[0]
        if source is None or (node.op_type not in _SHAPING and node.op_type != "Mul"):
            break
        if node.op_type == "Mul":
            factor = node.inputs[1]
            if factor is None or factor.const_value is None or factor.const_value.size != 1:
                break
            scale *= float(factor.const_value.numpy().reshape(()))
        value = source
    return value, scale


def _fused(attention: _Attention) -> Iterator[onnx_ir.Node]:
    inputs = [attention.query, attention.key, attention.value]
    attributes = {"num_heads": attention.heads}
    plain = math.isclose(attention.scale, 1 / math.sqrt(attention.width), rel_tol=1e-5)
    scale = {} if plain else {"scale": attention.scale}
    yield onnx_ir.node(
        "MultiHeadAttention", inputs, {**attributes, **scale}, domain=MICROSOFT, name=f"{attention.name}/attention"
    )


def _textbook(attention: _Attention) -> Iterator[onnx_ir.Node]:
    """q (B,H,S,d), k^T (B,H,d,L), softmax(scale q k^T) v and back to (B,S,H*d)."""
    name, split = attention.name, _ints(f"{attention.name}/split", [0, 0, attention.heads, attention.width])
    parts = []
    for letter, value, perm in (
        ("q", attention.query, [0, 2, 1, 3]),
        ("k", attention.key, [0, 2, 3, 1]),
        ("v", attention.value, [0, 2, 1, 3]),
    ):
        if letter == "q":
            scale = np.array(attention.scale, dtype=np.float32)
            factor = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(scale)}, name=f"{name}/scale_value")
            yield factor
            scaled = onnx_ir.node("Mul", [value, factor.outputs[0]], name=f"{name}/scale")
            yield scaled
            value = scaled.outputs[0]
        if letter == "q":
            yield split
        shaped = onnx_ir.node("Reshape", [value, split.outputs[0]], name=f"{name}/{letter}_heads")
        turned = onnx_ir.node("Transpose", [shaped.outputs[0]], {"perm": perm}, name=f"{name}/{letter}_first")
        yield shaped
        yield turned
        parts.append(turned.outputs[0])
    scores = onnx_ir.node("MatMul", parts[:2], name=f"{name}/scores")
    weights = onnx_ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name=f"{name}/softmax")
    mixed = onnx_ir.node("MatMul", [weights.outputs[0], parts[2]], name=f"{name}/mixed")
    back = onnx_ir.node("Transpose", [mixed.outputs[0]], {"perm": [0, 2, 1, 3]}, name=f"{name}/heads_last")
    join = _ints(f"{name}/join", [0, 0, attention.heads * attention.width])
    yield from (scores, weights, mixed, back, join)
    yield onnx_ir.node("Reshape", [back.outputs[0], join.outputs[0]], name=f"{name}/attention")


def _ints(name: str, values: list[int]) -> onnx_ir.Node:
    return onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(np.array(values, dtype=np.int64))}, name=name)


def _need(value: onnx_ir.Value | None, name: str) -> onnx_ir.Value:
    if value is None:
        raise ExportError(f"{name}: an attention without one of its inputs", do="Report the model.")
    return value


def _producer(value: onnx_ir.Value | None, op_type: str, name: str) -> onnx_ir.Node:
    node = _need(value, name).producer()
    if node is None or node.op_type != op_type:
        got = node.op_type if node else "an input"
        raise ExportError(f"{name}: not an attention as torch.onnx writes it", got=got, expected=op_type)
    return node


def _consumer(value: onnx_ir.Value, op_type: str, name: str) -> onnx_ir.Node:
    users = value.consumers()
    if len(users) != 1 or users[0].op_type != op_type:
        got = ", ".join(user.op_type for user in users) or "nothing"
        raise ExportError(f"{name}: not an attention as torch.onnx writes it", got=got, expected=op_type)
    return users[0]
