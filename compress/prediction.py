"""What one split's run predicts and how: its mask, ladder and candidate rows, rectifier and grid, checked together.

Made by the planner from fits (prediction_gate.py) or read out of a plan; `predicted_chain.py` runs it in NumPy and the
step graphs hold the same rows as tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.plan import Level, Plan
from latentrelay.compress.plan_prediction import mask_rows
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.token_selection import Choice
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Target = Literal["whole_output", "deep_feature"]
TARGETS: tuple[Target, ...] = ("whole_output", "deep_feature")


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one split's run predicts and how; tables by step of the whole run, float64.

    `mask` of steps split..N-1; `update` (N, M1, 1 + M1) and `candidates` (N, P, M1) as ladders.py makes them; `metric`
    None where P is 1 ("random" is a control: any row, drawn by step); the rectifier's `gain`, `offset` (N, 2, C) and
    `mixing` (N, 2, 3 + 2 M, C), all or none; `grid` an adjusted grid in the place of the run's own; a step whose
    `probe_error` is above `fallback_threshold` is computed after all, with no rectifier and without touching the
    ladders. `level` "hot": one of fewer computed steps beside the split's normal one. Raises PredictionError where they
    contradict each other.
    """

    split: int
    mask: tuple[str, ...]
    target: Target
    update: Doubles
    candidates: Doubles
    metric: Choice | None = None
    gain: Doubles | None = None
    offset: Doubles | None = None
    mixing: Doubles | None = None
    grid: SolverTable | None = None
    ladder_dtype: Literal["float32", "float16"] = "float32"
    fallback_threshold: float | None = None
    level: Level = "normal"

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of_plan(cls, plan: Plan, split: int, level: Level = "normal") -> Prediction | None:
        """A plan's for one of its splits; None where that split has no predicted step at that level. PredictionError
        where the plan has no such split."""
        masks = {(each.split, each.level): tuple(each.mask) for each in plan.recipe.splits}
        if not any(known == split for known, _ in masks):
            raise PredictionError("no such split in the plan", got=split, expected=sorted({key[0] for key in masks}))
        mask = masks.get((split, level), ())
        if "predicted" not in mask:
            return None
        settings, tables = plan.recipe.prediction, plan.tables
        row = mask_rows(settings)[split, level]
        if tables.ladder_update is None or tables.candidates is None:
            raise PredictionError(f"split {split} predicts steps", got="no ladders", expected="their tables")
        grid = None
        if tables.grid_solver is not None and tables.grid_timesteps is not None:
            rows = tuple(SolverRow(*(float(value) for value in each)) for each in tables.grid_solver[row])
            timesteps = tuple(float(value) for value in tables.grid_timesteps[row])
            grid = SolverTable(rows, timesteps, plan.recipe.init_noise_sigma)
        rectifier = (tables.rectifier_gain, tables.rectifier_offset, tables.rectifier_mixing)
        gain, offset, mixing = (None if table is None else table[row] for table in rectifier)
        return cls(
            split,
            mask,
            settings["target"],
            tables.ladder_update[row],
            tables.candidates[row],
            settings.get("metric"),
            gain,
            offset,
            mixing,
            grid,
            settings.get("ladder_dtype", "float32"),
            settings.get("fallback_threshold"),
            level,
        )

    @property
    def rungs(self) -> int:
        """M + 1."""
        return int(self.update.shape[1])

    @property
    def selects(self) -> bool:
        """Whether tokens choose among rows."""
        return int(self.candidates.shape[1]) > 1

    def kind(self, step: int) -> str:
        """ "full" or "predicted"."""
        return self.mask[step - self.split]


def _check(prediction: Prediction) -> None:
    if prediction.target not in TARGETS:
        raise PredictionError("unknown target", got=prediction.target, expected=" | ".join(TARGETS))
    num_steps, rungs = len(prediction.update), prediction.rungs
    if len(prediction.mask) != num_steps - prediction.split or (prediction.mask and prediction.mask[0] != "full"):
        raise PredictionError("mask", got=prediction.mask, expected="N - split steps, the first one full")
    shapes = prediction.update.shape[2], prediction.candidates.shape[0], prediction.candidates.shape[2]
    if shapes != (1 + rungs, num_steps, rungs):
        raise PredictionError("ladder tables", got=shapes, expected=(1 + rungs, num_steps, rungs))
    if prediction.selects and prediction.metric is None:
        raise PredictionError("tokens choose among rows", got="no metric", expected="l2 | cosine")
    tables = (prediction.gain, prediction.offset, prediction.mixing)
    if any(table is None for table in tables) != all(table is None for table in tables):
        raise PredictionError("the rectifier's tables belong together", got="some of them", expected="all or none")
