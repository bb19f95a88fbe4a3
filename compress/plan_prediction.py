"""What a plan says about predicted steps, checked: masks, rows of the mask-dependent tables, shapes.

In: a `Plan`. Raises PlanError where masks, `recipe.prediction` and the tables contradict each other. See
`compress/plan.py` for the tables' shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from latentrelay.compress.errors import PlanError
from latentrelay.compress.solver_tables import SolverRow
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentrelay.compress.plan import Level, Plan, Recipe, SplitMask, Tables

    MaskKey = tuple[int, Level]  # split and level

NORMAL, HOT = "normal", "hot"
LEVELS = (NORMAL, HOT)
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


def mask_name(split: int, level: str) -> str:
    """ "8" for a split's normal mask, "8 hot" for its hot one, as `Recipe.prediction` names its rows."""
    return str(split) if level == NORMAL else f"{split} {level}"


def mask_key(name: str) -> MaskKey:
    """Split and level of a name. Raises PlanError."""
    split, _, level = name.partition(" ")
    if not split.isdecimal() or (level or NORMAL) not in LEVELS:
        raise PlanError(f'recipe.prediction.rows: got {name!r}, expected a split as "8" or "8 hot"')
    return int(split), cast("Level", level or NORMAL)


def mask_rows(prediction: Mapping[str, Any]) -> dict[MaskKey, int]:
    """{(split, level): row of the mask-dependent tables} by row, empty where nothing is predicted."""
    found = {mask_key(name): int(row) for name, row in prediction.get("rows", {}).items()}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def in_order(keys: Iterable[MaskKey]) -> list[MaskKey]:
    """The normal level's splits first, then the hot one's."""
    return sorted(keys, key=lambda key: (LEVELS.index(key[1]), key[0]))


def with_masks(splits: Sequence[SplitMask], masks: Mapping[MaskKey, tuple[Any, ...]]) -> tuple[SplitMask, ...]:
    """A recipe's splits with `masks` in the place of their own, and the hot ones after them."""
    normal = [replace(each, mask=masks.get((each.split, each.level), each.mask)) for each in splits]
    had = {(each.split, each.level) for each in splits}
    added = [replace(splits[0], split=key[0], mask=masks[key], level=key[1]) for key in in_order(set(masks) - had)]
    return (*normal, *added)


def check_prediction(plan: Plan) -> None:
    """Raise PlanError where the plan's predicted steps do not fit together."""
    recipe, tables = plan.recipe, plan.tables
    given = {name: getattr(tables, name) for name in _NAMES if getattr(tables, name) is not None}
    masked = {(split.split, split.level) for split in recipe.splits if "predicted" in split.mask}
    _check_masks(recipe)
    if not recipe.prediction:
        if masked:
            raise PlanError(f"recipe.splits: split {min(masked)[0]} predicts steps, but recipe.prediction is empty")
        if given:
            raise PlanError(f"tables.{next(iter(given))} belongs to predicted steps, but recipe.prediction is empty")
        return
    _check_settings(recipe)
    rows = mask_rows(recipe.prediction)
    if set(rows) != masked or sorted(rows.values()) != list(range(1, len(rows) + 1)):
        wanted = ", ".join(mask_name(*key) for key in in_order(masked))
        raise PlanError(
            f"recipe.prediction.rows: got {dict(recipe.prediction['rows'])}, expected rows 1..{len(masked)} for the "
            f"splits {wanted}"
        )
    _check_tables(recipe, tables, given, 1 + len(rows))


def _check_masks(recipe: Recipe) -> None:
    """Each split once a level, its first step computed, and a hot mask with fewer computed steps than the normal."""
    found: dict[MaskKey, tuple[str, ...]] = {}
    for each in recipe.splits:
        if each.level not in LEVELS:
            raise PlanError(f"recipe.splits: split {each.split} has level {each.level!r}, expected one of {LEVELS}")
        if (each.split, each.level) in found:
            raise PlanError(f"recipe.splits: split {mask_name(each.split, each.level)} is there twice, expected once")
        if "predicted" in each.mask[:1]:
            raise PlanError(f"recipe.splits: split {each.split} predicts its first step, which has no ladder yet")
        found[each.split, each.level] = each.mask
    for (split, level), mask in found.items():
        most = found.get((split, "normal"), ("full",) * len(mask)).count("full")
        if level == HOT and mask.count("full") >= most:
            raise PlanError(
                f"recipe.splits: split {split} hot computes {mask.count('full')} steps, expected fewer than the {most} "
                "of its normal run"
            )


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
