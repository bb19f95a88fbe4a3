"""Schedules by hand and against every mask there is: thresholds, budgets, the cap, the dynamic programme's optimum."""

import itertools
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from latentrelay.compress.error_matrix import ErrorMatrix
from latentrelay.compress.error_propagation import propagate
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.step_schedule import (
    mask_by_budget,
    mask_cost,
    optimal_mask,
    step_weights,
    threshold_mask,
    uniform_mask,
)

F, P = "full", "predicted"


def drifting(n: int, seed: int = 0) -> np.ndarray:
    """Errors that grow with the distance, faster where the path bends."""
    path = np.cumsum(np.random.default_rng(seed).uniform(0.05, 1.0, (n, 3)), axis=0)
    return np.abs(path[:, None] - path[None]).mean(2)


def allowed(n: int, max_run: int | None) -> list[tuple[str, ...]]:
    """Every mask with its ends computed and runs within the cap."""
    found = []
    for inner in itertools.product((F, P), repeat=n - 2):
        mask = (F, *inner, F)
        longest = max(len(run) for run in "".join("p" if each == P else " " for each in mask).split(" "))
        if max_run is None or longest <= max_run:
            found.append(mask)
    return found


def test_threshold_by_hand() -> None:
    errors = np.array([[0, 0.1, 0.3, 0.9, 1], [0, 0, 0.1, 0.2, 1], [0, 0, 0, 0.1, 0.4], [0, 0, 0, 0, 0.1], [0] * 5])
    assert threshold_mask(errors, 0, 5, 0.3) == (F, P, F, P, F)  # E[0, 2] is not below 0.3
    assert threshold_mask(errors, 0, 5, 0.31) == (F, P, P, F, F)
    assert threshold_mask(errors, 0, 5, 9.0) == (F, P, P, P, F)
    assert threshold_mask(errors, 0, 5, 9.0, max_run=1) == (F, P, F, P, F)
    assert threshold_mask(errors, 1, 5, 0.15) == (F, P, F, F)  # E[1, 3] = 0.2: step 3 is computed
    assert threshold_mask(errors, 2, 5, 9.0) == (F, P, F)


def test_a_limit_of_zero_predicts_nothing() -> None:
    assert threshold_mask(np.zeros((6, 6)), 0, 6, 0.0) == (F,) * 6


@pytest.mark.parametrize("max_run", [1, 2, 3, None])
def test_first_and_last_are_computed_and_runs_are_capped(max_run: int | None) -> None:
    for limit in (0.2, 0.7, 2.0, 99.0):
        mask = threshold_mask(drifting(14), 0, 14, limit, max_run)
        assert mask[0] == mask[-1] == F
        assert mask in allowed(14, max_run)


def test_a_segment_is_searched_as_if_it_stood_alone() -> None:
    errors = drifting(16, 3)
    own = errors[5:13, 5:13]
    assert threshold_mask(errors, 5, 13, 0.9) == threshold_mask(own, 0, 8, 0.9)
    assert mask_by_budget(errors, 5, 13, 5) == mask_by_budget(own, 0, 8, 5)
    weights = np.random.default_rng(1).uniform(0.1, 3, 16)
    assert optimal_mask(errors, 5, 13, 5, weights) == optimal_mask(own, 0, 8, 5, weights[5:13])
    matrix = ErrorMatrix("e", errors, np.ones(16), 1)
    assert optimal_mask(matrix, 5, 13, 5, weights) == optimal_mask(errors, 5, 13, 5, weights)


@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_reached(seed: int) -> None:
    errors = drifting(17, seed)
    for computed in range(5, 18):
        mask = mask_by_budget(errors, 0, 17, computed)
        assert computed - 1 <= mask.count(F) <= computed
        assert mask in {threshold_mask(errors, 0, 17, float(limit)) for limit in [0.0, *np.nextafter(errors, 9).flat]}
    assert mask_by_budget(errors, 0, 17, 17) == (F,) * 17


