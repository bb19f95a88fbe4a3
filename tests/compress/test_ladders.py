"""Ladders: rows by hand, exact on polynomials, aliasing, poisoned rungs, and how many rows and full calls there are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.ladders import LadderSpec, ladder_rows, log_snr, push
from latentrelay.compress.solver_tables import SolverRow, SolverTable

FULL, PREDICTED = "full", "predicted"


def predict(values: Sequence[float], mask: Sequence[str], spec: LadderSpec, axis: Any = None) -> list[list[float]]:
    """Every predicted step's candidates, in the mask's order, for a stream of one number a step."""
    axis = np.arange(len(mask), dtype=np.float64) if axis is None else axis
    update, candidates = ladder_rows(mask, 0, len(mask), spec, axis)
    ladder = np.full((spec.rungs, 1), np.nan, dtype=np.float32)  # what was there before must not matter
    found = []
    for step, kind in enumerate(mask):
        if kind == FULL:
            ladder = push(ladder, np.array([values[step]], np.float32), update[step])
        else:
            found.append([float(row @ ladder[:, 0]) for row in candidates[step]])
    return found


def test_a_ladder_by_hand() -> None:
    mask = (FULL, PREDICTED, FULL, PREDICTED)
    update, candidates = ladder_rows(mask, 0, 4, LadderSpec((1,)), np.arange(4.0))
    assert update[0].tolist() == [[1, 0, 0], [0, 0, 0]]  # the first computed step fills rung 0 and reads nothing
    assert update[2].tolist() == [[1, 0, 0], [0.5, -0.5, 0]]  # (y - L0) / 2
    assert candidates[1].tolist() == [[1, 0]]  # order 1 is not there yet
    assert candidates[3].tolist() == [[1, 1]]
    assert not update[[1, 3]].any()
    assert not candidates[[0, 2]].any()


def test_a_split_has_rows_from_its_own_steps_only() -> None:
    update, candidates = ladder_rows((FULL, PREDICTED, FULL), 2, 5, LadderSpec((0,)), np.arange(5.0))
    assert np.flatnonzero(update.any(axis=(1, 2))).tolist() == [2, 4]
    assert np.flatnonzero(candidates.any(axis=(1, 2))).tolist() == [3]


@pytest.mark.parametrize("kind", ["backward", "newton"])
def test_order_1_is_exact_on_a_line(kind: Any) -> None:
    mask = (FULL, PREDICTED, FULL, PREDICTED, PREDICTED, FULL, PREDICTED)
    axis = np.array([0.0, 1.0, 1.5, 4.0, 4.5, 7.0, 7.25])
    found = predict(3.0 - 2.0 * axis, mask, LadderSpec((1,), kind=kind), axis)
    assert np.allclose(np.ravel(found[1:]), (3.0 - 2.0 * axis)[[3, 4, 6]], atol=1e-5)
    assert found[0] == [3.0]


def test_order_2_is_exact_on_a_parabola_only_by_newton() -> None:
    mask = (FULL, FULL, FULL, PREDICTED, PREDICTED)
    values = [1.0 + 2.0 * step - 3.0 * step**2 for step in range(5)]
    assert np.allclose(predict(values, mask, LadderSpec((2,), kind="newton")), [[values[3]], [values[4]]], atol=1e-3)
    taylor = np.ravel(predict(values, mask, LadderSpec((2,))))
    assert np.abs(taylor - values[3:]).min() > 1.0


def test_newton_passes_through_older_anchors_of_mixed_gaps() -> None:
    mask = (FULL, FULL, PREDICTED, PREDICTED, FULL, PREDICTED)
    values = [float(step**2) for step in range(6)]
    assert np.allclose(predict(values, mask, LadderSpec((2,), kind="newton"))[-1], [25.0], atol=1e-3)


@pytest.mark.parametrize(("since", "rows"), [(1, 9), (2, 9), (3, 9), (4, 9), (5, 11), (7, 11)])
def test_distinct_rows_of_three_orders_and_a_horizon_of_4(since: int, rows: int) -> None:
    mask = (FULL,) * 3 + (PREDICTED,) * since
    _, candidates = ladder_rows(mask, 0, len(mask), LadderSpec((0, 1, 2), horizon=4), np.arange(float(len(mask))))
    assert len(np.unique(candidates[-1], axis=0)) == rows
    assert candidates[-1].tolist() == sorted(candidates[-1].tolist())


def test_clipping_leaves_out_positions_before_the_last_computed_step() -> None:
    mask = (FULL,) * 2 + (PREDICTED,)
    _, candidates = ladder_rows(mask, 0, 3, LadderSpec((1,), horizon=4, clip_horizon=True), np.arange(3.0))
    assert candidates[2].tolist() == [[1, 0], [1, 1]]  # positions 1 (the computed step itself) and 2


def test_one_order_without_a_horizon_is_plain_taylor() -> None:
    mask = (FULL, FULL, PREDICTED, FULL, PREDICTED, PREDICTED)
    values = np.array([2.0, 3.0, 0.0, 7.0, 0.0, 0.0])
    d1, d2 = (7.0 - 3.0) / 2, ((7.0 - 3.0) / 2 - (3.0 - 2.0)) / 2  # divided by the latest gap, as TaylorSeer does
    found = predict(values, mask, LadderSpec((2,)))
    assert found[0] == [4.0]  # order 1: two anchors so far
    assert np.allclose(np.ravel(found[1:]), [7 + d1 + d2 / 2, 7 + 2 * d1 + 2 * d2])


def test_push_keeps_nothing_of_what_it_was_given() -> None:
    ladder, y = np.zeros((2, 3), np.float32), np.ones(3, np.float32)
    update = np.array([[1.0, 0.0, 0.0], [0.5, -0.5, 0.0]])
    pushed = push(ladder, y, update)
    y[:], ladder[:] = 9.0, 9.0
    assert pushed.tolist() == [[1, 1, 1], [0.5, 0.5, 0.5]]
    assert push(ladder.astype(np.float16), y, update).dtype == np.float16


def test_log_snr_of_a_variance_preserving_step() -> None:
    alpha, sigma = 0.6, 0.8
    epsilon = SolverTable((SolverRow(1, 1, 0, 0, 1 / alpha, -sigma / alpha, 1),), (1,), 1.0)
    v = SolverTable((SolverRow(1, 1, 0, 0, alpha, -sigma, 1),), (1,), 1.0)
    karras = sigma / alpha  # Euler's own scale: x = x0 + karras noise
    euler = SolverTable((SolverRow(1, 1, 0, 0, alpha**2, -alpha * karras, alpha),), (1,), 1.0)
    expected = 2 * np.log(alpha / sigma)
    assert np.allclose([log_snr(epsilon, "epsilon")[0], log_snr(v, "v_prediction")[0]], expected)
    assert np.allclose(log_snr(euler, "v_prediction")[0], expected)
    with pytest.raises(PredictionError, match="Use steps"):
        log_snr(SolverTable((SolverRow(1, 1, 0, 0, 0.0, -1.0, 1),), (1,), 1.0), "v_prediction")


@pytest.mark.parametrize(
    ("mask", "axis", "words"),
    [
        ((PREDICTED, FULL), [0.0, 1.0], "first step full"),
        ((FULL,), [0.0, 1.0], "mask of split"),
        ((FULL, "skipped"), [0.0, 1.0], "full | predicted"),
        ((FULL, PREDICTED), [0.0, 0.0], "monotone"),
    ],
)
def test_masks_and_axes_that_do_not_fit_are_named(mask: Any, axis: Any, words: str) -> None:
    with pytest.raises(PredictionError, match=words.replace("|", r"\|")):
        ladder_rows(mask, 0, 2, LadderSpec((1,)), np.array(axis))


@pytest.mark.parametrize("settings", [((),), ((1, 0),), ((3,),), ((1,), "sigma"), ((1,), "step", "taylor")])
def test_settings_out_of_range_are_named(settings: Any) -> None:
    with pytest.raises(PredictionError):
        LadderSpec(*settings)


@pytest.mark.parametrize(("interval", "full_calls"), [(4, 14), (6, 10), (8, 8)])
def test_full_calls_of_a_fixed_interval_after_three_warm_up_steps(interval: int, full_calls: int) -> None:
    mask = [FULL if step < 3 or (step - 2) % interval == 0 else PREDICTED for step in range(50)]
    update, candidates = ladder_rows(mask, 0, 50, LadderSpec((0, 1, 2)), np.arange(50.0))
    assert int(update.any(axis=(1, 2)).sum()) == full_calls
    assert int(candidates.any(axis=(1, 2)).sum()) == 50 - full_calls
