"""What the layers of an exported network see at their inputs: Gram matrices for linears, second moments for the rest.

In: a float ONNX graph whose layers carry their torch paths, and the network's inputs over recorded runs. Out: one
`InputStatistics` a layer, sums over every token or pixel of every sample; layers that read the same value share one.
Samples are streamed; memory is the sums and a few layers' inputs at a time. It measures no ranges: those are per step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from latentrelay.compress.weight_fit import InputStatistics
from latentrelay.export.errors import ExportError
from latentrelay.export.layers import is_layer
from numpy.typing import NDArray

GRAM_LIMIT = 2560  # inputs beyond which a Gram matrix would pass 52 MB
_AT_ONCE = 64  # inputs fetched in one run, so that their values do not all stand in memory together

Doubles = NDArray[np.float64]


def record_inputs(
    graph: Path, samples: Iterable[tuple[int, dict[str, NDArray[Any]]]], names: Collection[str] | None = None
) -> dict[str, InputStatistics]:
    """Statistics by layer name, for `names` or all layers of `graph`; `samples` are (step, the graph's inputs).

    Raises ExportError where an input is not finite, naming the layer and the step, and where there are no samples.
    """
    model = onnx_ir.load(graph)
    nodes = [node for node in model.graph if is_layer(node) and (names is None or node.name in names)]
    readers: dict[str, list[onnx_ir.Node]] = {}
    for node in nodes:
        readers.setdefault(_source(node), []).append(node)
    session = _tapped(model, graph.parent, readers)
    sums: dict[str, _Sums] = {}
    for step, feeds in samples:
        for part in _parts(list(readers)):
            for value, array in zip(part, session.run(part, feeds), strict=True):
                _require_finite(array, readers[value][0].name or value, step)
                sums.setdefault(value, _Sums(array, readers[value])).add(array)
    if not sums and readers:
        raise ExportError("no samples to calibrate on", expected="one or more", do="Record runs first.")
    return {str(node.name): sums[value].statistics for value, group in readers.items() for node in group}


class _Sums:
    """Running sums over one value: of x x^T over its last axis, or of x^2 over channels for a convolution's."""

    def __init__(self, first: NDArray[np.float32], readers: list[onnx_ir.Node]) -> None:
        self.channels_first = any(node.op_type == "Conv" for node in readers)
        width = first.shape[1] if self.channels_first else first.shape[-1]
        linear = any(node.op_type != "Conv" for node in readers)
        self.gram: Doubles | None = np.zeros((width, width)) if linear and width <= GRAM_LIMIT else None
        self.moments: Doubles = np.zeros(width)

    def add(self, array: NDArray[np.float32]) -> None:
        rows = np.moveaxis(array, 1, -1) if self.channels_first else array
        rows = rows.reshape(-1, rows.shape[-1])
        self.moments += np.sum(np.square(rows, dtype=np.float64), axis=0)
        if self.gram is not None:
            self.gram += rows.T @ rows

    @property
    def statistics(self) -> InputStatistics:
        return InputStatistics(self.gram, self.moments)


def _source(node: onnx_ir.Node) -> str:
    value = node.inputs[0]
    if value is None or value.name is None:
        raise ExportError(f"{node.name}: this layer has no input", do="Export the network again.")
    return value.name


def _tapped(model: onnx_ir.Model, folder: Path, values: Collection[str]) -> Any:
    """A session on the graph with `values` as further outputs; its weights stay in the file beside it."""
    import onnxruntime

    known = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    inputs = {value.name for value in model.graph.inputs}
    model.graph.outputs.extend(known[name] for name in values if name not in inputs)
    proto = onnx_ir.serde.serialize_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return _Tap(session, inputs)


class _Tap:
    """A session that also answers for values which are the graph's own inputs."""

    def __init__(self, session: Any, inputs: Collection[str | None]) -> None:
        self._session, self._inputs = session, inputs

    def run(self, values: list[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        asked = [name for name in values if name not in self._inputs]
        found = dict(zip(asked, self._session.run(asked, feeds) if asked else [], strict=True))
        return [found[name] if name in found else feeds[name] for name in values]


def _parts(values: list[str]) -> list[list[str]]:
    return [values[i : i + _AT_ONCE] for i in range(0, len(values), _AT_ONCE)]


def _require_finite(array: NDArray[np.float32], layer: str, step: int) -> None:
    bad = int(array.size - np.isfinite(array).sum())
    if bad:
        raise ExportError(
            f"{layer}: its input holds {bad} values that are NaN or Inf at step {step}",
            expected="finite numbers",
            do="The source network overflows there in float32; it cannot be quantised.",
        )
