"""Names that people give models: 'reference' is the pipeline in the package, 'reference-few-step' the same with its
consistency adapters merged; diffusers is given anything else. Adapters of the user's own are merged after those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import extra

if TYPE_CHECKING:
    from latentrelay.compress.lora import Adapter

REFERENCE = "reference"
FEW_STEP = "reference-few-step"
FEW_STEP_STUDENT = "phone-mid"  # the released student that has consistency adapters of its own
OURS = (REFERENCE, FEW_STEP)
_TEACHER_ADAPTERS = "teacher_lora.safetensors"


def resolve(model: str) -> str:
    """The path or hub id behind a name; what else belongs to it, `adapters` says."""
    if model not in OURS:
        if model.startswith((".", "~")) and not Path(model).expanduser().exists():
            raise RequestError(
                "no such model", got=model, expected=f"{', '.join(map(repr, OURS))}, a hub id, or a path that exists"
            )
        return str(Path(model).expanduser()) if model.startswith("~") else model
    with extra("compress", "the reference pipeline"):
        from latentrelay.reference.pipeline import reference_path
    return str(reference_path())


def public_name(model: str) -> str | None:
    """What a bundle calls the model; None where its own path or hub id says it."""
    return model if model in OURS else None


def default_guidance(model: str) -> float:
    """The guidance scale a model is used with unless told otherwise; 1 where guidance is in the network."""
    if model not in OURS:
        return 7.5
    with extra("compress", "the reference pipeline"):
        from latentrelay.reference.pipeline import GUIDANCE
    return GUIDANCE if model == REFERENCE else 1.0


def adapters(model: str, loras: Sequence[str] = ()) -> tuple[Adapter, ...]:
    """The adapters to merge into a model: its own, then `loras`, each "FILE" or "FILE:SCALE"."""
    if not loras and model != FEW_STEP:
        return ()
    with extra("cloud", "merging adapters"):
        from latentrelay.compress.lora import Adapter
    own = (Adapter(few_step_adapters()),) if model == FEW_STEP else ()
    return (*own, *(Adapter.parse(text) for text in loras))


def few_step_adapters(student: str | None = None) -> Path:
    """The shipped consistency adapters of the reference's teacher, or of the released student of that name."""
    name = _TEACHER_ADAPTERS if student is None else f"{student}_lora.safetensors"
    folder = Path(resolve(REFERENCE)) / "few_step"
    if not (folder / name).is_file():
        known = sorted(path.name.removesuffix("_lora.safetensors") for path in folder.glob("*_lora.safetensors"))
        raise RequestError("no few-step adapters are shipped for it", got=student or "teacher", expected=known)
    return folder / name


def merging(model: str, loras: Sequence[str] = ()) -> Callable[[Any], object] | None:
    """A function that merges `adapters` into a pipeline in place; None where there is nothing to merge."""
    wanted = adapters(model, loras)
    if not wanted:
        return None
    from latentrelay.compress.lora import merge

    return partial(merge, adapters=wanted)
