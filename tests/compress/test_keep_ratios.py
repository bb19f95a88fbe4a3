"""Keep-ratios: the greedy choice against all choices by hand, ceilings, refusals, and the uniform rival."""

from __future__ import annotations

import itertools

import pytest
from latentrelay.compress.keep_ratios import (
    BudgetError,
    expected_loss,
    saved_parameters,
    sensitive_widths,
    uniform_widths,
)
from latentrelay.compress.prunable_units import PrunableUnit

UNITS = (
    PrunableUnit("a", "resnet", 32, 8, 8, 10),
    PrunableUnit("b", "self_attention", 4, 1, 1, 80),
    PrunableUnit("c", "feed_forward", 64, 16, 16, 5),
)
SCORES = {"a": 4.0, "b": 0.5, "c": 1.0}
ALL = 32 * 10 + 4 * 80 + 64 * 5


def loss_of(widths: dict[str, int]) -> float:
    return sum(expected_loss(unit, SCORES[unit.path], widths[unit.path]) for unit in UNITS)


def test_expected_loss_passes_through_the_score() -> None:
    assert expected_loss(UNITS[0], 4.0, 32) == 0
    assert expected_loss(UNITS[0], 4.0, 16) == 4.0
    assert expected_loss(UNITS[0], 4.0, 8) == 9.0  # (0.75 / 0.5) ^ 2 * 4


@pytest.mark.parametrize("ceiling", range(300, ALL + 1, 60))
def test_no_choice_of_widths_loses_less(ceiling: int) -> None:
    grids = [range(unit.minimum, unit.width + 1, unit.granularity) for unit in UNITS]
    possible = [
        loss_of(dict(zip("abc", widths, strict=True)))
        for widths in itertools.product(*grids)
        if ALL - saved_parameters(UNITS, dict(zip("abc", widths, strict=True))) <= ceiling
    ]
    chosen = sensitive_widths(UNITS, SCORES, ALL, ceiling)
    assert ALL - saved_parameters(UNITS, chosen) <= ceiling
    assert loss_of(chosen) == pytest.approx(min(possible))


def test_uniform_keeps_one_ratio_and_the_same_ceiling() -> None:
    widths = uniform_widths(UNITS, ALL, ALL // 2)
    assert widths == {"a": 16, "b": 2, "c": 32}
    assert uniform_widths(UNITS, ALL, ALL) == {"a": 32, "b": 4, "c": 64}


def test_units_that_must_not_be_touched_stay() -> None:
    widths = sensitive_widths(UNITS, {**SCORES, "a": float("inf")}, ALL, 500)
    assert widths["a"] == 32


def test_what_cannot_be_met_is_refused_with_the_closest() -> None:
    least = 8 * 10 + 80 + 16 * 5
    for choose in (lambda: sensitive_widths(UNITS, SCORES, ALL, 100), lambda: uniform_widths(UNITS, ALL, 100)):
        with pytest.raises(BudgetError, match=f"at least {least}") as caught:
            choose()
        assert caught.value.closest == least
        assert caught.value.exit_status == 3
    assert sensitive_widths(UNITS, SCORES, ALL, least) == {"a": 8, "b": 1, "c": 16}
