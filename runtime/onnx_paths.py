"""Which files an ONNX graph wants to read beside itself: a small protobuf scan, no onnx import.

External-data locations are the part of an ONNX file that names other files, and have been used to read what lies
outside the model's folder. The scan walks the few message fields that can hold a tensor (main graph, subgraphs,
functions, attributes) and skips everything else unread, so weights stored inside cost nothing. It judges no path.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# message -> {field number: message it holds}; from onnx.proto. Only ways that lead to a TensorProto.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_MAX_DEPTH = 64
Bytes = bytes | mmap.mmap


def external_locations(path: Path) -> set[str]:
    """The external-data locations that the graph at `path` names, as written. ValueError if it cannot be read."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph:
        return set(_locations(graph, 0, len(graph), "Model", 0))


def _locations(data: Bytes, start: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs are nested too deeply")
    for number, first, last in _delimited(data, start, end):
        child = _FIELDS[message].get(number)
        if child == "Entry":
            entry = {key: bytes(data[a:b]) for key, a, b in _delimited(data, first, last)}
            if entry.get(1) == b"location":
                yield entry.get(2, b"").decode("utf-8")
        elif child is not None:
            yield from _locations(data, first, last, child, depth + 1)


def _delimited(data: Bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, end) of every length-delimited field of the message in data[start:end]."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, position = _varint(data, position, end)
            if size > end - position:
                raise ValueError("a field runs past its message")
            yield number, position, position + size
            position += size
        elif wire == 0:
            _, position = _varint(data, position, end)
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if position > end:
            raise ValueError("a field runs past its message")


def _varint(data: Bytes, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut off")
