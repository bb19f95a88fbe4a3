"""What the activations of a float U-Net reach at every step of real runs.

In: unet/model.onnx in float32 and a stream of (step, inputs) from recorded trajectories. Out: `Ranges`: for every layer
the lowest and highest value and the root mean square of its input and output per step. They are taken inside the graph,
so that no activation leaves ONNX Runtime. A NaN, an Inf and a range that explodes at one step are errors that name
layer and step. Nothing is clipped: on the reference, clipping by least squared error costs 6 dB of the output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from latentrelay.export.errors import ActivationError, ExportError, RangeExplodedError
from latentrelay.export.layers import is_layer
from numpy.typing import NDArray

Feeds = Mapping[str, NDArray[Any]]

EXPLODED = 16.0  # times the median over the other steps
_STATISTICS = "range_statistics"


@dataclass(frozen=True)
class ValueRange:
    """One activation: lowest and highest value and root mean square, each per step."""

    lo: tuple[float, ...]
    hi: tuple[float, ...]
    rms: tuple[float, ...]

    @property
    def whole(self) -> tuple[float, float]:
        """Lowest and highest value over all steps."""
        return min(self.lo), max(self.hi)


@dataclass(frozen=True)
class Ranges:
    """`steps` seen, ascending; `inputs` and `outputs` by layer name, with one entry a step. Where the graph spells
    attention out, `outputs` has its weights too, under `<attention>/softmax`: 0, the highest, and it for the mean."""

    steps: tuple[int, ...]
    inputs: Mapping[str, ValueRange]
    outputs: Mapping[str, ValueRange]

    def to_json(self) -> dict[str, Any]:
        """Plain lists; six significant digits, far below what eight bits can tell apart."""
        return {
            "steps": list(self.steps),
            **{side: {name: _to_json(each) for name, each in getattr(self, side).items()} for side in _SIDES},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Ranges:
        """The inverse of `to_json`."""
        inputs, outputs = ({name: _from_json(each) for name, each in document[side].items()} for side in _SIDES)
        return cls(tuple(document["steps"]), inputs, outputs)


_SIDES = ("inputs", "outputs")


def record_ranges(unet_onnx: Path, samples: Iterable[tuple[int, Feeds]], *, threads: int = 0) -> Ranges:
    """Run the float graph on every sample (step index, inputs by name) and collect ranges; nothing is written.

    Raises ActivationError (NaN or Inf; `.layer`, `.step`), RangeExplodedError (`.layer`, `.step`, `.times`), and
    ExportError without samples. Memory: one session.
    """
    model = onnx_ir.load(unet_onnx)
    watch = _Watch.on(model)
    session = _open(model, unet_onnx.parent, threads)
    seen = {value: _Seen() for value in watch.values}
    shaped = {value.name or "": value.shape for value in model.graph.inputs if value.shape is not None}
    batched = {name for name, shape in shaped.items() if len(shape) and not isinstance(shape[0], int)}
    for step, row_feeds in ((step, row) for step, feeds in samples for row in _rows(feeds, batched)):
        (table,) = session.run([_STATISTICS], dict(row_feeds))
        statistics = np.asarray(table, dtype=np.float64).reshape(len(watch.values), 3)
        for value, row in zip(watch.values, statistics, strict=True):
            if not np.isfinite(row).all():
                raise ActivationError(watch.owner(value), step)
            seen[value].add(step, row)
    steps = tuple(sorted(set().union(*(each.steps for each in seen.values()))))
    if not steps:
        raise ExportError("activation ranges need samples", got="none", expected="(step, inputs) of recorded runs")
    found = {value: each.summary(steps) for value, each in seen.items()}
    for value, each in found.items():
        _check_explosion(watch.owner(value), steps, each)
    inputs = {layer: found[value] for layer, value in watch.inputs.items()}
    return Ranges(steps, inputs, {layer: found[value] for layer, value in watch.outputs.items()})


@dataclass
class _Seen:
    """One activation over the run: lowest, highest, largest root mean square by step."""

    steps: dict[int, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, step: int, row: NDArray[np.float64]) -> None:
        lo, hi, rms = float(row[0]), float(row[1]), math.sqrt(max(float(row[2]), 0.0))
        old = self.steps.get(step, (lo, hi, rms))
        self.steps[step] = (min(old[0], lo), max(old[1], hi), max(old[2], rms))

    def summary(self, steps: Sequence[int]) -> ValueRange:
        lo, hi, rms = zip(*(self.steps[step] for step in steps), strict=True)
        return ValueRange(lo, hi, rms)


def _rows(feeds: Feeds, batched: Collection[str]) -> Iterator[Feeds]:
    """One branch of the guidance after the other where the batch is dynamic: half the memory, the same extremes."""
    names = [name for name in feeds if name in batched]
    if not names:
        yield feeds
        return
    for row in range(len(feeds[names[0]])):
        yield {name: array[row : row + 1] if name in batched else array for name, array in feeds.items()}


def _check_explosion(layer: str, steps: Sequence[int], found: ValueRange) -> None:
    reach = np.maximum(np.abs(found.lo), np.abs(found.hi))
    worst = int(reach.argmax())
    median = float(np.median(np.delete(reach, worst))) if len(steps) > 2 else float(reach[worst])
    if reach[worst] > EXPLODED * median:
        raise RangeExplodedError(layer, steps[worst], float(reach[worst]), median)


@dataclass(frozen=True)
class _Watch:
    """Which value each layer reads and writes, by name, and the values once each."""

    values: tuple[str, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def on(cls, model: onnx_ir.Model) -> _Watch:
        """Add the statistics' nodes and outputs to `model`."""
        inputs, outputs, values = {}, {}, {}
        for node in [node for node in model.graph if is_layer(node)]:
            source, result = node.inputs[0], written_value(node)
            if source is None or node.name is None or source.name is None or result.name is None:
                raise ExportError(f"a layer of the graph has no name: {node.op_type}", do="Export it again.")
            inputs[node.name], outputs[node.name] = source.name, result.name
            values[source.name], values[result.name] = source, result
        for node in [node for node in model.graph if node.op_type == "Softmax"]:
            weights = node.outputs[0]
            if node.name is not None and weights.name is not None:
                outputs[node.name], values[weights.name] = weights.name, weights
        parts = [part for value in values.values() for part in _statistics(model, value)]
        table = onnx_ir.node("Concat", parts, {"axis": 0}, name=_STATISTICS)
        table.outputs[0].name = _STATISTICS
        table.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        model.graph.append(table)
        model.graph.outputs.append(table.outputs[0])
        return cls(tuple(values), inputs, outputs)

    def owner(self, value: str) -> str:
        """The layer that reads or makes a value, in words."""
        made = next((layer for layer, name in self.outputs.items() if name == value), None)
        if made is not None:
            return f"the output of {made}"
        return f"the input of {next(layer for layer, name in self.inputs.items() if name == value)}"


