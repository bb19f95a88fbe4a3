"""Which kernels OpenVINO's CPU plug-in really runs for a quantised graph, by layer.

In: model.onnx and its recipe. Out: the same `KernelCount` as for ONNX Runtime. The graph is compiled and the plug-in's
own execution graph is read, where a node carries the names of what went into it and the kernel that it got
("brgemm_avx512_I8").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.export.errors import ExportError, UnfusedLayerError
from latentrelay.export.kernel_count import KernelCount

_WEIGHTED = ("Convolution", "FullyConnected", "MatMul")
_SCORES = "/scores"
_BATCH = 2


def count_openvino_kernels(graph: Path, recipe: PrecisionRecipe) -> KernelCount:
    """Compile `graph` for the CPU and count. Raises UnfusedLayerError naming a layer, ExportError without OpenVINO."""
    found: dict[str, tuple[str, str]] = {}
    products: list[str] = []
    for kind, kernel, names in _executed(graph):
        if any(name.endswith(_SCORES) for name in names):
            products.append(kernel)
        if kind in _WEIGHTED:
            found.update({name: (kind, kernel) for name in names if name in recipe.rules})
    convs = linears = 0
    for name, rule in recipe.rules.items():
        if not rule.integer or rule.activations == "dynamic":
            continue  # what is scaled as it comes is rounded inside a kernel that the plug-in calls float
        kind, kernel = found.get(name, ("", "nothing of its name"))
        if not _is_integer(kernel):
            raise UnfusedLayerError(name, kernel, "an i8 kernel")
        convs += kind == "Convolution"
        linears += kind != "Convolution"
    floats = recipe.float_list
    kernels = Counter(f"{kind} {kernel}" for kind, kernel in found.values())
    kernels.update(f"attention {kernel}" for kernel in products)
    return KernelCount(convs, linears, floats.names, floats.mac_share, len(products), dict(kernels))


def _is_integer(kernel: str) -> bool:
    return kernel.lower().endswith("i8")


def _executed(graph: Path) -> list[tuple[str, str, list[str]]]:
    """Layer type, kernel and original names of every node that the plug-in executes, at the batch of a guided step."""
    from latentrelay.runtime.errors import MissingExtraError
    from latentrelay.runtime.openvino_backend import import_openvino

    try:
        openvino = import_openvino()
    except MissingExtraError as error:
        raise ExportError(f"the kernels of {graph.name} cannot be counted: {error}") from error
    core: Any = openvino.Core()
    model = core.read_model(str(graph))
    shapes: Mapping[str, list[int]] = {
        port.get_any_name(): [_BATCH if size.is_dynamic else size.get_length() for size in port.get_partial_shape()]
        for port in model.inputs
    }
    model.reshape(shapes)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    executed = core.compile_model(model, "CPU", settings).get_runtime_model().get_ops()
    return [(_text(node, "layerType"), _text(node, "primitiveType"), _names(node)) for node in executed]


def _text(node: Any, key: str) -> str:
    return str(node.get_rt_info()[key].astype(str))


def _names(node: Any) -> list[str]:
    return _text(node, "originalLayersNames").split(",")
