"""Mask policies of a planner, from recorded runs: evenly, and by search on the error matrix of what is predicted.

In: recorded runs and the deployed network. Out: named policies (see prediction_candidates.Policy). The whole output's
matrix is read off the recording; the deep feature's takes one call a step of a few runs, made when it is first asked
for. Steps are weighted by how far an error of theirs moves the final latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice

import numpy as np
from latentrelay.compress.error_matrix import ErrorMatrix, deep_features, error_matrix
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.predicted_chain import StagedDenoiser
from latentrelay.compress.prediction import Target
from latentrelay.compress.prediction_candidates import Policy, uniform
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.step_schedule import MAX_RUN, mask_by_budget, optimal_mask, step_weights
from latentrelay.compress.trajectory import Trajectory

PROFILED_RUNS = 16  # of the deep feature, whose matrix costs calls


def mask_policies(runs: Iterable[Trajectory], staged: StagedDenoiser, table: SolverTable) -> Mapping[str, Policy]:
    """ "uniform"; "threshold", the threshold search with the budget's number of computed steps; "dp", the dynamic
    programme. Runs of predicted steps are capped at 3 where the budget allows that, else not at all."""
    num_steps = len(table.rows)

    @lru_cache
    def matrix(target: Target) -> ErrorMatrix:
        if target == "whole_output":
            return error_matrix(((run.split, run.noise_pred) for run in runs), num_steps, target)
        return error_matrix(deep_features(islice(runs, PROFILED_RUNS), staged), num_steps, target)

    @lru_cache
    def weights() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return step_weights(table, np.nan_to_num(matrix("whole_output").norms))

    def threshold(target: Target, first: int, last_excl: int, computed: int) -> tuple[str, ...]:
        def made(max_run: int | None) -> tuple[str, ...]:
            return mask_by_budget(matrix(target), first, last_excl, computed, max_run)

        try:
            return made(MAX_RUN)
        except ScheduleError:
            return made(None)

    def dp(target: Target, first: int, last_excl: int, computed: int) -> tuple[str, ...]:
        def made(max_run: int | None) -> tuple[str, ...]:
            return optimal_mask(matrix(target), first, last_excl, computed, weights(), max_run)

        try:
            return made(MAX_RUN)
        except ScheduleError:
            return made(None)

    return {"uniform": uniform, "threshold": threshold, "dp": dp}
