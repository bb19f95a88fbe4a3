"""A float U-Net graph becomes the recipe's: quantise and dequantise nodes around every layer that runs on integers.

In: unet/model.onnx in float32, a recipe and the activation ranges. Out: another model.onnx with its model.onnx_data.
Layers with static activations are laid out here, one pair of nodes per activation however many layers read it; layers
whose activations stay float or are scaled as they come are weight_only.py's. On ONNX Runtime a convolution gets its
output quantised too, without which it runs in float; linears and 1x1 convolutions do not, their integer kernel writes
floats (integer_linear.py). Elsewhere inputs alone are quantised, as NNCF does it for OpenVINO, and attention's own
products between two such linears too (integer_attention.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from latentrelay.compress.precision import Layer, LayerRule, PrecisionRecipe
from latentrelay.compress.weight_fit import WeightFit
from latentrelay.export.activation_ranges import Ranges, ValueRange
from latentrelay.export.attention_nodes import MICROSOFT
from latentrelay.export.errors import ExportError, LayerRuleError
from latentrelay.export.integer_attention import quantise_attention
from latentrelay.export.integer_linear import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    IntegerInput,
    is_pointwise,
    is_transpose,
    replace_linear,
    replace_pointwise,
)
from latentrelay.export.layers import is_layer, layers_of
from latentrelay.export.onnx_graphs import UNET_DATA
from latentrelay.export.weight_only import apply_weight_only, layer_weight
from numpy.typing import NDArray

_NAMED_THRESHOLD = 1024  # bytes; smaller tensors stay in the graph
_SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8)  # of a channel's largest weight, the candidates for its scale
_ROWS = 64  # output channels whose scales are searched at once
_INTEGERS: Mapping[str, tuple[type[Any], int, int]] = {"uint8": (np.uint8, 0, 255), "int8": (np.int8, -128, 127)}


def quantise(
    unet_onnx: Path,
    recipe: PrecisionRecipe,
    ranges: Ranges | None,
    out: Path,
    *,
    fits: Mapping[str, WeightFit] | None = None,
) -> None:
    """Write `out` and its data file by the recipe; `ranges` may be None where no layer has static activations.

    `fits`: rounded weights by layer name, for layers without static activations (see weight_only.py). Peak memory is
    the compressed weights plus the largest float one. Raises LayerRuleError, ExportError.
    """
    if out.parent.resolve() == unet_onnx.parent.resolve():
        raise ExportError("a quantised graph needs a folder of its own", got=out.parent, do="Give another folder.")
    model = onnx_ir.load(unet_onnx)
    layers = {layer.name: layer for layer in layers_of(model)}
    if set(layers) != set(recipe.rules):
        odd = sorted(set(layers) ^ set(recipe.rules))[0]
        raise ExportError("the recipe is another network's", got=f"{odd} in one of them", do="Make the recipe again.")
    static = _Static(model, recipe.kernels, ranges)
    for node in [node for node in model.graph if is_layer(node)]:
        layer = layers[node.name or ""]
        rule = recipe.rules[layer.name]
        if rule.activations in _INTEGERS:
            static.apply(node, layer, rule)
        else:
            apply_weight_only(model, node, layer, rule, recipe.kernels, fits)
    if recipe.kernels == "openvino" and ranges is not None:
        quantise_attention(model, recipe, ranges, static.constant)
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, out, external_data=UNET_DATA, size_threshold_bytes=_NAMED_THRESHOLD)


def integer_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(out, ...) float32 -> codes of the same shape in -127..127 and scales (out,), by least squared error."""
    flat = weight.reshape(len(weight), -1)
    codes, scales = np.empty(flat.shape, dtype=np.int8), np.empty(len(flat), dtype=np.float32)
    for start in range(0, len(flat), _ROWS):
        rows = flat[start : start + _ROWS]
        reach = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-12))[:, None] / np.float32(127)
        best = np.full(len(rows), np.inf)
        for shrink in _SHRINK:
            scale = reach * np.float32(shrink)
            rounded = np.clip(np.rint(rows / scale), -127, 127)
            error = np.square(rounded * scale - rows).sum(axis=1, dtype=np.float64)
            better = error < best
            best[better] = error[better]
            codes[start : start + _ROWS][better] = rounded[better].astype(np.int8)
            scales[start : start + _ROWS][better] = scale[better, 0]
    return codes.reshape(weight.shape), scales


