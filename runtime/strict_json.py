"""A strict reader of JSON into frozen dataclasses: what a manifest and a handoff's metadata are read with.

Not a general validator: it knows str, int, float, bool, None, Any, tuples, string-keyed mappings, unions of these, and
dataclasses of them. Problems are raised as ValueError naming the place, for the caller to translate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
SCHEMA_MAJOR = 1
MAX_DEPTH = 64


def read_json(text: bytes) -> Any:
    """Parse UTF-8 JSON; repeated keys, NaN, Infinity, lone surrogates and nesting past MAX_DEPTH are ValueErrors."""
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(document)
    return document


def _check_depth(document: Any) -> None:
    """Shallow enough for everything that will walk the document, whose own frames deepen the stack too."""
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested too deeply: more than {MAX_DEPTH} levels")
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]


def check_schema_version(version: object) -> int:
    """The minor number of "1.<minor>"; ValueError on another major number or another form."""
    parts = version.split(".") if isinstance(version, str) else []
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        raise ValueError(f"schema_version: got {version!r}, expected 'major.minor'")
    if int(parts[0]) != SCHEMA_MAJOR:
        raise ValueError(f"schema_version: got {version}, this version reads {SCHEMA_MAJOR}.x; update latentrelay")
    return int(parts[1])


def parse_record(cls: type[T], document: object, where: str = "", ignore: frozenset[str] = frozenset()) -> T:
    """Build the dataclass `cls` from a JSON object: every field by its annotated type, no unknown key, none missing."""
    if not isinstance(document, dict):
        raise ValueError(f"{where or 'document'}: got {_kind(document)}, expected an object")
    prefix = f"{where}." if where else ""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    unknown = sorted(set(document) - set(fields) - ignore)
    if unknown:
        raise ValueError(f"unknown key {prefix}{unknown[0]}; allowed: {', '.join(sorted(fields))}")
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {}
    for name, field in fields.items():
        if name in document:
            values[name] = _parse(hints[name], document[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    return cls(**values)


def record_to_json(value: Any) -> Any:
    """The JSON form of a dataclass tree: tuples become lists, absent optional fields are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init)
        return {f.name: record_to_json(item) for f, item in pairs if not (item is None and f.default is None)}
    if isinstance(value, Mapping):
        return {key: record_to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [record_to_json(item) for item in value]
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """The annotated types; reading them compiles them, which costs more than the rest of a small record."""
    return typing.get_type_hints(cls)


def _parse(hint: Any, value: object, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return parse_record(typing.cast("type[Any]", hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{row}]") for row, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (types.UnionType, typing.Union) and any(_fits(option, value) for option in arguments):
        option = next(option for option in arguments if _fits(option, value))
        return _parse(option, value, where)
    if origin is None and _fits(hint, value):
        return value
    raise ValueError(f"{where}: got {_kind(value)}, expected {_name(hint)}")


def _fits(hint: Any, value: object) -> bool:
    if dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(hint)
    if origin is tuple:
        return isinstance(value, list)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict)
    return isinstance(value, hint) if isinstance(hint, type) else False


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}"[:60])


def _name(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)) if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is repeated")
    return document


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
