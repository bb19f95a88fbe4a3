"""One layer with compressed weights and activations that no static scale quantises: int8, int4, float16, low rank.

In: a U-Net (or text encoder) in onnx_ir, one of its Conv, Gemm or MatMul nodes and the layer's rule. Out: the same
model, modified in place, that node replaced. On ONNX Runtime integer linears are `com.microsoft.MatMulNBits`, because
DequantizeLinear in front of a MatMul is fused to it anyway, with int8 activations that were not asked for; with
OpenVINO they are DequantizeLinear and Transpose, which its plug-in keeps compressed. Convolutions get a
DequantizeLinear: smaller files, no faster. Static activations are not here: see quantise_graph.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from latentrelay.compress.low_rank import LowRank
from latentrelay.compress.precision import Layer, LayerRule, PrecisionRecipe
from latentrelay.compress.weight_fit import InputStatistics, WeightFit, fit_weight
from latentrelay.compress.weight_rounding import RoundedWeight
from latentrelay.export.errors import LayerRuleError
from latentrelay.export.layers import is_layer, layers_of
from numpy.typing import NDArray

BLOCKED_OPSET, BLOCKED_IR = 21, 10  # from which DequantizeLinear takes blocks and 4-bit integers
_CONTRIB = "com.microsoft"
_LEVEL = {"float32": 1, "dynamic": 4}  # MatMulNBits: products in float32, or on int8 activations
_WEIGHT = 1


def apply_weight_only(
    model: onnx_ir.Model,
    node: onnx_ir.Node,
    layer: Layer,
    rule: LayerRule,
    kernels: str,
    fits: Mapping[str, WeightFit] | None = None,
) -> None:
    """Replace `node` by what `rule` says; float32 leaves it alone. `fits` holds rounded weights by layer name (made by
    `fit_layer`); what is missing there is rounded here, without calibration.

    Raises LayerRuleError naming the layer: static activations, a branch on a convolution, kernels without such a form.
    """
    _check(layer, rule, kernels)
    if rule.weights == "float32":
        return
    if rule.weights == "float16":
        _store_half(model.graph, node, layer.name)
        return
    fit = (fits or {}).get(layer.name) or fit_layer(node, layer, rule, kernels)
    if layer.kind == "conv":
        _dequantised_conv(model, node, layer, fit.rounded)
    elif kernels == "openvino":
        _dequantised_linear(model, node, layer, fit)
    else:
        _packed_linear(model, node, layer, rule, fit)


def fit_layer(
    node: onnx_ir.Node, layer: Layer, rule: LayerRule, kernels: str, seen: InputStatistics | None = None
) -> WeightFit:
    """Round the node's weights for the kernel that will read them; `seen` is what calibration saw at its input."""
    return fit_weight(layer_weight(node), dataclasses.replace(rule, group=kernel_group(layer, rule, kernels)), seen)


def fit_layers(
    unet_onnx: Path, recipe: PrecisionRecipe, statistics: Mapping[str, InputStatistics] | None = None
) -> dict[str, WeightFit]:
    """Rounded weights of every layer whose rule has integer weights and no static activations, by layer name.

    `statistics`: what calibration saw (see input_statistics.py); only layers with 4-bit weights profit from it.
    """
    model = onnx_ir.load(unet_onnx)
    layers = {layer.name: layer for layer in layers_of(model)}
    fits = {}
    for node in model.graph:
        rule = recipe.rules.get(node.name or "")
        if rule is None or not is_layer(node) or rule.weights not in ("int8", "int4") or rule.activations not in _LEVEL:
            continue
        layer = layers[node.name or ""]
        fits[layer.name] = fit_layer(node, layer, rule, recipe.kernels, (statistics or {}).get(layer.name))
    return fits


def layer_weight(node: onnx_ir.Node) -> NDArray[np.float32]:
    """A layer's weights in torch's order, (out, in) or (out, in, kh, kw) float32; raises LayerRuleError."""
    value = node.inputs[_WEIGHT]
    if value is None or value.const_value is None:
        raise LayerRuleError(node.name or node.op_type, "its weights are not constants", got=value, expected="constant")
    stored = value.const_value.numpy().astype(np.float32, copy=False)
    return np.ascontiguousarray(stored.T) if _stored_flipped(node) else stored


