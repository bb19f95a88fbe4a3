"""What one token name has used: requests per minute, open jobs, steps per day. Over a limit is a 429 with Retry-After.

Requests are a token bucket on the monotonic clock: as many as one minute's may come at once, then they come back
evenly. The counters of requests are this process's own: n replicas together let through up to n times as many. Steps
are kept in the store where one is given, shared by its replicas and kept over restarts, by UTC day; without one, here.
Counting them waits for no disk but once a day: a power failure may forget the last ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.store import Store
from latentrelay.cloud.tokens import Caller

_DAY_S = 86400
_KIND = "quota"
_TRIES = 20
_NAME_DIGITS = 24  # of a key's 32; the last 8 are the day
_WAITING = 8


class _Turn:
    """Whose turn it is among one caller's requests; `asked` counts the one that has it and those that wait."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.asked = 0


class Usage:
    """The counters of one service, by caller's name. Safe to use from several threads, but for `turn`.

    `open_jobs` is for callers that have no such limit of their own. `clock` gives seconds that never go back; `wall`
    gives seconds since 1970 and only chooses the day.
    """

    def __init__(
        self,
        store: Store | None = None,
        *,
        open_jobs: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._clock, self._wall = store, clock, wall
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}
        self._steps: dict[tuple[str, int], int] = {}
        self._open_jobs = open_jobs
        self._turns: dict[str, _Turn] = {}

    def most_jobs(self, caller: Caller) -> int | None:
        """How many unfinished jobs the caller may have; None is unlimited."""
        return self._open_jobs if caller.limits.open_jobs is None else caller.limits.open_jobs

    @asynccontextmanager
    async def turn(self, caller: Caller) -> AsyncIterator[None]:
        """One at a time for a caller with a limit of open jobs: between counting them and adding one, no other adds
        one here. Replicas do not wait for each other: together they may pass the limit by one job each.

        For the one loop that answers requests. Whoever waits holds no thread; as many wait as the caller may have jobs,
        at least _WAITING. Raises ProblemError 429 `too-many-jobs` for more.
        """
        most = self.most_jobs(caller)
        if most is None:
            yield
            return
        turn = self._turns.setdefault(caller.name, _Turn())
        if turn.asked > max(most, _WAITING):
            raise _refused("too-many-jobs", "Too many requests of this token wait for their turn.", most, 1.0)
        turn.asked += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.asked -= 1

    def request(self, caller: Caller) -> None:
        """Count one request. Raises ProblemError 429 `rate-limited`."""
        rate = caller.limits.requests_per_minute
        if rate is None:
            return
        with self._lock:
            now = self._clock()
            held, since = self._buckets.get(caller.name, (float(rate), now))
            held = min(float(rate), held + (now - since) * rate / 60)
            if held >= 1:
                self._buckets[caller.name] = (held - 1, now)
                return
            self._buckets[caller.name] = (held, now)
        wait_s = (1 - held) * 60 / rate
        raise _refused("rate-limited", f"More than {rate} requests a minute for this token.", rate, wait_s)

    def admit(self, caller: Caller, steps: int, *, open_jobs: int = 0) -> None:
        """Count a request for a new job of `steps` steps by a caller that has `open_jobs` unfinished ones.

        Raises ProblemError 429: `rate-limited`, `too-many-jobs`, `quota-used`. Give the steps back with `refund` when
        the job is not taken on after all.
        """
        self.request(caller)
        self.take(caller, steps, open_jobs=open_jobs)

    def take(self, caller: Caller, steps: int, *, open_jobs: int = 0) -> None:
        """The same for a request that was counted before."""
        most = self.most_jobs(caller)
        if most is not None and open_jobs >= most:
            raise _refused("too-many-jobs", f"At most {most} unfinished jobs for this token.", most, 1.0)
        self._take_steps(caller, steps)

    def refund(self, caller: Caller, steps: int) -> None:
        """Give back the steps of a job that was refused afterwards, or that was a replay of an earlier one."""
        if caller.limits.steps_per_day is not None:
            self._add(caller.name, -steps, None)

    def _take_steps(self, caller: Caller, steps: int) -> None:
        most = caller.limits.steps_per_day
        if most is None or self._add(caller.name, steps, most):
            return
        wait_s = _DAY_S - self._wall() % _DAY_S if steps <= most else _DAY_S
        raise _refused("quota-used", f"At most {most} steps a day (UTC) for this token.", most, wait_s)

    def _add(self, name: str, steps: int, most: int | None) -> bool:
        """Add to today's count unless it would pass `most`; whether it was added."""
        day = int(self._wall() // _DAY_S)
        if self._store is None:
            with self._lock:
                used = self._steps.get((name, day), 0)
                if most is not None and used + steps > most:
                    return False
                self._steps = {key: value for key, value in self._steps.items() if key[1] >= day - 1}
                self._steps[name, day] = max(0, used + steps)
                return True
        return _add_stored(self._store, name, day, steps, most)


def _add_stored(store: Store, name: str, day: int, steps: int, most: int | None) -> bool:
    """The same by compare and swap, so that replicas never count a step less than was asked for."""
    key = _key(name, day)
    for _ in range(_TRIES):
        held = store.read(_KIND, key)
        used = int(held) if held else 0
        if most is not None and used + steps > most:
            return False
        value = str(max(0, used + steps)).encode()
        if held is None and store.create(_KIND, key, value):
            _forget_before(store, day - 1)
            return True
        if held is not None and store.replace(_KIND, key, value, expected=held, durable=False):
            return True
    raise ProblemError(503, "store-busy", "The quota's counter is contended; ask again.", headers={"Retry-After": "1"})


def _forget_before(store: Store, day: int) -> None:
    """Delete the counts of every name from before `day`: those of names that are used no more too."""
    for key in store.keys(_KIND):
        if int(key[_NAME_DIGITS:], 16) < day:
            store.delete(_KIND, key)


def _key(name: str, day: int) -> str:
    """A hash of the name, then the day."""
    return hashlib.sha256(name.encode()).hexdigest()[:_NAME_DIGITS] + f"{day:08x}"


def _refused(kind: str, detail: str, most: int, wait_s: float) -> ProblemError:
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return ProblemError(429, kind, detail, wanted=f"at most {most}", headers=headers)
