"""A plan with predicted steps goes to disk and back, and one that contradicts itself is refused by name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.errors import PlanError
from latentrelay.compress.plan import Plan, PlanSource, SplitMask, Tables, full_plan
from latentrelay.compress.plan_prediction import split_rows
from latentrelay.compress.solver_tables import SolverRow, SolverTable

STEPS, SPLIT, CHANNELS = 5, 2, 4
SETTINGS: dict[str, Any] = {
    "target": "whole_output",
    "probe": None,
    "metric": None,
    "orders": [1],
    "horizon": 0,
    "abscissa": "step",
    "ladder": "backward",
    "ladder_dtype": "float32",
    "rows": {str(SPLIT): 1},
    "fallback_threshold": None,
    "report": {},
}


def predicted_plan() -> Plan:
    row = SolverRow(a=1.0, b=-0.1, c=0.0, n=0.0, p=1.0, q=-1.0, s=1.0)
    table = SolverTable((row,) * STEPS, tuple(range(STEPS, 0, -1)), 1.0)
    plain = full_plan(PlanSource("m", "sha256:0", "sd1"), {}, "ddim", "DDIMScheduler", "sha256:1", table)
    splits = tuple(
        SplitMask(each.split, ("full", "predicted", "full")) if each.split == SPLIT else each
        for each in plain.recipe.splits
    )
    update, candidates = np.zeros((2, STEPS, 2, 3)), np.zeros((2, STEPS, 1, 2))
    update[1, SPLIT, 0, 0], candidates[1, SPLIT + 1, 0, 0] = 1.0, 1.0
    gain = np.zeros((2, STEPS, 2, CHANNELS))
    tables = dataclasses.replace(
        plain.tables,
        ladder_update=update,
        candidates=candidates,
        rectifier_gain=gain,
        rectifier_offset=gain.copy(),
        rectifier_mixing=np.zeros((2, STEPS, 2, 5, CHANNELS)),
    )
    return Plan(dataclasses.replace(plain.recipe, splits=splits, prediction=SETTINGS), tables)


def test_round_trip(tmp_path: Path) -> None:
    plan = predicted_plan()
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.tables == plan.tables
    assert again.recipe.prediction == SETTINGS
    assert split_rows(again.recipe.prediction) == {SPLIT: 1}


def with_settings(plan: Plan, **settings: Any) -> Plan:
    recipe = dataclasses.replace(plan.recipe, prediction={**plan.recipe.prediction, **settings})
    return dataclasses.replace(plan, recipe=recipe)


def with_tables(plan: Plan, **arrays: Any) -> Plan:
    return dataclasses.replace(plan, tables=dataclasses.replace(plan.tables, **arrays))


def with_mask(plan: Plan, *mask: Any) -> Plan:
    splits = tuple(SplitMask(SPLIT, mask) if each.split == SPLIT else each for each in plan.recipe.splits)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, splits=splits))


def nonzero_first_row(plan: Plan) -> Plan:
    update = np.ones((2, STEPS, 2, 3))
    return with_tables(plan, ladder_update=update)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda plan: with_settings(plan, target="all"), "prediction.target"),
        (lambda plan: with_settings(plan, extra=1), "prediction.extra"),
        (lambda plan: with_settings(plan, probe="P1"), "belong together"),
        (lambda plan: with_settings(plan, probe="P1", metric="l2"), "1 rows a step need no probe"),
        (lambda plan: with_settings(plan, rows={"3": 1}), "prediction.rows"),
        (lambda plan: with_settings(plan, rows={str(SPLIT): 2}), "prediction.rows"),
        (lambda plan: with_mask(plan, "predicted", "full", "full"), "predicts its first step"),
        (lambda plan: with_tables(plan, ladder_update=None), "need ladder_update"),
        (lambda plan: with_tables(plan, candidates=np.zeros((2, STEPS, 1, 3))), "tables.candidates"),
        (lambda plan: with_tables(plan, rectifier_mixing=None), "belong together"),
        (lambda plan: with_tables(plan, grid_solver=np.zeros((2, STEPS, 7))), "belong together"),
        (lambda plan: with_tables(plan, rectifier_gain=np.full((2, STEPS, 2, CHANNELS), np.nan)), "NaN or Inf"),
        (nonzero_first_row, "row 0"),
        (
            lambda plan: dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, prediction={})),
            "recipe.prediction is empty",
        ),
        (
            lambda plan: dataclasses.replace(plan, tables=Tables(plan.tables.guidance_multiplier)),
            "need ladder_update",
        ),
    ],
)
def test_contradictions_are_refused(broken: Callable[[Plan], Plan], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        broken(predicted_plan())