@dataclass(frozen=True)
class _Scale:
    """The values that a quantise and a dequantise node share, and the scale as a number."""

    scale: onnx_ir.Value
    zero: onnx_ir.Value
    number: float


@dataclass
class _Quantised:
    """One quantised activation: its integers as they are, and once more for each of the two things read off them."""

    integers: onnx_ir.Value
    scale: _Scale
    dequantised: onnx_ir.Value | None = None
    channels_last: onnx_ir.Value | None = None


@dataclass
class _Static:
    """Lays static layers out in one graph; remembers which activations are quantised already."""

    model: onnx_ir.Model
    kernels: str
    ranges: Ranges | None
    quantised: dict[onnx_ir.Value, _Quantised] = field(default_factory=dict)

    def apply(self, node: onnx_ir.Node, layer: Layer, rule: LayerRule) -> None:
        """Quantise one node's input, weights, bias and, for a convolution on ONNX Runtime, its output."""
        if rule.weights != "int8" or rule.group or rule.rank:
            got = f"{rule.weights}, group {rule.group}, rank {rule.rank}"
            raise LayerRuleError(
                layer.name, "static activations need int8 weights per channel", got=got, expected="int8"
            )
        codes, scales = integer_weight(layer_weight(node))
        if self.kernels == "openvino":
            self._surround(node, layer, rule, codes, scales)
        elif node.op_type == "MatMul":
            source = self._channels_last(node, layer, rule, turned=False)
            replace_linear(self.model.graph, node, layer, source, codes.T, scales, self.constant)
        elif is_pointwise(node, layer):
            source, flat = self._channels_last(node, layer, rule, turned=True), codes.reshape(len(codes), -1)
            replace_pointwise(self.model.graph, node, layer, source, flat.T, scales, self.constant)
        else:
            scale = self._surround(node, layer, rule, codes, scales)
            if layer.kind == "conv":
                self._bias(node, layer.name, scales * np.float32(scale.number))
                self._output(node, layer, rule)
        if self.kernels != "openvino":
            self.model.graph.opset_imports.setdefault(MICROSOFT, 1)

    def _surround(
        self, node: onnx_ir.Node, layer: Layer, rule: LayerRule, codes: NDArray[np.int8], scales: NDArray[np.float32]
    ) -> _Scale:
        """Dequantise in front of the node's input and weights; a runtime fuses the three."""
        source = self._input(node, layer, rule)
        if source.dequantised is None:
            name, scale = f"{layer.name}/input", source.scale
            up = onnx_ir.node("DequantizeLinear", [source.integers, scale.scale, scale.zero], name=f"{name}/dequantise")
            up.outputs[0].name = f"{name}/float"
            read = node.inputs[0]
            up.outputs[0].shape, up.outputs[0].type = (None, None) if read is None else (read.shape, read.type)
            self._insert_behind(source.integers, up)
            source.dequantised = up.outputs[0]
        node.replace_input_with(0, source.dequantised)
        axis = 1 if stored_flipped(node) else 0
        self._weight(node, layer.name, codes.T if axis else codes, scales, axis)
        return source.scale

    def _channels_last(self, node: onnx_ir.Node, layer: Layer, rule: LayerRule, turned: bool) -> IntegerInput:
        """A node's input as integers with the channels in the last axis; `turned`: the graph has (B,C,h,w)."""
        value = node.inputs[0]
        producer = value.producer() if value is not None else None
        if turned and producer is not None and is_transpose(producer, CHANNELS_FIRST):  # it was channels last before
            source = self._quantise(producer.inputs[0], layer, rule)
            return IntegerInput(source.integers, source.scale.scale, source.scale.zero)
        source = self._quantise(value, layer, rule)
        integers = source.integers
        if turned:
            if source.channels_last is None:
                turn = onnx_ir.node("Transpose", [integers], {"perm": list(CHANNELS_LAST)}, name=f"{layer.name}/turn")
                turn.outputs[0].name = f"{layer.name}/input/channels_last"
                self._insert_behind(integers, turn)
                source.channels_last = turn.outputs[0]
            integers = source.channels_last
        return IntegerInput(integers, source.scale.scale, source.scale.zero)

    def _input(self, node: onnx_ir.Node, layer: Layer, rule: LayerRule) -> _Quantised:
        return self._quantise(node.inputs[0], layer, rule)

    def _quantise(self, value: onnx_ir.Value | None, layer: Layer, rule: LayerRule) -> _Quantised:
        if value is None:
            raise LayerRuleError(layer.name, "it has no input", got=None, expected="an activation")
        if value not in self.quantised:
            name = f"{layer.name}/input"
            scale = self._scale(name, self._range(layer, "inputs"), rule)
            down = onnx_ir.node("QuantizeLinear", [value, scale.scale, scale.zero], name=f"{name}/quantise")
            down.outputs[0].name = f"{name}/integer"
            self._insert_behind(value, down)
            self.quantised[value] = _Quantised(down.outputs[0], scale)
        return self.quantised[value]

    def _insert_behind(self, value: onnx_ir.Value, node: onnx_ir.Node) -> None:
        producer = value.producer()
        if producer is not None:
            self.model.graph.insert_after(producer, node)
        else:
            self.model.graph.insert_before(self.model.graph[0], node)

    def _output(self, node: onnx_ir.Node, layer: Layer, rule: LayerRule) -> None:
        value, name = node.outputs[0], f"{layer.name}/output"
        users = tuple(value.uses())
        scale = self._scale(name, self._range(layer, "outputs"), rule)
        down = onnx_ir.node("QuantizeLinear", [value, scale.scale, scale.zero], name=f"{name}/quantise")
        up = onnx_ir.node("DequantizeLinear", [down.outputs[0], scale.scale, scale.zero], name=f"{name}/dequantise")
        down.outputs[0].name, up.outputs[0].name = f"{name}/integer", f"{name}/float"
        up.outputs[0].shape, up.outputs[0].type = value.shape, value.type
        self.model.graph.insert_after(node, [down, up])
        for user, index in users:
            user.replace_input_with(index, up.outputs[0])

    def _weight(
        self, node: onnx_ir.Node, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], axis: int
    ) -> None:
        inputs = [
            self.constant(f"{name}.weight_q", np.ascontiguousarray(codes)),
            self.constant(f"{name}.weight_scale", scales),
            self.constant(f"{name}.weight_zero", np.zeros(len(scales), dtype=np.int8)),
        ]
        self._dequantised_constant(node, 1, f"{name}/weight", inputs, axis)

    def _bias(self, node: onnx_ir.Node, name: str, scales: NDArray[np.float32]) -> None:
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is None:
            return
        if value.const_value is None:
            raise LayerRuleError(name, "its bias is not a constant", got=value, expected="a constant")
        codes = np.rint(value.const_value.numpy().astype(np.float64) / scales)
        limits = np.iinfo(np.int32)
        integers = np.clip(codes, limits.min, limits.max).astype(np.int32)
        inputs = [self.constant(f"{name}.bias_q", integers), self.constant(f"{name}.bias_scale", scales)]
        self._dequantised_constant(node, 2, f"{name}/bias", inputs, 0)

    def _dequantised_constant(
        self, node: onnx_ir.Node, index: int, name: str, inputs: Sequence[onnx_ir.Value], axis: int
    ) -> None:
        old = node.inputs[index]
        wide = onnx_ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}/dequantise")
        wide.outputs[0].name = f"{name}/float"
        self.model.graph.insert_before(node, wide)
        node.replace_input_with(index, wide.outputs[0])
        if old is not None and old.name is not None and not old.uses():
            del self.model.graph.initializers[old.name]

    def _range(self, layer: Layer, side: str) -> ValueRange:
        known = {} if self.ranges is None else getattr(self.ranges, side)
        if layer.name not in known:
            raise LayerRuleError(
                layer.name, "its activations were not measured", got=f"no range of its {side}", expected="one"
            )
        found: ValueRange = known[layer.name]
        return found

    def _scale(self, name: str, found: ValueRange, rule: LayerRule) -> _Scale:
        kind, lowest, highest = _INTEGERS[rule.activations]
        lo, hi = min(found.whole[0], 0.0), max(found.whole[1], 0.0)
        number = np.float32(max(hi - lo, 1e-6) / (highest - lowest))
        zero = int(np.clip(np.rint(lowest - lo / number), lowest, highest))
        scale = self.constant(f"{name}_scale", np.array(number, dtype=np.float32))
        return _Scale(scale, self.constant(f"{name}_zero", np.array(zero, dtype=kind)), float(number))

    def constant(self, name: str, array: NDArray[Any]) -> onnx_ir.Value:
        """Register an array as an initializer of the graph."""
        tensor = onnx_ir.tensor(array, name=name)
        shape = onnx_ir.Shape(array.shape)
        value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value


def stored_flipped(node: onnx_ir.Node) -> bool:
    """True where the file holds a layer's weights as (in, out)."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))