def written_value(node: onnx_ir.Node) -> onnx_ir.Value:
    """What a layer makes: its node's output, or that of the addition of its bias, which stands apart for a MatMul."""
    users = node.outputs[0].consumers()
    if node.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "Add":
        return node.outputs[0]
    biased = any(value is not None and value.is_initializer() for value in users[0].inputs)
    return users[0].outputs[0] if biased else node.outputs[0]


def _statistics(model: onnx_ir.Model, value: onnx_ir.Value) -> Iterator[onnx_ir.Value]:
    """Minimum, maximum and mean square of a value, (1,) each."""
    graph, name = model.graph, value.name

    def add(op_type: str, inputs: Sequence[Any], attributes: Mapping[str, Any], label: str) -> onnx_ir.Value:
        made = onnx_ir.node(op_type, inputs, attributes, name=f"{name}/{label}")
        made.outputs[0].name = f"{name}/{label}"
        made.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        graph.append(made)
        return made.outputs[0]

    producer = value.producer()
    if producer is not None and producer.op_type == "Softmax":  # a gibibyte at 4096 tokens: one look, and no copy
        highest = add("ReduceMax", [value], {"keepdims": 0}, "max")
        highest = add("Unsqueeze", [highest, add("Constant", [], {"value": _ints([0])}, "first")], {}, "highest")
        yield add("Constant", [], {"value": onnx_ir.tensor(np.zeros(1, dtype=np.float32))}, "lowest")
        yield highest
        yield add("Mul", [highest, highest], {}, "square")
        return
    whole = add("Constant", [], {"value": _ints([-1])}, "whole")
    flat = add("Reshape", [value, whole], {}, "flat")
    yield add("ReduceMin", [flat], {"keepdims": 1}, "min")
    yield add("ReduceMax", [flat], {"keepdims": 1}, "max")
    yield add("ReduceMean", [add("Mul", [flat, flat], {}, "square")], {"keepdims": 1}, "mean_square")


def _ints(values: list[int]) -> onnx_ir.TensorProtocol:
    return onnx_ir.tensor(np.array(values, dtype=np.int64))


def _open(model: onnx_ir.Model, folder: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # an arena doubles, and attention's scores are gibibytes
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    blob = onnx_ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])


def _to_json(found: ValueRange) -> dict[str, list[float]]:
    return {name: [float(f"{number:.6g}") for number in getattr(found, name)] for name in ("lo", "hi", "rms")}


def _from_json(document: Mapping[str, Sequence[float]]) -> ValueRange:
    return ValueRange(tuple(document["lo"]), tuple(document["hi"]), tuple(document["rms"]))
