"""The choice among rows: by hand-made rows whose answer is plain."""

from __future__ import annotations

from typing import Any

import pytest
from latentrelay.tools.networks import NETWORKS
from latentrelay.tools.plan_choice import Goals, choose, frontier
from latentrelay.tools.plan_evidence import MEASURED, UNMEASURED, Quality
from latentrelay.tools.plan_rows import Mask, Option, Row
from latentrelay.tools.plan_times import DeviceTimes

TIMES = DeviceTimes(1.0, 1.0, 1.0, "given", "a test")
OPTION = Option("x", "x", "fp32", 4, "ddim", 1.0, None, True, (4, 2, 2), 8, (3.0,) * 4, False, TIMES, 1, (0,))


def row(total_s: float, cost: float, loss: float | None, width: float = 0.0) -> Row:
    """A row that takes so long, costs so much, and loses at most so much."""
    known = loss is not None
    interval = (-loss, -loss + width) if loss is not None else None
    quality = Quality(MEASURED if known else UNMEASURED, "a test", -loss if loss is not None else None, interval)
    return Row(
        OPTION, Mask(0, "all computed", 4, 0), NETWORKS["4g"], {}, 1e3 * total_s, 0.0, cost, cost, 0, 0, quality
    )  # fmt: skip


FAST, CHEAP, GOOD = row(1, 3, 0.03), row(3, 1, 0.02), row(5, 5, 0.0)
WORSE, UNKNOWN = row(3, 3, 0.04), row(0.5, 0, None)
ALL = [FAST, CHEAP, GOOD, WORSE, UNKNOWN]


def test_the_frontier_holds_what_no_other_row_beats() -> None:
    assert frontier([FAST, CHEAP, GOOD, WORSE]) == (FAST, CHEAP, GOOD)
    twin = row(1, 3, 0.03)
    assert frontier([FAST, twin]) == (FAST, twin)


@pytest.mark.parametrize(
    ("goals", "expected"),
    [
        (Goals(), GOOD),
        (Goals(max_latency_s=4), CHEAP),
        (Goals(max_latency_s=2), FAST),
        (Goals(max_cost=2), CHEAP),
        (Goals(max_latency_s=5, max_cost=5), GOOD),
    ],
)
def test_the_least_loss_that_meets_the_goals_is_chosen(goals: Goals, expected: Row) -> None:
    found = choose(ALL, goals)
    assert found.chosen is expected
    assert "loses least" in found.reason
    assert goals.words() in found.reason
    assert UNKNOWN not in found.frontier


def test_nothing_that_meets_the_goals_names_the_nearest_miss() -> None:
    found = choose(ALL, Goals(max_latency_s=2, max_cost=1))
    assert found.chosen is None
    assert found.nearest is CHEAP  # half as long again: 1.5; FAST costs three times too much
    assert "the nearest takes 3 s" in found.reason
    assert "costs 1" in found.reason
    assert "1 rows whose quality nobody measured would meet it" in found.reason


def test_an_unmeasured_row_is_chosen_only_where_asked_and_nothing_measured_does() -> None:
    tight = Goals(max_latency_s=0.9)
    assert choose(ALL, tight).chosen is None
    asked = choose(ALL, tight, unmeasured=True)
    assert asked.chosen is UNKNOWN
    assert "no measured row" in asked.reason
    assert choose(ALL, Goals(max_latency_s=2), unmeasured=True).chosen is FAST


def test_what_cannot_be_told_apart_and_is_faster_or_cheaper_is_said() -> None:
    best, alike, apart = row(4, 4, 0.01, width=0.02), row(2, 5, 0.02, width=0.03), row(1, 0, 0.05, width=0.03)
    found = choose([best, alike, apart], Goals())
    assert found.chosen is best
    assert found.alike == (alike,)


def test_of_equal_losses_the_cheaper_then_the_faster_is_chosen() -> None:
    slow, quick, cheap = row(3, 2, 0.01), row(2, 2, 0.01), row(9, 1, 0.01)
    assert choose([slow, quick], Goals()).chosen is quick
    assert choose([slow, quick, cheap], Goals()).chosen is cheap


def test_no_rows_at_all_are_said() -> None:
    found = choose([], Goals(max_latency_s=1))
    assert (found.chosen, found.nearest, found.frontier) == (None, None, ())
    only: list[Any] = [UNKNOWN]
    assert "none was measured" in choose(only, Goals(max_latency_s=0.1)).reason
