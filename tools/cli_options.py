"""Options that several subcommands share, and checks on what was given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="'reference', 'reference-few-step', a hub id, a folder or a .safetensors file."),
]
ProfileFolder = Annotated[Path | None, typer.Option("--profiles", help="A folder of your own device profiles.")]
Backend = Annotated[str | None, typer.Option(help="onnxruntime, openvino or coreml, in the place of the bundle's own.")]
NumSteps = Annotated[int, typer.Option("--num-steps", min=1, max=1000, help="N, the steps of the whole run.")]


def refuse(options: dict[str, Any], beside: str) -> None:
    """Options that would be ignored are misuse, not silence."""
    given = [name for name, value in options.items() if value]
    if given:
        raise typer.BadParameter(f"{', '.join(given)}: no use beside {beside}; leave out one or the other")


def whole(words: str | None, option: str, default: int) -> int:
    """A whole number given as text."""
    if words is None:
        return default
    if not (words.strip().isascii() and words.strip().isdecimal()):
        raise typer.BadParameter(f"{option} is {words!r}, expected one whole number here")
    return int(words)
