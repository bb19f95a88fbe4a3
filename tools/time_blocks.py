"""Times the blocks of a U-Net one by one through ONNX Runtime: what compress/latency_table.py adds up.

In: block shapes. Out: a `LatencyTable` of medians and spreads, kept as JSON under a digest of shapes, machine and
versions. Each block is written as a small ONNX graph with random weights (onnx_writer.py), run on one thread of the CPU
provider, and timed by that thread's own processor time, so that what else runs on the machine counts little.
`python -m latentrelay.tools.time_blocks OUT.json` measures SD 1.4's shapes.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.compress.latency_table import (
    BlockShape,
    BlockTiming,
    LatencyTable,
    block_shapes,
    load_table,
    save_table,
    table_key,
)
from latentrelay.tools.onnx_writer import GraphWriter
from numpy.typing import NDArray

BATCH = 2
RUNS = 5
EMBEDDING = 1280
_SHARES = (1.0, 0.5, 0.25)  # of a block's prunable width


def machine() -> dict[str, str]:
    """What a table's figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": named[0] if named else platform.machine(),
        "threads": "1",
        "clock": "processor time of the running thread",
        "onnxruntime": metadata.version("onnxruntime"),
        "precision": "fp32",
    }


def widths_to_measure(shapes: Sequence[BlockShape]) -> list[BlockShape]:
    """Every family of blocks once, at its full, half and quarter width."""
    widest: dict[str, BlockShape] = {}
    for shape in shapes:
        if shape.family not in widest or widest[shape.family].width < shape.width:
            widest[shape.family] = shape
    found: list[BlockShape] = []
    for shape in widest.values():
        step = {"resnet": shape.groups, "feed_forward": 8}.get(shape.kind, 1)
        sizes = {max(step, round(shape.width * share / step) * step) for share in _SHARES} if shape.width else {0}
        found += [replace(shape, width=width) for width in sorted(sizes)]
    return found


def measured_table(
    unet: Any, rows: int, columns: int, tokens: int, cache: Path, on_block: Callable[[str], None] | None = None
) -> LatencyTable:
    """The table of a U-Net's blocks on this machine; read from `cache` (a folder) where it was measured before."""
    shapes, here = widths_to_measure(block_shapes(unet, rows, columns, tokens)), machine()
    path = cache / f"latency-{table_key(shapes, here)}.json"
    if path.exists():
        return load_table(path)
    table = LatencyTable(here, tuple(time_blocks(shapes, on_block)))
    cache.mkdir(parents=True, exist_ok=True)
    save_table(table, path)
    return table


def time_blocks(shapes: Sequence[BlockShape], on_block: Callable[[str], None] | None = None) -> list[BlockTiming]:
    """One timing a shape."""
    found = []
    for shape in shapes:
        times = thread_ms(block_graph(shape), block_inputs(shape), RUNS)
        quarters = statistics.quantiles(times, n=4)
        found.append(BlockTiming(shape, round(statistics.median(times), 4), round(quarters[2] - quarters[0], 4), RUNS))
        if on_block is not None:
            on_block(f"{shape.family} width {shape.width}: {found[-1].median_ms:.2f} ms")
    return found


def thread_ms(graph: bytes | str, inputs: dict[str, NDArray[Any]], runs: int) -> list[float]:
    """Processor time of each of `runs` runs after a warm-up, on one thread of the CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.inter_op_num_threads = 3, 1, 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    times = []
    for _ in range(runs):
        started = time.thread_time()
        session.run(None, inputs)
        times.append((time.thread_time() - started) * 1e3)
    return times


def block_inputs(shape: BlockShape, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random inputs of a block's graph: `x`, and the time embedding or the text states where it reads them."""
    rng = np.random.default_rng(seed)
    sizes = _input_sizes(shape)
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def _input_sizes(shape: BlockShape) -> dict[str, tuple[int, ...]]:
    pixels = shape.rows * shape.columns
    if shape.kind in ("self_attention", "cross_attention", "feed_forward"):
        sizes: dict[str, tuple[int, ...]] = {"x": (BATCH, pixels, shape.inputs)}
    else:
        rows, columns = shape.rows, shape.columns
        if shape.kind == "downsampler":
            rows, columns = 2 * rows, 2 * columns
        elif shape.kind == "upsampler":
            rows, columns = rows // 2, columns // 2
        sizes = {"x": (BATCH, shape.inputs, rows, columns)}
    if shape.kind == "resnet":
        sizes["embedding"] = (BATCH, EMBEDDING)
    if shape.kind == "cross_attention":
        sizes["text"] = (BATCH, shape.tokens, shape.text_width)
    return sizes