def kernel_group(layer: Layer, rule: LayerRule, kernels: str) -> int:
    """How many weights share a scale in the kernel: the rule's, as near as the kernel takes; 0 is a whole channel.

    MatMulNBits takes powers of two from 16, the last one padded; where the rule asks for whole channels, the group of
    32..128 that makes the fewest bytes. DequantizeLinear's blocks are kept even and dividing the row.
    """
    columns = int(np.prod(layer.shape[1:]))
    if layer.kind == "linear" and kernels != "openvino":
        if rule.group:
            return rule.group if columns > rule.group // 2 else max(16, rule.group // 2)
        bits = 4 if rule.weights == "int4" else 8
        return min((128, 64, 32), key=lambda group: -(-columns // group) * (group * bits // 8 + 4))
    if not rule.group:
        return 0
    dividing = [size for size in range(2, rule.group + 1, 2) if columns % size == 0]
    return max(dividing, default=0)


def _check(layer: Layer, rule: LayerRule, kernels: str) -> None:
    if rule.activations not in _LEVEL:
        expected = " | ".join(_LEVEL)
        raise LayerRuleError(layer.name, "its activations are not float", got=rule.activations, expected=expected)
    if rule.rank and layer.kind != "linear":
        raise LayerRuleError(layer.name, "a convolution has no low-rank branch", got=f"rank {rule.rank}", expected="0")
    if kernels not in ("onnxruntime-x64", "onnxruntime-arm", "openvino"):
        raise LayerRuleError(layer.name, "no ONNX form", got=kernels, expected="onnxruntime-x64 | -arm | openvino")


# ---- the forms -----------------------------------------------------------------------------------------------------


def _store_half(graph: onnx_ir.Graph, node: onnx_ir.Node, name: str) -> None:
    """float16 in the file, widened by a Cast that runtimes fold when they load."""
    old = _weight_value(node)
    stored = old.const_value.numpy().astype(np.float16)  # type: ignore[union-attr]
    half = _initializer(graph, f"{name}.weight_half", onnx_ir.tensor(stored))
    wide = _insert(graph, node, "Cast", [half], f"{name}/widen", {"to": onnx_ir.DataType.FLOAT.value})
    node.replace_input_with(_WEIGHT, wide)
    _drop(graph, old)


def _dequantised_conv(model: onnx_ir.Model, node: onnx_ir.Node, layer: Layer, rounded: RoundedWeight) -> None:
    graph, old = model.graph, _weight_value(node)
    if rounded.bits == 8 and rounded.group == rounded.codes.shape[1]:
        codes = _initializer(graph, f"{layer.name}.weight_q", onnx_ir.tensor(rounded.codes.reshape(layer.shape)))
        scales = _initializer(graph, f"{layer.name}.weight_scale", onnx_ir.tensor(rounded.scales[:, 0]))
        wide = _insert(graph, node, "DequantizeLinear", [codes, scales], f"{layer.name}/dequantise", {"axis": 0})
    else:
        rows = _dequantised_rows(model, node, layer.name, rounded)
        shape = _initializer(graph, f"{layer.name}.weight_shape", onnx_ir.tensor(np.array(layer.shape, np.int64)))
        wide = _insert(graph, node, "Reshape", [rows, shape], f"{layer.name}/reshape", {})
    node.replace_input_with(_WEIGHT, wide)
    _drop(graph, old)


def _dequantised_linear(model: onnx_ir.Model, node: onnx_ir.Node, layer: Layer, fit: WeightFit) -> None:
    """Codes stand as (out, in): the layout that OpenVINO's compressed matmuls read without moving them."""
    graph, old, source = model.graph, _weight_value(node), node.inputs[0]
    wide = _dequantised_rows(model, node, layer.name, fit.rounded)
    if _stored_flipped(node):
        wide = _insert(graph, node, "Transpose", [wide], f"{layer.name}/transpose", {"perm": [1, 0]})
    node.replace_input_with(_WEIGHT, wide)
    if fit.branch is not None:
        _add_branch(graph, node, source, layer.name, fit.branch)
    _drop(graph, old)


def _packed_linear(model: onnx_ir.Model, node: onnx_ir.Node, layer: Layer, rule: LayerRule, fit: WeightFit) -> None:
    """MatMulNBits: codes (out, blocks, bytes) uint8 offset by half their range, scales (out * blocks) float32."""
    graph, old, rounded = model.graph, _weight_value(node), fit.rounded
    source, bias = node.inputs[0], node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    rows, columns = rounded.codes.shape
    codes = _initializer(graph, f"{layer.name}.weight_q", onnx_ir.tensor(_packed(rounded)))
    scales = _initializer(graph, f"{layer.name}.weight_scale", onnx_ir.tensor(rounded.scales.reshape(-1)))
    attributes = {
        "K": columns,
        "N": rows,
        "bits": rounded.bits,
        "block_size": rounded.group,
        "accuracy_level": _LEVEL[rule.activations],
    }
    product = onnx_ir.node("MatMulNBits", [source, codes, scales], attributes, domain=_CONTRIB, name=layer.name)
    onnx_ir.convenience.replace_nodes_and_values(
        graph, node, [node], [product], [node.outputs[0]], [product.outputs[0]]
    )
    graph.opset_imports.setdefault(_CONTRIB, 1)
    if fit.branch is not None:
        _add_branch(graph, product, source, layer.name, fit.branch)
    if bias is not None:
        last = product.outputs[0] if fit.branch is None else _only_user(product).outputs[0]
        _append(graph, last, "Add", [last, bias], f"{layer.name}/bias")
    _drop(graph, old)


def _dequantised_rows(model: onnx_ir.Model, node: onnx_ir.Node, name: str, rounded: RoundedWeight) -> onnx_ir.Value:
    """The flattened weight (out, in * kh * kw) float32 in front of `node`."""
    graph, whole = model.graph, rounded.group >= rounded.codes.shape[1]
    codes = _initializer(graph, f"{name}.weight_q", _integers(rounded))
    scale = rounded.scales[:, 0] if whole else rounded.scales
    scales = _initializer(graph, f"{name}.weight_scale", onnx_ir.tensor(np.ascontiguousarray(scale)))
    attributes = {"axis": 0} if whole else {"axis": 1, "block_size": rounded.group}
    if not whole or rounded.bits == 4:
        graph.opset_imports[""] = max(graph.opset_imports.get("", 0), BLOCKED_OPSET)
        model.ir_version = max(model.ir_version, BLOCKED_IR)
    return _insert(graph, node, "DequantizeLinear", [codes, scales], f"{name}/dequantise", attributes)


def _add_branch(
    graph: onnx_ir.Graph, product: onnx_ir.Node, source: onnx_ir.Value | None, name: str, branch: LowRank
) -> None:
    """y + (x V^T) U^T, the factors stored in float16."""
    factors = []
    for part, matrix in (("down", branch.down), ("up", branch.up)):
        half = onnx_ir.tensor(np.ascontiguousarray(matrix.T.astype(np.float16)))
        stored = _initializer(graph, f"{name}.{part}", half)
        factors.append(_insert(graph, product, "Cast", [stored], f"{name}/{part}/widen", {"to": 1}))
    low = _insert(graph, product, "MatMul", [source, factors[0]], f"{name}/down", {})
    high = _insert(graph, product, "MatMul", [low, factors[1]], f"{name}/up", {})
    _append(graph, product.outputs[0], "Add", [product.outputs[0], high], f"{name}/branch")


# ---- graph pieces --------------------------------------------------------------------------------------------------


def _packed(rounded: RoundedWeight) -> NDArray[np.uint8]:
    rows, columns = rounded.codes.shape
    blocks, half = -(-columns // rounded.group), 1 << (rounded.bits - 1)
    codes = np.full((rows, blocks * rounded.group), half, dtype=np.uint8)
    codes[:, :columns] = (rounded.codes.astype(np.int16) + half).astype(np.uint8)
    codes = codes.reshape(rows, blocks, rounded.group)
    return codes if rounded.bits == 8 else np.ascontiguousarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def _integers(rounded: RoundedWeight) -> Any:
    if rounded.bits == 8:
        return onnx_ir.tensor(rounded.codes)
    flat = rounded.codes.reshape(-1).view(np.uint8) & 0x0F
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    packed = np.ascontiguousarray(flat[0::2] | (flat[1::2] << 4))
    return onnx_ir.PackedTensor(packed, onnx_ir.DataType.INT4, shape=onnx_ir.Shape(rounded.codes.shape))


def _stored_flipped(node: onnx_ir.Node) -> bool:
    """True where the file has (in, out): MatMul, and Gemm without transB."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))


def _weight_value(node: onnx_ir.Node) -> onnx_ir.Value:
    value = node.inputs[_WEIGHT]
    if value is None or value.const_value is None:
        raise LayerRuleError(node.name or node.op_type, "its weights are not constants", got=value, expected="constant")
    return value


def _initializer(graph: onnx_ir.Graph, name: str, tensor: Any) -> onnx_ir.Value:
    tensor.name = name
    value = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: onnx_ir.Graph,
    before: onnx_ir.Node,
    op_type: str,
    inputs: Sequence[onnx_ir.Value | None],
    name: str,
    attributes: Mapping[str, Any],
) -> onnx_ir.Value:
    made = onnx_ir.node(op_type, inputs, attributes, name=name)
    made.outputs[0].name = f"{name}/out"
    graph.insert_before(before, made)
    return made.outputs[0]


def _append(
    graph: onnx_ir.Graph, after: onnx_ir.Value, op_type: str, inputs: Sequence[onnx_ir.Value | None], name: str
) -> None:
    """A node behind `after` that takes over its users, its place among the graph's outputs and its name there."""
    users = tuple(after.uses())
    made = onnx_ir.node(op_type, inputs, name=name)
    result, producer = made.outputs[0], after.producer()
    result.type, result.shape, result.name = after.type, after.shape, f"{name}/out"
    for user, index in users:
        user.replace_input_with(index, result)
    for i, output in enumerate(graph.outputs):
        if output is after:
            result.name, after.name = after.name, f"{name}/in"
            graph.outputs[i] = result
    if producer is None:
        raise LayerRuleError(name, "it stands behind no node", got=after.name, expected="a computed value")
    graph.insert_after(producer, made)


def _only_user(product: onnx_ir.Node) -> onnx_ir.Node:
    return next(iter(product.outputs[0].uses())).node


def _drop(graph: onnx_ir.Graph, weight: onnx_ir.Value) -> None:
    if not weight.uses() and weight.name is not None:
        graph.initializers.pop(weight.name, None)
