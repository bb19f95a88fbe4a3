"""The text encoder with 8-bit or 16-bit weights and float arithmetic, the token table included.

In: text_encoder/model.onnx in float32 (see onnx_graphs.py, any CLIP width and depth). Out: the same graph, its linears
compressed by weight_only.py and its token table as int8 rows with a scale each: the rows that a prompt asks for are
gathered first and widened then, so the table never stands in memory as floats. Position table, norms and biases stay
float32. It runs once a prompt, so size is what counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir
from latentrelay.compress.precision import LayerRule
from latentrelay.compress.weight_rounding import round_nearest
from latentrelay.export.errors import ExportError
from latentrelay.export.layers import is_layer, layers_of
from latentrelay.export.weight_only import apply_weight_only

_INLINE_LIMIT = 1_500_000_000  # bytes; a protobuf message ends at 2 GiB


def compress_text_encoder(
    graph: Path, out: Path, kernels: str, weights: Literal["int8", "float16"] = "int8"
) -> dict[str, int]:
    """Write `out`; returns the bytes of both files: {"float32": ..., "compressed": ...}, external data included.

    Raises ExportError where the graph has no token table, LayerRuleError where a layer has no form on `kernels`.
    """
    model = onnx_ir.load(graph)
    layers = {layer.name: layer for layer in layers_of(model)}
    rule = LayerRule(weights, "float32")
    table = _token_table(model, graph)
    for node in [node for node in model.graph if is_layer(node)]:
        apply_weight_only(model, node, layers[node.name or ""], rule, kernels)
    _compress_table(model.graph, table, weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if stored > _INLINE_LIMIT:
        onnx_ir.save(model, out, external_data=f"{out.name}_data")
    else:
        onnx_ir.external_data.load_to_model(model)
        onnx_ir.save(model, out)
    return {"float32": _bytes(graph), "compressed": _bytes(out)}


def _token_table(model: onnx_ir.Model, graph: Path) -> onnx_ir.Node:
    """The Gather of token embeddings: the one with the most rows."""
    gathers = [
        node
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    ]
    tables = [node for node in gathers if node.inputs[0] is not None and len(node.inputs[0].shape or ()) == 2]
    if not tables:
        raise ExportError(
            f"{graph} has no token table", got=f"{len(gathers)} gathers of constants", expected="one of rows and width"
        )
    return max(tables, key=lambda node: _rows(node))


def _rows(node: onnx_ir.Node) -> int:
    value = node.inputs[0]
    return 0 if value is None or value.shape is None else int(value.shape.numpy()[0])


def _compress_table(graph: onnx_ir.Graph, node: onnx_ir.Node, weights: str) -> None:
    """Gather(table, ids) -> float(Gather(codes, ids)) * Gather(scales, ids); without the scales for float16."""
    table, ids, old = node.inputs[0], node.inputs[1], node.outputs[0]
    if table is None or table.const_value is None or table.name is None:
        raise ExportError("the token table is not a constant", got=table, expected="a constant")
    rows = table.const_value.numpy().astype(np.float32, copy=False)
    rounded = round_nearest(rows, 8) if weights == "int8" else None
    codes = rows.astype(np.float16) if rounded is None else rounded.codes
    stored = _constant(graph, f"{table.name}_q", codes)
    gathered = onnx_ir.node("Gather", [stored, ids], {"axis": 0}, name=f"{table.name}/gather")
    wide = onnx_ir.node("Cast", [gathered.outputs[0]], {"to": onnx_ir.DataType.FLOAT.value}, name=f"{table.name}/widen")
    made, result = [gathered, wide], wide.outputs[0]
    if rounded is not None:
        scales = _constant(graph, f"{table.name}_scale", rounded.scales)
        scale = onnx_ir.node("Gather", [scales, ids], {"axis": 0}, name=f"{table.name}/gather_scale")
        scaled = onnx_ir.node("Mul", [wide.outputs[0], scale.outputs[0]], name=f"{table.name}/scale")
        made, result = [*made, scale, scaled], scaled.outputs[0]
    onnx_ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [result])
    for each in made:
        each.outputs[0].name = each.outputs[0].name or f"{each.name}/out"
    if not table.uses():
        del graph.initializers[table.name]


def _constant(
    graph: onnx_ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _bytes(path: Path) -> int:
    beside = path.with_name(f"{path.name}_data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
