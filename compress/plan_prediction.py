"""What a plan says about predicted steps, checked: masks, rows of the mask-dependent tables, shapes.

In: a `Plan`. Raises PlanError where masks, `recipe.prediction` and the tables contradict each other. See
`compress/plan.py` for the tables' shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.compress.errors import PlanError
from latentrelay.compress.solver_tables import SolverRow
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentrelay.compress.plan import Plan, Recipe, Tables

TARGETS = ("whole_output", "deep_feature")
METRICS = ("l2", "cosine")
LADDER_DTYPES = ("float32", "float16")
_KEYS = {
    "target", "probe", "metric", "orders", "horizon", "abscissa", "ladder", "ladder_dtype", "rows",
    "fallback_threshold", "report",
}  # fmt: skip
_NAMES = (
    "ladder_update", "candidates", "rectifier_gain", "rectifier_offset", "rectifier_mixing", "grid_solver",
    "grid_timesteps",
)  # fmt: skip


def split_rows(prediction: Mapping[str, Any]) -> dict[int, int]:
    """{split: row of the mask-dependent tables}, empty where nothing is predicted."""
    return {int(split): int(row) for split, row in prediction.get("rows", {}).items()}


def check_prediction(plan: Plan) -> None:
    """Raise PlanError where the plan's predicted steps do not fit together."""
    recipe, tables = plan.recipe, plan.tables
    given = {name: getattr(tables, name) for name in _NAMES if getattr(tables, name) is not None}
    masked = {split.split for split in recipe.splits if "predicted" in split.mask}
    if not recipe.prediction:
        if masked:
            raise PlanError(f"recipe.splits: split {min(masked)} predicts steps, but recipe.prediction is empty")
        if given:
            raise PlanError(f"tables.{next(iter(given))} belongs to predicted steps, but recipe.prediction is empty")
        return
    _check_settings(recipe)
    rows = split_rows(recipe.prediction)
    if set(rows) != masked or sorted(rows.values()) != list(range(1, len(rows) + 1)):
        raise PlanError(
            f"recipe.prediction.rows: got {rows}, expected rows 1..{len(masked)} for the splits {sorted(masked)}"
        )
    for split in recipe.splits:
        if "predicted" in split.mask[:1]:
            raise PlanError(f"recipe.splits: split {split.split} predicts its first step, which has no ladder yet")
    _check_tables(recipe, tables, given, 1 + len(rows))


def _check_settings(recipe: Recipe) -> None:
    prediction = recipe.prediction
    if set(prediction) != _KEYS:
        wrong = sorted(set(prediction) ^ _KEYS)[0]
        raise PlanError(
            f"recipe.prediction.{wrong} is unknown or missing, expected the keys {', '.join(sorted(_KEYS))}"
        )
    for key, allowed in (("target", TARGETS), ("metric", (None, *METRICS)), ("ladder_dtype", LADDER_DTYPES)):
        if prediction[key] not in allowed:
            raise PlanError(f"recipe.prediction.{key}: got {prediction[key]!r}, expected one of {allowed}")
    if (prediction["probe"] is None) != (prediction["metric"] is None):
        raise PlanError("recipe.prediction: probe and metric belong together, got one without the other")


def _check_tables(recipe: Recipe, tables: Tables, given: Mapping[str, NDArray[np.float64]], rows: int) -> None:
    update, candidates = tables.ladder_update, tables.candidates
    if update is None or candidates is None or update.ndim != 4 or candidates.ndim != 4:
        raise PlanError("tables: predicted steps need ladder_update (R,N,M,1+M) and candidates (R,N,P,M)")
    rungs, choices = update.shape[2], candidates.shape[2]
    head = (rows, recipe.num_steps)
    gain = tables.rectifier_gain
    channels = gain.shape[-1] if gain is not None and gain.ndim == 4 else 0
    expected: dict[str, tuple[int, ...]] = {
        "ladder_update": (*head, rungs, 1 + rungs),
        "candidates": (*head, choices, rungs),
        "rectifier_gain": (*head, 2, channels),
        "rectifier_offset": (*head, 2, channels),
        "rectifier_mixing": (*head, 2, 1 + 2 * rungs, channels),
        "grid_solver": (*head, len(dataclasses.fields(SolverRow))),
        "grid_timesteps": head,
    }
    for name, array in given.items():
        if array.dtype != np.float64 or array.shape != expected[name]:
            raise PlanError(f"tables.{name}: got {array.dtype} {array.shape}, expected float64 {expected[name]}")
        if not np.isfinite(array).all():
            raise PlanError(f"tables.{name} holds NaN or Inf, expected finite numbers. Fit the tables again.")
    for group in (("rectifier_gain", "rectifier_offset", "rectifier_mixing"), ("grid_solver", "grid_timesteps")):
        if 0 < sum(name in given for name in group) < len(group):
            raise PlanError(f"tables: {', '.join(group)} belong together, got some without the others")
    neutral = ("ladder_update", "candidates", "rectifier_gain", "rectifier_offset", "rectifier_mixing")
    for name in neutral:
        if name in given and given[name][0].any():
            raise PlanError(f"tables.{name}: row 0 is for runs without predicted steps, expected zeros there")
    if (choices > 1) != (recipe.prediction["metric"] is not None):
        raise PlanError(f"tables.candidates: {choices} rows a step need " + ("a probe" if choices > 1 else "no probe"))
