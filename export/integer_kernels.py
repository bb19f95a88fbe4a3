"""Which kernels really run: every layer of a quantised graph, looked up in the graph that ONNX Runtime made of it.

In: a quantised model.onnx and its recipe. Out: `KernelCount`: how many convolutions and linears are integer kernels,
the float list with its share of the multiply-adds, products of two activations apart. A session is opened, its
optimised graph is written to a scratch folder and read back; a layer that the recipe computes on integers and that is
anything else there is an error which names it. What other execution providers make of the graph is not seen here;
graphs for OpenVINO are looked up in its own (openvino_kernels.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from latentrelay.compress.precision import LayerRule, PrecisionRecipe
from latentrelay.export.errors import UnfusedLayerError
from latentrelay.export.kernel_count import KernelCount
from latentrelay.export.openvino_kernels import count_openvino_kernels

__all__ = ["INTEGER_CONVS", "INTEGER_LINEARS", "KernelCount", "count_integer_kernels"]


INTEGER_CONVS = ("QLinearConv", "ConvInteger")
INTEGER_LINEARS = (
    "MatMulIntegerToFloat",
    "QLinearMatMul",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "QGemm",
    "MatMulNBits",  # at accuracy level 4 only
)
_FLOAT = ("Conv", "FusedConv", "NhwcFusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")
_ATTENTION = ("MultiHeadAttention", "Attention", "QAttention")
_INT8_ACTIVATIONS = 4
_WEIGHTS = "optimised.onnx_data"


def count_integer_kernels(
    graph: Path, recipe: PrecisionRecipe, session_options: Mapping[str, Any] | None = None
) -> KernelCount:
    """Open `graph` (model.onnx or a step graph) on the CPU, in the recipe's runtime, and count.

    `session_options`: as a manifest's; of those the entries "config.<key>" decide what fuses, and are set.
    Raises UnfusedLayerError naming the first layer, in the recipe's order, that should run on integers and does not.
    """
    if recipe.kernels == "openvino":
        return count_openvino_kernels(graph, recipe)
    # On x64 ONNX Runtime rewrites signed activations when it loads; arm64 takes them as they are, which is what counts.
    signed = {"config.session.qdqisint8allowed": "1"} if recipe.kernels == "onnxruntime-arm" else {}
    nodes = _optimised_nodes(graph, {**signed, **(session_options or {})})
    found = _by_layer(nodes, recipe.rules)
    convs = linears = 0
    for name, rule in recipe.rules.items():
        if not rule.integer:
            continue
        made = found.get(name, [])
        wrong = [node.op_type for node in made if not _is_integer(node, rule)]
        if wrong or not made:
            got = ", ".join(wrong) or "nothing of its name"
            raise UnfusedLayerError(name, got, " or ".join((*INTEGER_CONVS[:1], *INTEGER_LINEARS[:2])))
        convs += made[0].op_type in INTEGER_CONVS
        linears += made[0].op_type not in INTEGER_CONVS
    layers = {id(node) for each in found.values() for node in each}
    products = [node for node in nodes if node.op_type in _ATTENTION]
    products += [node for node in nodes if node.op_type in ("MatMul", "FusedMatMul") and id(node) not in layers]
    counted = (*INTEGER_CONVS, *INTEGER_LINEARS, *_FLOAT, *_ATTENTION)
    kernels = {kind: sum(node.op_type == kind for node in nodes) for kind in counted}
    floats = recipe.float_list
    return KernelCount(
        convs, linears, floats.names, floats.mac_share, len(products), {k: n for k, n in kernels.items() if n}
    )


def _is_integer(node: Any, rule: LayerRule) -> bool:
    if node.op_type == "MatMulNBits":
        levels = [each.i for each in node.attribute if each.name == "accuracy_level"]
        return rule.activations == "dynamic" and levels == [_INT8_ACTIVATIONS]
    return node.op_type in (*INTEGER_CONVS, *INTEGER_LINEARS)


def _by_layer(nodes: Iterable[Any], names: Iterable[str]) -> dict[str, list[Any]]:
    """Nodes that multiply by weights, by layer: ONNX Runtime keeps a node's name and may add an ending to it."""
    known, found = set(names), dict[str, list[Any]]()
    for node in nodes:
        if node.op_type not in (*INTEGER_CONVS, *INTEGER_LINEARS, *_FLOAT):
            continue
        name = str(node.name)
        while name and name not in known:
            name = name[: max(name.rfind("_"), name.rfind("/"), 0)]
        if name:
            found.setdefault(name, []).append(node)
    return found


def _optimised_nodes(graph: Path, session_options: Mapping[str, Any]) -> list[Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="latentrelay-") as scratch:
        path = Path(scratch, "optimised.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
        for key, value in session_options.items():
            if key.startswith("config."):
                options.add_session_config_entry(key.removeprefix("config."), str(value))
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        return list(onnx.load(str(path), load_external_data=False).graph.node)
