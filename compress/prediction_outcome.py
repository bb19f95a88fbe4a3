"""What a planner of predicted steps decided, in the plan's terms: tables by split row, masks, settings, evidence.

In: one `Prediction` a mask, that is a split and level that predicts anything. Out: arrays as `Tables` has them, row 0
neutral and one further row a mask, the normal level's first; the mapping that is `Recipe.prediction`. It decides
nothing; see prediction_gate.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.compress.plan import Evidence
from latentrelay.compress.plan_prediction import in_order, mask_name
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.prediction_candidates import Candidate
from latentrelay.compress.solver_tables import SolverTable
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentrelay.compress.plan_prediction import MaskKey

Doubles = NDArray[np.float64]
METRIC = "held-out error of the final latents over their peak at equal device time, 10^(-PSNR/20)"


@dataclass(frozen=True, eq=False)
class PredictionOutcome:
    """`predictions` by (split, level), those that predict nothing left out; the settings they share (None: nothing is
    predicted) and the probe's name; the run's own grid; evidence a part; `report` for people; `why` in a sentence."""

    predictions: Mapping[MaskKey, Prediction]
    settings: Candidate | None
    probe: str | None
    table: SolverTable
    evidence: tuple[Evidence, ...]
    report: Mapping[str, Any]
    why: str

    @property
    def rows(self) -> dict[MaskKey, int]:
        """Each mask's row of the tables, from 1: the normal level's splits, then the hot one's."""
        return {key: 1 + i for i, key in enumerate(in_order(self.predictions))}

    def masks(self) -> dict[MaskKey, tuple[str, ...]]:
        """By (split, level), in the order of their rows."""
        return {key: tuple(self.predictions[key].mask) for key in self.rows}

    def recipe(self) -> dict[str, Any]:
        """`Recipe.prediction`; empty where nothing is predicted."""
        if not self.predictions or self.settings is None:
            return {}
        spec, metric = self.settings.spec, self.settings.metric
        first = next(iter(self.predictions.values()))
        return {
            "target": self.settings.target,
            "probe": self.probe if metric is not None else None,
            "metric": metric,
            "orders": list(spec.orders),
            "horizon": spec.horizon,
            "abscissa": spec.abscissa,
            "ladder": spec.kind,
            "ladder_dtype": first.ladder_dtype,
            "rows": {mask_name(*key): row for key, row in self.rows.items()},
            "fallback_threshold": first.fallback_threshold,
            "report": dict(self.report),
        }

    def tables(self) -> dict[str, Doubles]:
        """The plan's arrays by name; the rectifier's and the grid's only where a mask has them."""
        each = [self.predictions[key] for key in self.rows]
        if not each:
            return {}
        width = max(prediction.candidates.shape[1] for prediction in each)
        tables = {
            "ladder_update": _stacked([prediction.update for prediction in each]),
            "candidates": _stacked([_widened(prediction.candidates, width) for prediction in each]),
        }
        fitted = next((prediction for prediction in each if prediction.gain is not None), None)
        if fitted is not None:
            for name in ("gain", "offset", "mixing"):
                empty = np.zeros_like(getattr(fitted, name))
                found = [getattr(prediction, name) for prediction in each]
                tables[f"rectifier_{name}"] = _stacked([empty if table is None else table for table in found])
        if any(prediction.grid is not None for prediction in each):
            grids = [self.table, *(prediction.grid or self.table for prediction in each)]
            tables["grid_solver"] = np.array([[astuple(row) for row in grid.rows] for grid in grids], np.float64)
            tables["grid_timesteps"] = np.array([grid.timesteps for grid in grids], np.float64)
        return tables


def relative_error(psnr_db: float) -> float:
    """Decibels as an error: root mean square over the peak; a run that stopped being numbers counts as 1e9."""
    return round(float(10 ** (-max(psnr_db, -180.0) / 20)), 6)


def _stacked(rows: list[Doubles]) -> Doubles:
    """With the neutral row 0."""
    return np.stack([np.zeros_like(rows[0]), *rows])


def _widened(candidates: Doubles, width: int) -> Doubles:
    """(N, P, M1) -> (N, width, M1), the last row repeated."""
    return candidates[:, np.minimum(np.arange(width), candidates.shape[1] - 1)]