def block_graph(shape: BlockShape, seed: int = 0) -> bytes:
    """One block as a serialised ONNX model with random weights; its output is `x`'s successor in the network."""
    graph = GraphWriter(shape.kind)
    names = {name: graph.input(name, size) for name, size in _input_sizes(shape).items()}
    layers = _Layers(graph, np.random.default_rng(seed))
    output, size = _BLOCKS[shape.kind](layers, shape, names)
    graph.output(output, size)
    return graph.to_bytes()


@dataclass(frozen=True)
class _Layers:
    """Layers with random weights as the exports have them: names in, names out."""

    graph: GraphWriter
    rng: np.random.Generator

    def weight(self, *size: int) -> str:
        scale = np.float32(1 / max(1, int(np.prod(size[1:]))) ** 0.5)
        return self.graph.constant((self.rng.random(size, np.float32) - np.float32(0.5)) * scale)

    def conv(self, x: str, inputs: int, outputs: int, side: int, stride: int = 1) -> str:
        weights = self.weight(outputs, inputs, side, side), self.weight(outputs)
        pads, strides = [side // 2] * 4, [stride, stride]
        return self.graph.add("Conv", x, *weights, kernel_shape=[side, side], pads=pads, strides=strides)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        return self.graph.add("Add", self.graph.add("MatMul", x, self.weight(inputs, outputs)), self.weight(outputs))

    def reshape(self, x: str, *size: int) -> str:
        return self.graph.add("Reshape", x, self.graph.constant(np.array(size, np.int64)))

    def group_norm(self, x: str, channels: int, shape: BlockShape) -> str:
        ones = self.graph.constant(np.ones(shape.groups, np.float32))
        zeros = self.graph.constant(np.zeros(shape.groups, np.float32))
        grouped = self.reshape(x, BATCH, shape.groups, -1)
        normal = self.graph.add("InstanceNormalization", grouped, ones, zeros, epsilon=1e-5)
        back = self.reshape(normal, BATCH, channels, shape.rows, shape.columns)
        scale, shift = self.weight(channels, 1, 1), self.weight(channels, 1, 1)
        return self.graph.add("Add", self.graph.add("Mul", back, scale), shift)

    def silu(self, x: str) -> str:
        return self.graph.add("Mul", x, self.graph.add("Sigmoid", x))


Result = tuple[str, tuple[int, ...]]


def _resnet(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    graph, x = layers.graph, names["x"]
    hidden = layers.conv(layers.silu(layers.group_norm(x, shape.inputs, shape)), shape.inputs, shape.width, 3)
    shift = layers.linear(layers.silu(names["embedding"]), EMBEDDING, shape.width)
    hidden = graph.add("Add", hidden, layers.reshape(shift, BATCH, shape.width, 1, 1))
    hidden = layers.conv(layers.silu(layers.group_norm(hidden, shape.width, shape)), shape.width, shape.outputs, 3)
    if shape.inputs != shape.outputs:
        x = layers.conv(x, shape.inputs, shape.outputs, 1)
    return graph.add("Add", x, hidden), (BATCH, shape.outputs, shape.rows, shape.columns)


def _attention(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    graph, pixels, inner = layers.graph, shape.rows * shape.columns, shape.width * shape.head
    x = names["x"]
    source = names.get("text", x)
    length, channels = (shape.tokens, shape.text_width) if "text" in names else (pixels, shape.inputs)

    def heads(states: str, rows: int, order: list[int]) -> str:
        return graph.add("Transpose", layers.reshape(states, BATCH, rows, shape.width, shape.head), perm=order)

    q = heads(graph.add("MatMul", x, layers.weight(shape.inputs, inner)), pixels, [0, 2, 1, 3])
    k = heads(graph.add("MatMul", source, layers.weight(channels, inner)), length, [0, 2, 3, 1])
    v = heads(graph.add("MatMul", source, layers.weight(channels, inner)), length, [0, 2, 1, 3])
    root = graph.constant(np.array(shape.head**-0.25, np.float32))
    scores = graph.add("MatMul", graph.add("Mul", q, root), graph.add("Mul", k, root))
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    joined = layers.reshape(graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), BATCH, pixels, inner)
    return graph.add("Add", x, layers.linear(joined, inner, shape.outputs)), (BATCH, pixels, shape.outputs)


def _feed_forward(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    graph, x = layers.graph, names["x"]
    both = layers.linear(x, shape.inputs, 2 * shape.width)
    value, gate = graph.add_many("Split", 2, both, axis=2, num_outputs=2)
    gated = graph.add("Mul", value, graph.add("Gelu", gate))
    result = graph.add("Add", x, layers.linear(gated, shape.width, shape.outputs))
    return result, (BATCH, shape.rows * shape.columns, shape.outputs)


def _projections(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    """A transformer's frame: group norm, projection in, three layer norms, projection out."""
    graph, x, pixels = layers.graph, names["x"], shape.rows * shape.columns
    hidden = layers.conv(layers.group_norm(x, shape.inputs, shape), shape.inputs, shape.inputs, 1)
    hidden = graph.add("Transpose", layers.reshape(hidden, BATCH, shape.inputs, pixels), perm=[0, 2, 1])
    for _ in range(3):
        hidden = graph.add("LayerNormalization", hidden, layers.weight(shape.inputs), layers.weight(shape.inputs))
    back = layers.reshape(
        graph.add("Transpose", hidden, perm=[0, 2, 1]), BATCH, shape.inputs, shape.rows, shape.columns
    )
    result = graph.add("Add", x, layers.conv(back, shape.inputs, shape.outputs, 1))
    return result, (BATCH, shape.outputs, shape.rows, shape.columns)


def _conv_in(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    return layers.conv(names["x"], shape.inputs, shape.outputs, 3), (BATCH, shape.outputs, shape.rows, shape.columns)


def _conv_out(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    hidden = layers.silu(layers.group_norm(names["x"], shape.inputs, shape))
    return layers.conv(hidden, shape.inputs, shape.outputs, 3), (BATCH, shape.outputs, shape.rows, shape.columns)


def _downsampler(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    result = layers.conv(names["x"], shape.inputs, shape.outputs, 3, stride=2)
    return result, (BATCH, shape.outputs, shape.rows, shape.columns)


def _upsampler(layers: _Layers, shape: BlockShape, names: dict[str, str]) -> Result:
    """Nearest pixels, twice a side, by repetition along two new axes (a Resize needs an attribute of text)."""
    graph, rows, columns = layers.graph, shape.rows // 2, shape.columns // 2
    spread = layers.reshape(names["x"], BATCH, shape.inputs, rows, 1, columns, 1)
    size = graph.constant(np.array([BATCH, shape.inputs, rows, 2, columns, 2], np.int64))
    larger = layers.reshape(graph.add("Expand", spread, size), BATCH, shape.inputs, shape.rows, shape.columns)
    return layers.conv(larger, shape.inputs, shape.outputs, 3), (BATCH, shape.outputs, shape.rows, shape.columns)


_BLOCKS: dict[str, Callable[[_Layers, BlockShape, dict[str, str]], Result]] = {
    "resnet": _resnet,
    "self_attention": _attention,
    "cross_attention": _attention,
    "feed_forward": _feed_forward,
    "projections": _projections,
    "conv_in": _conv_in,
    "conv_out": _conv_out,
    "downsampler": _downsampler,
    "upsampler": _upsampler,
}


def main() -> None:
    """Measure SD 1.4's blocks into the file named on the command line."""
    from latentrelay.compress.geometry import sd14

    geometry = sd14()
    shapes = block_shapes(geometry.build_unet(), geometry.rows, geometry.columns, geometry.tokens)
    timings = time_blocks(widths_to_measure(shapes), lambda words: print(words, file=sys.stderr, flush=True))
    save_table(LatencyTable(machine(), tuple(timings)), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
