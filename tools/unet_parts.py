"""The parts of SD 1.5's U-Net that `devices measure` times: a resnet block and a transformer block at each level.

A part is a graph with random weights and the shapes that the real U-Net has at 512x512 pixels, batch 1 (latents 64x64,
widths 320, 640, 1280, 1280): in float32, or with 8 bits where quantised graphs have them (weights and activations of
convolutions and linear layers; the products of attention stay float). Every part says how many multiply-adds it makes
and how many of the whole U-Net's it stands for, so that whole = sum of time x weight. Random weights: speed only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from latentrelay.tools.onnx_writer import GraphWriter
from numpy.typing import NDArray

HEADS, TOKENS, TEXT_WIDTH, GROUPS, EMBEDDING = 8, 77, 768, 32, 1280
# Multiply-adds of one call of SD 1.5's U-Net for one branch: convolutions, linear layers and the two products of
# attention, by side of the latents and kind of block (a transformer with its projections; all else with the resnets).
# They sum to 401.6e9 = 803 GFLOP; without the products of attention 338.6e9 = 677 GFLOP, the figure of BK-SDM's paper.
WHOLE_MACS = {
    (64, "resnet"): 70_980_157_440,
    (64, "transformer"): 96_828_620_800,
    (32, "resnet"): 68_056_678_400,
    (32, "transformer"): 49_537_024_000,
    (16, "resnet"): 52_541_849_600,
    (16, "transformer"): 43_791_155_200 + 2_271_641_600,  # the middle's transformer, at 8x8, counts here
    (8, "resnet"): 17_629_593_600,
}
WIDTH = {64: 320, 32: 640, 16: 1280, 8: 1280}


@dataclass(frozen=True)
class Part:
    """One part: kind "resnet" or "transformer", side of the latents, width in channels."""

    kind: str
    side: int
    width: int

    @property
    def name(self) -> str:
        """For tables: "resnet 320 at 64x64"."""
        return f"{self.kind} {self.width} at {self.side}x{self.side}"

    @property
    def macs(self) -> int:
        """Multiply-adds of one run, counted as WHOLE_MACS is."""
        pixels, width = self.side**2, self.width
        if self.kind == "resnet":
            return 2 * 9 * pixels * width**2 + EMBEDDING * width
        own = (
            (2 + 4 + 2 + 12) * pixels * width**2
        )  # projections; self-attention; cross-attention q, out; GEGLU and back
        return own + 2 * TOKENS * TEXT_WIDTH * width + 2 * pixels**2 * width + 2 * pixels * TOKENS * width

    @property
    def weight(self) -> float:
        """How many runs of this part the whole U-Net's share amounts to."""
        return WHOLE_MACS[self.side, self.kind] / self.macs


PARTS = tuple(Part(kind, side, WIDTH[side]) for side, kind in WHOLE_MACS)


