"""The batcher's books: ranks, groups and their turns; and what is forecast from measured calls."""

from __future__ import annotations

from typing import Any

import pytest
from latentrelay.cloud.forecast import StepTimes, steps_until_done
from latentrelay.cloud.places import ALONE, Job, Places
from latentrelay.cloud.ticket import Ticket


@pytest.fixture
def job(wanted: Any) -> Any:
    """`job(order, size, deadline, **request)`: a Job with one ticket."""

    def make(order: int, size: tuple[int, int] = (8, 8), deadline: float = 100.0, **request: Any) -> Job:
        asked = wanted(**request)
        ticket = Ticket(asked, deadline, "1.0", None, lambda each: None, lambda each: None)
        return Job(asked, size, order, None, [ticket])

    return make


def two(job: Job) -> int:
    return 1 if job.group == ALONE else 2


def test_places_by_deadline_then_order(job: Any) -> None:
    places = Places()
    jobs = [job(0), job(1, deadline=50), job(2), job(3, deadline=50)]
    places.waiting = list(jobs)
    assert places.queue() == [jobs[1], jobs[3], jobs[0], jobs[2]]
    assert places.fill(two) == [jobs[1], jobs[3]]
    assert (places.running, places.waiting) == (2, [jobs[0], jobs[2]])
    places.remove(jobs[3])
    assert places.fill(two) == [jobs[0]]


def test_a_shared_run_ranks_by_its_earliest_ticket(job: Any) -> None:
    late, early = job(0), job(1, deadline=20)
    late.tickets.append(early.tickets[0])
    assert late.rank == (20, 0)


def test_groups_take_turns_by_the_time_they_used(job: Any) -> None:
    places = Places()
    small, large = job(0), job(1, size=(64, 64))
    places.waiting = [small, large]
    places.fill(two)
    cost, turns = {(8, 8): 1.0, (64, 64): 4.0}, []
    for _ in range(20):
        chosen = places.turn(two)
        turns.append(chosen[0])
        places.charge(chosen[0].group, cost[chosen[0].group])
    assert (turns.count(small), turns.count(large)) == (16, 4)


def test_a_newcomer_does_not_get_the_time_it_was_away(job: Any) -> None:
    places = Places()
    places.waiting = [job(0)]
    places.fill(two)
    places.charge((8, 8), 1000.0)
    places.waiting = [job(1, size=(16, 8))]
    places.fill(two)
    turns = []
    for _ in range(10):
        chosen = places.turn(two)
        turns.append(chosen[0].group)
        places.charge(chosen[0].group, 1.0)
    assert turns.count((8, 8)) == 5


def test_deterministic_runs_have_one_place_of_any_size(job: Any) -> None:
    places = Places()
    first, second = job(0, deterministic=True), job(1, size=(16, 8), deterministic=True)
    shared = job(2)
    places.waiting = [first, second, shared]
    assert places.fill(two) == [first, shared]
    assert places.groups() == {ALONE, (8, 8)}
    places.remove(first)
    assert places.fill(two) == [second]


def test_where_memory_became_short_runs_take_turns(job: Any) -> None:
    places = Places()
    jobs = [job(order) for order in range(3)]
    places.waiting = list(jobs)
    places.fill(lambda each: 3)
    assert places.turn(lambda each: 2) == jobs[:2]
    assert places.turn(lambda each: 2) == [jobs[2], jobs[0]]
    assert places.turn(lambda each: 0) == [jobs[1]]


def test_calls_until_a_run_is_done() -> None:
    assert steps_until_done([], [], 2, 5) == 5
    assert steps_until_done([3], [], 2, 5) == 5
    assert steps_until_done([3, 7], [], 2, 5) == 8  # the first place is free after 3
    assert steps_until_done([3, 7], [2], 2, 5) == 10  # that one takes it, until 5
    assert steps_until_done([3, 7], [9], 2, 5) == 12
    assert steps_until_done([4, 4, 4], [], 2, 1) == 5  # memory became short: the third waits too


def test_times_between_and_beyond_what_was_measured() -> None:
    times = StepTimes()
    assert (times.seconds((8, 8), 1), times.median_s, times.occupancy) == (None, None, None)
    for seconds in (1.0, 1.0, 50.0):  # one slow call
        times.record((8, 8), 2, seconds, 8)
    times.record((8, 8), 6, 3.0, 8)
    assert times.seconds((8, 8), 2) == 1.0
    assert times.seconds((8, 8), 4) == 2.0
    assert times.seconds((8, 8), 12) == 6.0
    assert times.seconds((8, 8), 1) == 1.0
    assert (times.known((8, 8)), times.known((16, 16))) == (True, False)
    assert times.seconds((16, 16), 2) == 4.0  # never run: by the number of latents
    assert times.median_s == 2.0
    assert times.occupancy == pytest.approx((3 * 2 + 6) / 4 / 8)


def test_sizes_are_forgotten_before_they_fill_the_memory() -> None:
    times = StepTimes()
    for side in range(1, 600):
        times.record((side, 1), 1, 1.0, 1)
    assert times.seconds((599, 1), 1) == 1.0
    assert len(times._times) <= 256
