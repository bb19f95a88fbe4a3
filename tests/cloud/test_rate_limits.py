"""Requests a minute, open jobs, steps a day: 429 with the time to wait, by token name."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.rate_limits import Usage
from latentrelay.cloud.tokens import ANONYMOUS, Caller, CallerLimits

DAY = 86400


class Clock:
    """Seconds that move when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def caller(**limits: int) -> Caller:
    return Caller("phone", CallerLimits(**limits))


def refused(usage: Usage, who: Caller, steps: int = 1, open_jobs: int = 0) -> tuple[str, int]:
    with pytest.raises(ProblemError) as caught:
        usage.admit(who, steps, open_jobs=open_jobs)
    assert caught.value.status == 429
    return caught.value.kind, int(caught.value.headers["Retry-After"])


def test_without_limits_everything_passes() -> None:
    usage = Usage()
    for _ in range(1000):
        usage.admit(ANONYMOUS, 10**6, open_jobs=10**6)


def test_requests_come_back_evenly() -> None:
    clock, who = Clock(), caller(requests_per_minute=30)
    usage = Usage(clock=clock)
    for _ in range(30):
        usage.request(who)
    assert refused(usage, who) == ("rate-limited", 2)
    clock.now += 1.99
    assert refused(usage, who) == ("rate-limited", 1)
    clock.now += 0.02
    usage.request(who)
    assert refused(usage, who) == ("rate-limited", 2)
    clock.now += 10**6
    for _ in range(30):
        usage.request(who)
    assert refused(usage, who)[0] == "rate-limited"


def test_names_do_not_share() -> None:
    usage = Usage(clock=Clock())
    limits = CallerLimits(requests_per_minute=1, steps_per_day=5)
    for name in ("a", "b"):
        usage.admit(Caller(name, limits), 5)
        assert refused(usage, Caller(name, limits))[0] == "rate-limited"


def test_open_jobs() -> None:
    usage, who = Usage(), caller(open_jobs=2)
    usage.admit(who, 1, open_jobs=1)
    assert refused(usage, who, open_jobs=2) == ("too-many-jobs", 1)
    assert refused(usage, who, open_jobs=3) == ("too-many-jobs", 1)


@pytest.mark.parametrize("stored", [False, True])
def test_steps_of_a_day(stored: bool, tmp_path: Path) -> None:
    shelf, wall = FolderStore(tmp_path), Clock(10 * DAY + 3600.0)
    usage = Usage(shelf if stored else None, wall=wall)
    who = caller(steps_per_day=100)
    usage.admit(who, 60)
    assert refused(usage, who, 41) == ("quota-used", 23 * 3600)
    usage.admit(who, 40)
    assert refused(usage, who, 1)[0] == "quota-used"
    usage.refund(who, 40)
    usage.admit(who, 40)
    wall.now += 23 * 3600
    usage.admit(who, 100)
    assert refused(usage, who, 1) == ("quota-used", DAY)
    assert refused(usage, who, 101) == ("quota-used", DAY)
    wall.now += 2 * DAY
    usage.admit(who, 1)
    if stored:
        assert len(shelf.keys("quota")) == 1  # older ones than yesterday's are deleted


@pytest.mark.parametrize("every_days", [1, 2, 3, 7])
def test_counts_do_not_pile_up_however_seldom_a_token_is_used(every_days: int, tmp_path: Path) -> None:
    shelf, wall = FolderStore(tmp_path), Clock(20_000 * DAY + 1.0)
    usage = Usage(shelf, wall=wall)
    usage.admit(Caller("tablet", CallerLimits(steps_per_day=100)), 1)
    for _ in range(5):
        usage.admit(caller(steps_per_day=100), 1)
        wall.now += every_days * DAY
    assert len(shelf.keys("quota")) == (2 if every_days == 1 else 1), "also not of a token that is used no more"


def test_a_refused_admission_takes_no_steps() -> None:
    usage, who = Usage(), caller(open_jobs=1, steps_per_day=10)
    refused(usage, who, 10, open_jobs=1)
    usage.admit(who, 10)


def test_replicas_share_the_stored_count_and_restarts_keep_it(tmp_path: Path) -> None:
    shelf, who = FolderStore(tmp_path), caller(steps_per_day=10)
    first, second = Usage(shelf), Usage(shelf)
    first.admit(who, 6)
    assert refused(second, who, 5)[0] == "quota-used"
    second.admit(who, 4)
    assert refused(Usage(FolderStore(tmp_path)), who, 1)[0] == "quota-used"


@pytest.mark.parametrize("stored", [False, True])
def test_threads_together_pass_exactly_the_limit(stored: bool, tmp_path: Path) -> None:
    shelf, who = FolderStore(tmp_path) if stored else None, caller(steps_per_day=150, requests_per_minute=200)
    usages = [Usage(shelf, clock=Clock())] * 8 if not stored else [Usage(shelf, clock=Clock()) for _ in range(8)]
    passed: list[int] = []
    kinds: set[str] = set()
    start = threading.Barrier(8)

    def ask(usage: Usage) -> None:
        start.wait(30)
        for _ in range(30):
            try:
                usage.admit(who, 1)
                passed.append(1)
            except ProblemError as problem:
                kinds.add(problem.kind)

    threads = [threading.Thread(target=ask, args=(usage,)) for usage in usages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert kinds <= {"quota-used", "store-busy", "rate-limited"}
    if stored:
        assert len(passed) == sum(int(shelf.read("quota", key) or 0) for key in shelf.keys("quota")) <= 150  # type: ignore[union-attr]
    else:
        assert len(passed) == 150


def test_many_names_and_days_do_not_pile_up() -> None:
    wall = Clock(DAY * 10.0)
    usage = Usage(wall=wall)
    for day in range(50):
        wall.now = DAY * (10.0 + day)
        for name in range(5):
            usage.admit(Caller(str(name), CallerLimits(steps_per_day=10)), 1)
    assert len(usage._steps) <= 10
