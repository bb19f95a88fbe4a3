"""Plan records to JSON and back: frozen dataclasses of str, int, float, tuples, literals and plain mappings.

Strict: unknown and missing keys and wrong types raise PlanError naming the place. `compress` imports nothing of the
runtime, so this is its own small reader rather than the manifest's.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar

from latentrelay.compress.errors import PlanError

T = TypeVar("T")


def plan_record_to_json(value: Any) -> Any:
    """A dataclass tree as JSON values; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plan_record_to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plan_record_to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plan_record_to_json(item) for item in value]
    return value


def parse_plan_record(cls: type[T], document: object, where: str = "recipe") -> T:
    """Build the dataclass `cls` from a JSON object whose keys are exactly its fields."""
    if not isinstance(document, dict):
        raise PlanError(f"plan.json: {where} is {type(document).__name__}, expected an object")
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(document) != names:
        wrong = sorted(set(document) ^ names)[0]
        state = "unknown" if wrong in document else "missing"
        raise PlanError(f"plan.json: {where}.{wrong} is {state}, expected the keys {', '.join(sorted(names))}")
    return cls(**{name: _parse(hints[name], document[name], f"{where}.{name}") for name in names})


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse_plan_record(typing.cast("type[Any]", hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_parse(arguments[0], item, f"{where}[{row}]") for row, item in enumerate(value))
    if origin is typing.Literal and value in arguments:
        return value
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return value
    allowed = arguments if origin in (UnionType, typing.Union) else (hint,)
    if origin is not tuple and any(isinstance(option, type) and type(value) is option for option in allowed):
        return value
    raise PlanError(f"plan.json: {where} is {value!r}, expected {hint}")
