"""One network's part of a run as `prediction_profile` tells of it: error matrices, schedules, and the probes' ranks.

In: what the network gave along recorded runs, (first step, {name: (n, 2, ...)}) a run, "whole_output" as v. Out: plain
rows for the document and panels for the plots. The segment is `first` .. `last_excl` - 1, the device's or the cloud's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.compress.error_matrix import ErrorMatrix, error_matrix
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.prediction_plot import MatrixPanel
from latentrelay.compress.probe_fidelity import Fidelity, ProfiledRun, probe_fidelity
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.step_schedule import (
    MAX_RUN,
    Mask,
    mask_by_budget,
    mask_cost,
    optimal_mask,
    step_weights,
    uniform_mask,
)
from latentrelay.tools.profiled_network import RESULT, TARGETS, Streams
from numpy.typing import NDArray

ORDERS = (0, 1, 2)


@dataclass(frozen=True, eq=False)
class ProfiledSegment:
    """`matrices` by target (N, N); `weights` (N,) as `step_weights` makes them; `num_steps` N."""

    name: str
    place: str
    first: int
    last_excl: int
    num_steps: int
    matrices: Mapping[str, ErrorMatrix]
    weights: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        name: str,
        place: str,
        streams: Streams,
        guidance: float,
        solver: SolverTable,
        jacobian: NDArray[np.float64],
        segment: tuple[int, int],
    ) -> ProfiledSegment:
        """Of what a network gave along runs; `jacobian` (N,) as `fit_jacobian` measures it."""
        num_steps = len(solver.rows)
        matrices = {
            target: error_matrix(((first, found[target]) for first, found in streams), num_steps, f"{name}: {target}")
            for target in TARGETS
        }
        outputs = ((first, found[RESULT]) for first, found in streams)
        guided = ((first, q[:, :1] + np.float32(guidance) * (q[:, 1:] - q[:, :1])) for first, q in outputs)
        norms = error_matrix(guided, num_steps, branches=(0,)).norms
        weights = step_weights(solver, np.nan_to_num(norms), jacobian)
        return cls(name, place, *segment, num_steps, matrices, weights)

    def document(self, budgets: Iterable[int], rated: Mapping[int, Mapping[str, Sequence[Fidelity]]]) -> dict[str, Any]:
        """Plain rows; `rated` by horizon, as `fidelity` gives them."""
        return {
            "name": self.name,
            "segment": self.place,
            "steps": [self.first, self.last_excl - 1],
            "matrices": {target: matrix.to_json(4) for target, matrix in self.matrices.items()},
            "weights": [float(f"{weight:.4g}") for weight in self.weights[self.first : self.last_excl]],
            "schedules": list(self.schedules(budgets)),
            "fidelity": [
                {"target": target, "horizon": horizon, **row.to_json()}
                for horizon, found in rated.items()
                for target, every in found.items()
                for row in every
            ],
        }

    def schedules(self, budgets: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Per target and budget that the segment holds: the threshold search, the dynamic programme with and without
        weights, even steps. At most MAX_RUN predicted steps in a row, or one more than the budget needs."""
        first, last_excl, n = self.first, self.last_excl, self.last_excl - self.first
        for target, matrix in self.matrices.items():
            for computed in (each for each in budgets if 2 <= each <= n):
                cap = max(MAX_RUN, math.ceil((n - computed) / (computed - 1)) + 1)
                found = {
                    "threshold": mask_by_budget(matrix, first, last_excl, computed, cap),
                    "optimal": optimal_mask(matrix, first, last_excl, computed, self.weights, cap),
                    "unweighted": optimal_mask(matrix, first, last_excl, computed, None, cap),
                    "even": uniform_mask(first, last_excl, computed),
                }
                for kind, mask in found.items():
                    steps = [step for step, each in enumerate(mask, start=first) if each == "full"]
                    cost = float(f"{mask_cost(matrix, first, mask, self.weights):.4g}")
                    row = {"target": target, "kind": kind, "computed": len(steps), "max_run": cap, "steps": steps}
                    yield {**row, "cost": cost}

    def mask(self, target: str, computed: int) -> Mask:
        """The dynamic programme's, of a shorter segment with every step computed."""
        most = min(computed, self.last_excl - self.first)
        return optimal_mask(self.matrices[target], self.first, self.last_excl, most, self.weights, None)

    def panel(self, target: str, computed: int) -> MatrixPanel:
        """A heat map with that mask."""
        where = "in the cloud" if self.place == "cloud" else "on the device"
        title = f"{self.name} {where}: {target.replace('_', ' ')}"
        return MatrixPanel(title, self.matrices[target], self.first, self.mask(target, computed))

    def fidelity(
        self, streams: Streams, probes: Sequence[str], computed: int, horizon: int
    ) -> dict[str, list[Fidelity]]:
        """By target: every probe and metric, with orders 0 to 2 and the dynamic programme's mask."""
        found = {}
        for target in TARGETS:
            mask = self.mask(target, computed)
            axis = np.arange(self.num_steps, dtype=np.float64)
            update, rows = ladder_rows(mask, self.first, self.num_steps, LadderSpec(ORDERS, horizon=horizon), axis)
            runs = (ProfiledRun(first, each[target], {name: each[name] for name in probes}) for first, each in streams)
            found[target] = probe_fidelity(runs, mask, self.first, update, rows, probes)
        return found
