"""One .mlpackage cut in two where its weights would pass the largest file that the device takes.

In: a saved package. Out: `<name>_chunk1.mlpackage` and `<name>_chunk2.mlpackage` beside it, run in that order, the
second taking the first's outputs by name. Cut between two operations, where both sides fit and the fewest bytes of
activations cross; the same operations in the same order, so the chain equals the whole bit for bit in the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.export.coreml_convert import WEIGHTS, load_program, save_package
from latentrelay.export.coremltools_import import coremltools, quiet
from latentrelay.export.errors import ConversionError

_CROSSING = {"fp16": 2, "fp32": 4, "int32": 4}  # bytes of what may be an input or output of a package


@dataclass(frozen=True)
class Cut:
    """A place between two operations: how many of the program's operations come before it, the values that cross,
    their bytes, and the bytes of weights on either side."""

    before: int
    crossing: tuple[str, ...]
    crossing_bytes: int
    weights: tuple[int, int]


def weight_bytes(package: Path) -> int:
    """Bytes of a package's weight files."""
    return sum(path.stat().st_size for path in (package / WEIGHTS).rglob("*") if path.is_file())


def best_cut(package: Path, limit: int) -> Cut:
    """The cut that leaves at most `limit` bytes of weights on either side and has the fewest bytes crossing, then the
    most even halves. Raises ConversionError if two packages are not enough."""
    cuts = [cut for cut in _cuts(load_program(package).functions["main"]) if max(cut.weights) <= limit]
    if not cuts:
        raise ConversionError(
            f"{package.name} does not fit in two packages",
            got=f"{weight_bytes(package)} bytes of weights",
            expected=f"at most {limit} bytes a file, support for two",
            do="Choose a smaller network or a precision of fewer bits.",
        )
    return min(cuts, key=lambda cut: (cut.crossing_bytes, max(cut.weights), cut.before))


def _cuts(function: Any) -> list[Cut]:
    operations = list(function.operations)
    place = {var: i for i, op in enumerate(operations) for var in op.outputs}
    last: dict[Any, int] = {}
    for i, op in enumerate(operations):
        for var in _read(op):
            last[var] = i
    for var in function.outputs:
        last[var] = len(operations)
    fixed = {var for op in operations if _is_constant(op) for var in op.outputs}
    users: dict[Any, list[int]] = {var: [] for var in fixed}
    for i, op in enumerate(operations):
        if not _is_constant(op):
            for var in _constants_behind(op, fixed):
                users.setdefault(var, []).append(i)
    sizes = {var: _bytes(var) for var in users}
    cuts = []
    for i in range(len(operations) - 1):
        if _is_constant(operations[i]):
            continue
        live = [var for var in place if var not in fixed and place[var] <= i < last.get(var, -1)]
        kinds = [_type(var) for var in live]
        if not live or any(kind not in _CROSSING or not var.shape for kind, var in zip(kinds, live, strict=True)):
            continue
        if any(var in live for var in function.outputs):
            continue
        left = sum(sizes[var] for var, at in users.items() if at and at[0] <= i)
        right = sum(sizes[var] for var, at in users.items() if at and at[-1] > i)
        crossing = sum(_elements(var) * _CROSSING[kind] for var, kind in zip(live, kinds, strict=True))
        cuts.append(Cut(i + 1, tuple(var.name for var in live), crossing, (left, right)))
    return cuts


def _is_constant(op: Any) -> bool:
    return bool(op.op_type == "const" or op.op_type.startswith("constexpr_"))


def _read(op: Any) -> list[Any]:
    found: list[Any] = []
    for given in op.inputs.values():
        found.extend(given if isinstance(given, list | tuple) else [given])
    return [var for var in found if var is not None]


def _constants_behind(op: Any, fixed: set[Any]) -> list[Any]:
    """The constants that an operation needs, through the expressions that expand compressed ones."""
    found, open_ends = [], [var for var in _read(op) if var in fixed]
    while open_ends:
        var = open_ends.pop()
        if var.op.op_type == "const":
            found.append(var)
        else:
            open_ends.extend(_read(var.op))
    return found


def _type(var: Any) -> str:
    return str(coremltools.converters.mil.mil.types.builtin_to_string(var.dtype))


def _elements(var: Any) -> int:
    count = 1
    for size in var.shape:
        count *= int(size)
    return count


def _bytes(var: Any) -> int:
    kind = var.dtype
    bits = kind.get_bitwidth() if hasattr(kind, "get_bitwidth") else 0
    return _elements(var) * int(bits) // 8


def chunk(package: Path, limit: int, target: str) -> tuple[Path, Path]:
    """Write the two halves beside `package`, which stays. Raises ConversionError as `best_cut` does."""
    cut = best_cut(package, limit)
    halves = []
    for part in (1, 2):
        specification = coremltools.utils.load_spec(str(package))
        _keep(specification, cut, part)
        program = load_program(package, specification)
        with quiet():
            model = coremltools.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target[target],
                pass_pipeline=coremltools.PassPipeline.EMPTY,
                skip_model_load=True,
            )
        half = package.with_name(f"{package.stem}_chunk{part}.mlpackage")
        save_package(model, half)
        halves.append(half)
    return halves[0], halves[1]


def _keep(specification: Any, cut: Cut, part: int) -> None:
    """Reduce a specification to one side of a cut; modified in place."""
    function = specification.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    operations = list(block.operations)
    body = operations[: cut.before] if part == 1 else operations[cut.before :]
    body = [op for op in body if not _constant(op)]
    makers = {out.name: op for op in operations for out in op.outputs}
    wanted = _needed(body, makers)
    kept = [op for op in operations if _constant(op) and op.outputs[0].name in wanted] + body
    types = {out.name: out for op in operations for out in op.outputs}
    inputs = [each for each in function.inputs if each.name in wanted]
    if part == 1:
        block.outputs[:] = list(cut.crossing)
    else:
        inputs = [types[name] for name in cut.crossing] + inputs
    inputs = [type(each).FromString(each.SerializeToString()) for each in inputs]
    kept = [type(op).FromString(op.SerializeToString()) for op in kept]
    del function.inputs[:]
    function.inputs.extend(inputs)
    del block.operations[:]
    block.operations.extend(kept)


def _constant(op: Any) -> bool:
    return bool(op.type == "const" or op.type.startswith("constexpr_"))


def _needed(body: Sequence[Any], makers: dict[str, Any]) -> set[str]:
    """Every name that these operations read, through the constant expressions that make them."""
    wanted: set[str] = set()
    ends = list(body)
    while ends:
        op = ends.pop()
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.name and binding.name not in wanted:
                    wanted.add(binding.name)
                    maker = makers.get(binding.name)
                    if maker is not None and _constant(maker):
                        ends.append(maker)
    return wanted
