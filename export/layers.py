"""The layers of an exported network: which convolutions and linears it has, under which names, at which cost.

In: an ONNX graph written by onnx_graphs.py, where the node that multiplies by a layer's weights carries the layer's
torch module path as its name. Out: `Layer` records in the order of computation. A linear's weights may stand
transposed in the file, (in, out) for MatMul; `Layer.shape` is torch's (out, in) either way. Values are not read.
"""

from __future__ import annotations

from math import prod

import onnx_ir
from latentrelay.compress.precision import Layer, Role
from latentrelay.export.errors import ExportError

WEIGHTED = ("Conv", "Gemm", "MatMul")


def layers_of(model: onnx_ir.Model) -> tuple[Layer, ...]:
    """Every Conv, Gemm and MatMul with constant weights; products of two activations are not layers.

    Raises ExportError where a shape is missing that the count of multiply-adds needs.
    """
    nodes = [node for node in model.graph if is_layer(node)]
    return tuple(_layer(node, model.graph) for node in nodes)


def is_layer(node: onnx_ir.Node) -> bool:
    """True for a float Conv, Gemm or MatMul whose second input is a constant."""
    if node.op_type not in WEIGHTED or node.domain not in ("", "ai.onnx"):
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer()


def activation_products(model: onnx_ir.Model) -> tuple[str, ...]:
    """Names of the nodes that multiply two activations: attention's, fused or not."""
    plain = [n.name or "" for n in model.graph if n.op_type == "MatMul" and not is_layer(n) and _float_product(n)]
    fused = [n.name or "" for n in model.graph if n.op_type in ("MultiHeadAttention", "Attention")]
    return (*plain, *fused)


def _float_product(node: onnx_ir.Node) -> bool:
    producers = [value.producer() for value in node.inputs if value is not None]
    return not any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def _layer(node: onnx_ir.Node, graph: onnx_ir.Graph) -> Layer:
    weight, result = node.inputs[1], node.outputs[0]
    name = node.name or ""
    if weight is None or weight.shape is None or result.shape is None:
        raise ExportError(f"{name}: the graph does not say the shapes of this layer", do="Export it again.")
    stored = weight.shape.numpy()
    flipped = node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
    shape = stored[::-1] if flipped else stored
    positions = _positions(node, result.shape, name)
    return Layer(name, "conv" if node.op_type == "Conv" else "linear", shape, prod(shape) * positions, _role(node))


def _positions(node: onnx_ir.Node, shape: onnx_ir.Shape, name: str) -> int:
    """How often one call at batch 1 applies the weights: pixels of the output, or tokens."""
    inner = shape[2:] if node.op_type == "Conv" else shape[1:-1]
    if not all(isinstance(size, int) for size in inner):
        raise ExportError(f"{name}: the graph has a dynamic size here", got=str(shape), expected="a dynamic batch only")
    return prod(int(size) for size in inner if isinstance(size, int))


def _role(node: onnx_ir.Node) -> Role:
    name = node.name or ""
    if "time_emb" in name or name.startswith("add_embedding"):
        return "time"
    if name == "conv_in":
        return "first"
    return "last" if name == "conv_out" else "body"