def test_a_budget_may_need_a_limit_above_every_error() -> None:
    assert mask_by_budget(np.array([[0, 5.0, 1], [0, 0, 1], [0, 0, 0]]), 0, 3, 2) == (F, P, F)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_run", [2, 3, None])
def test_the_dynamic_programme_finds_the_best_of_all_masks(seed: int, max_run: int | None) -> None:
    rng = np.random.default_rng(seed)
    errors, weights = rng.uniform(0, 1, (9, 9)), rng.uniform(0, 2, 9)
    for computed in (4, 5, 7, 9):
        mask = optimal_mask(errors, 0, 9, computed, weights, max_run)
        every = [each for each in allowed(9, max_run) if each.count(F) == computed]
        assert mask in every
        assert mask_cost(errors, 0, mask, weights) == pytest.approx(
            min(mask_cost(errors, 0, each, weights) for each in every)
        )


def test_cost_by_hand() -> None:
    errors = np.arange(25.0).reshape(5, 5)
    assert mask_cost(errors, 0, (F, P, P, F, F)) == errors[0, 1] + errors[0, 2]
    assert mask_cost(errors, 1, (F, P, F), [1, 1, 10, 1, 1]) == 10 * errors[1, 2]


def test_weights_move_computed_steps_to_where_errors_count() -> None:
    errors = np.abs(np.arange(9)[:, None] - np.arange(9)) * 1.0
    early = optimal_mask(errors, 0, 9, 4, np.array([9.0] * 4 + [1.0] * 5), None)
    late = optimal_mask(errors, 0, 9, 4, np.array([1.0] * 5 + [9.0] * 4), None)
    assert [i for i, each in enumerate(early) if each == F][1] < [i for i, each in enumerate(late) if each == F][1]


def test_uniform() -> None:
    assert uniform_mask(8, 25, 6) == tuple(F if step in (8, 11, 14, 18, 21, 24) else P for step in range(8, 25))
    assert uniform_mask(0, 3, 3) == (F, F, F)
    assert uniform_mask(0, 4, 1) == (F, P, P, P)
    for n, computed in itertools.product(range(1, 30), range(1, 30)):
        if computed <= n:
            assert uniform_mask(0, n, computed).count(F) == computed


@pytest.mark.parametrize(
    "call",
    [
        lambda e: optimal_mask(e, 0, 10, 2),  # eight predicted in a row
        lambda e: optimal_mask(e, 0, 10, 11),
        lambda e: optimal_mask(e, 0, 10, 5, np.ones(9)),
        lambda e: optimal_mask(e, 0, 10, 5, np.full(10, -1.0)),
        lambda e: mask_by_budget(e, 0, 10, 3),
        lambda e: uniform_mask(0, 10, 0),
        lambda e: threshold_mask(e, 4, 11, 0.5),
        lambda e: threshold_mask(e, 4, 4, 0.5),
        lambda e: threshold_mask(e[:, :5], 0, 5, 0.5),
    ],
)
def test_refused(call: Any) -> None:
    with pytest.raises(ScheduleError):
        call(drifting(10))


def test_unknown_errors_are_named() -> None:
    errors = drifting(8)
    errors[3, 5] = np.nan
    assert threshold_mask(errors, 4, 8, 1.0)[0] == F
    with pytest.raises(ScheduleError, match="step 3 at step 5"):
        optimal_mask(errors, 2, 8, 3)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_weights_are_what_a_relative_error_does_to_the_final_latents(scheduler: Any) -> None:
    clip = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    table = solver_table(scheduler(prediction_type="v_prediction", **clip), 7)
    norms, jacobian = np.linspace(0.5, 2.0, 7), np.linspace(-0.2, 0.3, 7)
    weights = step_weights(table, norms, jacobian)
    for step in range(7):
        errors = np.zeros(7)
        errors[step] = norms[step]  # as large as e itself
        assert abs(propagate(table, errors, jacobian)[-1]) == pytest.approx(weights[step])
    assert (step_weights(table, norms) == step_weights(table, norms, np.zeros(7))).all()
