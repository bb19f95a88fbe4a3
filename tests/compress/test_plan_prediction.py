"""A plan with predicted steps goes to disk and back, and one that contradicts itself is refused by name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.errors import PlanError
from latentrelay.compress.plan import Plan, PlanSource, SplitMask, Tables, full_plan
from latentrelay.compress.plan_prediction import mask_rows
from latentrelay.compress.prediction import Prediction
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
    assert mask_rows(again.recipe.prediction) == {(SPLIT, "normal"): 1}


def hot_plan(mask: Any = ("full", "predicted", "predicted"), level: Any = "hot", **settings: Any) -> Plan:
    """With a second mask for the split, which reads row 2."""
    plan = predicted_plan()
    arrays = {name: np.concatenate([each, each[1:]]) for name, each in plan.tables.arrays().items() if each.ndim > 1}
    arrays["candidates"][2] *= 0.5
    rows = {"rows": {str(SPLIT): 1, f"{SPLIT} hot": 2}, **settings}
    recipe = dataclasses.replace(
        plan.recipe,
        splits=(*plan.recipe.splits, SplitMask(SPLIT, mask, level)),
        prediction={**plan.recipe.prediction, **rows},
    )
    return Plan(recipe, dataclasses.replace(plan.tables, **arrays))


def test_a_hot_mask_has_a_row_of_its_own(tmp_path: Path) -> None:
    hot_plan().save(tmp_path)
    again = Plan.load(tmp_path)
    assert mask_rows(again.recipe.prediction) == {(SPLIT, "normal"): 1, (SPLIT, "hot"): 2}
    normal, hot = Prediction.of_plan(again, SPLIT), Prediction.of_plan(again, SPLIT, "hot")
    assert normal is not None
    assert hot is not None
    assert (normal.level, normal.mask) == ("normal", ("full", "predicted", "full"))
    assert (hot.level, hot.mask) == ("hot", ("full", "predicted", "predicted"))
    assert (normal.candidates.max(), hot.candidates.max()) == (1.0, 0.5)
    assert Prediction.of_plan(again, 0, "hot") is None


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: hot_plan(("full", "predicted", "full")), "split 2 hot computes 2 steps, expected fewer than the 2"),
        (lambda: hot_plan(("predicted", "full", "predicted")), "predicts its first step"),
        (lambda: hot_plan(level="cold"), "level 'cold'"),
        (lambda: hot_plan(level="normal"), "split 2 is there twice"),
        (lambda: hot_plan(rows={str(SPLIT): 1}), r"for the splits 2, 2 hot"),
        (lambda: hot_plan(rows={str(SPLIT): 2, f"{SPLIT} hot": 2}), "expected rows 1..2"),
        (lambda: hot_plan(rows={str(SPLIT): 1, f"{SPLIT} cold": 2}), 'as "8" or "8 hot"'),
    ],
)
def test_a_hot_mask_that_does_not_fit_is_refused(made: Callable[[], Plan], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        made()


def test_a_plan_from_before_levels_is_read_as_normal(tmp_path: Path) -> None:
    plan = predicted_plan()
    plan.save(tmp_path)
    document = json.loads((tmp_path / "plan.json").read_text())
    for split in document["recipe"]["splits"]:
        del split["level"]
    (tmp_path / "plan.json").write_text(json.dumps({**document, "schema_version": "1.3"}))
    again = Plan.load(tmp_path)
    assert again.recipe == plan.recipe
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(PlanError, match="level is missing"):
        Plan.load(tmp_path)


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
