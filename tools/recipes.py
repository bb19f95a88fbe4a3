"""Measured recipes: a rule for every layer, chosen by measurement, as JSON files.

`read_recipe` reads one; `shipped_recipe` finds the one that lies beside a released student, as
`recipes/<precision>.<kernels>.json`. Without one, a precision's plain rules hold (compress/precision.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.runtime.errors import RequestError


def read_recipe(path: Path) -> PrecisionRecipe:
    """A file with `precision`, `kernels` and `rules`, or with those under `recipe`. Raises RequestError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return PrecisionRecipe.from_json(document.get("recipe", document))
    except (OSError, ValueError, AttributeError, PrecisionError) as error:
        raise RequestError(
            f"the recipe cannot be read: {error}", got=str(path), expected="JSON with precision, kernels and rules"
        ) from error


def shipped_recipe(student: Path, precision: str, kernels: str) -> PrecisionRecipe | None:
    """The recipe in a student's folder for a precision on a kernel set, None where it has none."""
    path = student / "recipes" / f"{precision}.{kernels}.json"
    return read_recipe(path) if path.is_file() else None
