"""Names that people give models: 'reference' is the pipeline in the package; diffusers is given anything else."""

from __future__ import annotations

from pathlib import Path

from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import extra

REFERENCE = "reference"


def resolve(model: str) -> str:
    """The path or hub id behind a name."""
    if model != REFERENCE:
        if model.startswith((".", "~")) and not Path(model).expanduser().exists():
            raise RequestError("no such model", got=model, expected="'reference', a hub id, or a path that exists")
        return str(Path(model).expanduser()) if model.startswith("~") else model
    with extra("compress", "the reference pipeline"):
        from latentrelay.reference.pipeline import reference_path
    return str(reference_path())


def default_guidance(model: str) -> float:
    """The guidance scale a model is used with unless told otherwise."""
    if model != REFERENCE:
        return 7.5
    with extra("compress", "the reference pipeline"):
        from latentrelay.reference.pipeline import GUIDANCE
    return GUIDANCE