def part_inputs(part: Part, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random inputs by name: `x` (1, width, side, side), and the time embedding or the text states."""
    rng = np.random.default_rng(seed)
    second = {"resnet": ("embedding", (1, EMBEDDING)), "transformer": ("text", (1, TOKENS, TEXT_WIDTH))}
    name, shape = second[part.kind]
    x = rng.standard_normal((1, part.width, part.side, part.side), np.float32)
    return {"x": x, name: rng.standard_normal(shape, np.float32)}


def part_graph(part: Part, *, int8: bool, seed: int = 0) -> bytes:
    """The part as a serialised ONNX model: `x` and a second input in, `y` like `x` out."""
    layers = _Layers(GraphWriter(part.name), np.random.default_rng(seed), int8)
    shape = (1, part.width, part.side, part.side)
    x = layers.graph.input("x", shape)
    y = _resnet(layers, part, x) if part.kind == "resnet" else _transformer(layers, part, x)
    layers.graph.output(y, shape)
    return layers.graph.to_bytes()


def _resnet(layers: _Layers, part: Part, x: str) -> str:
    graph, width = layers.graph, part.width
    embedding = graph.input("embedding", (1, EMBEDDING))
    hidden = layers.conv(layers.silu(layers.group_norm(x, part)), width, width, 3)
    shift = layers.linear(layers.silu(embedding), EMBEDDING, width)
    hidden = graph.add("Add", hidden, layers.reshape(shift, (1, width, 1, 1)))
    return graph.add("Add", x, layers.conv(layers.silu(layers.group_norm(hidden, part)), width, width, 3))


def _transformer(layers: _Layers, part: Part, x: str) -> str:
    graph, width, pixels = layers.graph, part.width, part.side**2
    text = graph.input("text", (1, TOKENS, TEXT_WIDTH))
    hidden = layers.reshape(layers.conv(layers.group_norm(x, part), width, width, 1), (1, width, pixels))
    hidden = graph.add("Transpose", hidden, perm=[0, 2, 1])
    own = layers.layer_norm(hidden, width)
    hidden = graph.add("Add", hidden, _attention(layers, own, own, pixels, width, (pixels, width)))
    own = layers.layer_norm(hidden, width)
    hidden = graph.add("Add", hidden, _attention(layers, own, text, pixels, width, (TOKENS, TEXT_WIDTH)))
    both = layers.linear(layers.layer_norm(hidden, width), width, 8 * width)
    value, gate = graph.add_many("Split", 2, both, axis=2, num_outputs=2)
    gated = graph.add("Mul", value, layers.gelu(gate))
    hidden = graph.add("Add", hidden, layers.linear(gated, 4 * width, width))
    hidden = layers.reshape(graph.add("Transpose", hidden, perm=[0, 2, 1]), (1, width, part.side, part.side))
    return graph.add("Add", x, layers.conv(hidden, width, width, 1))


def _attention(layers: _Layers, x: str, source: str, pixels: int, width: int, of: tuple[int, int]) -> str:
    """Queries from x (1, pixels, width), keys and values from source (1, *of); plain products and a softmax."""
    graph, (length, source_width), head = layers.graph, of, width // HEADS

    def heads(states: str, rows: int, order: list[int]) -> str:
        return graph.add("Transpose", layers.reshape(states, (1, rows, HEADS, head)), perm=order)

    q = heads(layers.projection(x, width, width), pixels, [0, 2, 1, 3])
    k = heads(layers.projection(source, source_width, width), length, [0, 2, 3, 1])
    v = heads(layers.projection(source, source_width, width), length, [0, 2, 1, 3])
    scores = graph.add("Mul", graph.add("MatMul", q, k), layers.number(head**-0.5))
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    joined = layers.reshape(graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), (1, pixels, width))
    return layers.linear(joined, width, width)


@dataclass(frozen=True)
class _Layers:
    """Layers with random weights, added to a graph; values go in and out by name."""

    graph: GraphWriter
    rng: np.random.Generator
    int8: bool

    def conv(self, x: str, inputs: int, outputs: int, side: int) -> str:
        """Without its bias, which costs nothing and would have to be int32 among 8-bit weights."""
        weight = self._weight((outputs, inputs, side, side), inputs * side**2)
        y = self.graph.add("Conv", self._rounded(x), weight, pads=[side // 2] * 4, kernel_shape=[side, side])
        return self._rounded(y)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        y = self._rounded(self.projection(x, inputs, outputs))
        return self.graph.add("Add", y, self.graph.constant(np.zeros(outputs, np.float32)))

    def projection(self, x: str, inputs: int, outputs: int) -> str:
        """Without bias, and not rounded after: ONNX Runtime would make the products of attention 8-bit ones too."""
        return self.graph.add("MatMul", self._rounded(x), self._weight((inputs, outputs), inputs))

    def group_norm(self, x: str, part: Part) -> str:
        unit = self.graph.constant(np.ones(GROUPS, np.float32)), self.graph.constant(np.zeros(GROUPS, np.float32))
        grouped = self.graph.add("InstanceNormalization", self.reshape(x, (1, GROUPS, -1)), *unit, epsilon=1e-5)
        back = self.reshape(grouped, (1, part.width, part.side, part.side))
        scale = self.graph.constant(np.ones((1, part.width, 1, 1), np.float32))
        shift = self.graph.constant(np.zeros((1, part.width, 1, 1), np.float32))
        return self.graph.add("Add", self.graph.add("Mul", back, scale), shift)

    def layer_norm(self, x: str, width: int) -> str:
        scale, shift = np.ones(width, np.float32), np.zeros(width, np.float32)
        return self.graph.add("LayerNormalization", x, self.graph.constant(scale), self.graph.constant(shift))

    def silu(self, x: str) -> str:
        return self.graph.add("Mul", x, self.graph.add("Sigmoid", x))

    def gelu(self, x: str) -> str:
        return self.graph.add("Gelu", x)

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        return self.graph.add("Reshape", x, self.graph.constant(np.array(shape, np.int64)))

    def number(self, value: float) -> str:
        return self.graph.constant(np.array(value, np.float32))

    def _weight(self, shape: tuple[int, ...], inputs: int) -> str:
        """Uniform random numbers of variance 1 / inputs; as int8 with one scale a tensor where asked for."""
        if not self.int8:
            values = self.rng.random(shape, np.float32)
            return self.graph.constant((values - np.float32(0.5)) * np.float32((12 / inputs) ** 0.5))
        values = self.rng.integers(-127, 128, shape, np.int8)
        zero = self.graph.constant(np.array(0, np.int8))
        scale = self.number((3 / inputs) ** 0.5 / 127)
        return self.graph.add("DequantizeLinear", self.graph.constant(values), scale, zero)

    def _rounded(self, x: str) -> str:
        """To 8 bits and back, around 128: what a quantised graph has on both sides of a layer with weights."""
        if not self.int8:
            return x
        scale, zero = self.number(6 / 128), self.graph.constant(np.array(128, np.uint8))
        return self.graph.add("DequantizeLinear", self.graph.add("QuantizeLinear", x, scale, zero), scale, zero)
