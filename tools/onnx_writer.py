"""A small ONNX graph written as bytes, with NumPy alone: what `devices measure` times, since no onnx package is needed.

In: nodes, weights and one output, added one by one; every value has a fixed shape. Out: a serialised ModelProto that
ONNX Runtime loads. It writes the few protobuf fields that such graphs need (ONNX's onnx.proto, IR version 9, opset 20)
and checks nothing: ONNX Runtime does when it loads the graph. It is no exporter; export/ makes the bundles' graphs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

IR_VERSION, OPSET = 9, 20
_ELEMENT = {"float32": 1, "uint8": 2, "int8": 3, "int64": 7}
_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_FLOAT, _INT, _INTS = 1, 2, 7

Attribute = float | int | Sequence[int]


class GraphWriter:
    """Collects a graph. `add` and `constant` return the name of what they made, for the next call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[bytes] = []
        self._initializers: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._count = 0

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32") -> str:
        """Declare an input."""
        self._inputs.append(_value_info(name, shape, dtype))
        return name

    def output(self, name: str, shape: Sequence[int], dtype: str = "float32") -> None:
        """Declare a value as an output."""
        self._outputs.append(_value_info(name, shape, dtype))

    def constant(self, array: NDArray[Any]) -> str:
        """Add a weight: float32, uint8, int8 or int64 of any shape."""
        name = self._fresh("c")
        dims = b"".join(_field(1, _VARINT, size) for size in array.shape)
        kind = _field(2, _VARINT, _ELEMENT[array.dtype.name])
        raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        self._initializers.append(dims + kind + _text(8, name) + _field(9, _BYTES, raw))
        return name

    def add(self, op: str, *inputs: str, **attributes: Attribute) -> str:
        """Add a node with one output; attributes are floats, integers or lists of integers."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, outputs: int, *inputs: str, **attributes: Attribute) -> list[str]:
        """Add a node with several outputs."""
        names = [self._fresh("v") for _ in range(outputs)]
        node = b"".join(_text(1, name) for name in inputs) + b"".join(_text(2, name) for name in names)
        node += _text(3, f"n{self._count}") + _text(4, op)
        node += b"".join(_field(5, _BYTES, _attribute(key, value)) for key, value in attributes.items())
        self._nodes.append(node)
        return names

    def to_bytes(self) -> bytes:
        """The serialised model; weights are held twice while it is made."""
        graph = [*_tagged(1, self._nodes), _text(2, self._name), *_tagged(5, self._initializers)]
        graph += [*_tagged(11, self._inputs), *_tagged(12, self._outputs)]
        opset = _text(1, "") + _field(2, _VARINT, OPSET)
        head = _field(1, _VARINT, IR_VERSION) + _text(2, "latentrelay") + _field(8, _BYTES, opset)
        return head + _field(7, _BYTES, b"".join(graph))

    def _fresh(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"


def _value_info(name: str, shape: Sequence[int], dtype: str) -> bytes:
    dims = b"".join(_field(1, _BYTES, _field(1, _VARINT, size)) for size in shape)
    tensor = _field(1, _VARINT, _ELEMENT[dtype]) + _field(2, _BYTES, dims)
    return _text(1, name) + _field(2, _BYTES, _field(1, _BYTES, tensor))


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _key(2, _FIXED32) + struct.pack("<f", value) + _field(20, _VARINT, _FLOAT)
    if isinstance(value, int):
        return _text(1, name) + _field(3, _VARINT, value) + _field(20, _VARINT, _INT)
    return _text(1, name) + b"".join(_field(8, _VARINT, item) for item in value) + _field(20, _VARINT, _INTS)


def _tagged(number: int, messages: Iterable[bytes]) -> list[bytes]:
    return [_field(number, _BYTES, message) for message in messages]


def _text(number: int, text: str) -> bytes:
    return _field(number, _BYTES, text.encode())


def _field(number: int, wire: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _key(number, wire) + _varint(value)
    return _key(number, wire) + _varint(len(value)) + value


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _varint(value: int) -> bytes:
    """Base 128, seven bits a byte, low first; negative numbers as their 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
