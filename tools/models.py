"""Names that people give models: 'reference' is the pipeline in the package; diffusers is given anything else."""

from __future__ import annotations

from latentrelay.tools.console import extra

REFERENCE = "reference"


def resolve(model: str) -> str:
    """The path or hub id behind a name."""
    if model != REFERENCE:
        return model
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
