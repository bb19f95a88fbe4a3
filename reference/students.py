"""The released students of the reference: how large each class's is, how they were distilled, and where they lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentrelay.compress.training import Recipe
from latentrelay.reference.pipeline import reference_path

# Parameters at most; the three that are released share 12 MiB of float16. Other classes take the nearest one.
CLASS_PARAMETERS = {
    "phone-high": 3_100_000,
    "phone-mid": 2_100_000,
    "phone-low": 1_000_000,
    "tablet": 3_100_000,
    "pi": 1_000_000,
    "desktop": 3_100_000,
}
# How they were distilled; `LOSSES` are the weights of task, output and feature loss and the share of empty prompts. The
# two larger ones keep both layers of every block and are near the teacher before any training; `pi` starts far from it.
_RECIPE = Recipe(
    steps=400, batch=32, learning_rate=4e-4, warmup=50, decay=0.7, ema_decay=0.99, checkpoint_every=100, seed=3
)
DISTILLATION = {
    "phone-high": replace(_RECIPE, steps=300),
    "phone-mid": _RECIPE,
    "pi": replace(_RECIPE, steps=1000, learning_rate=7e-4),
}
LOSSES = (0.1, 1.0, 0.1, 0.25)
RELEASED_FOR = {
    "phone-high": "phone-high",
    "phone-mid": "phone-mid",
    "phone-low": "pi",
    "tablet": "phone-high",
    "pi": "pi",
    "desktop": "phone-high",
}


def distillation_of(student_class: str | None) -> Recipe:
    """The recipe of the student released for a profile's class; the middle one where no profile is given."""
    return DISTILLATION[RELEASED_FOR[student_class]] if student_class is not None else _RECIPE


def student_path(student_class: str) -> Path:
    """The folder of the student released for a profile's class. Raises FileNotFoundError where it was not installed."""
    path = reference_path() / "students" / RELEASED_FOR[student_class]
    if not (path / "unet" / "config.json").is_file():
        raise FileNotFoundError(f"no released student in {path}; make one with `latentrelay compress`")
    return path
