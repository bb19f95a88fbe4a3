"""Who waits, who runs, whose turn it is: the batcher's books, with no torch and no threads of their own.

Runs of one latent size form a group and share network calls; a deterministic run is never shared, so those form a
group of their own with one place. Those that wait get places by the earliest deadline, then in the order they came.
Groups take turns by the time they have used, so a large size does not starve a small one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from latentrelay.cloud.forecast import Size
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.run_state import RunState, Snapshot
from latentrelay.cloud.ticket import Ticket

ALONE: Size = (0, 0)  # the group of deterministic runs, whatever their sizes
Capacity = Callable[["Job"], int]


@dataclass(eq=False)
class Job:
    """One run and the tickets that share it. `state` is the batcher's thread's own; `reached` is the last step at
    which the run could be handed over early."""

    request: RunRequest
    size: Size
    order: int
    key: bytes | None
    tickets: list[Ticket] = field(default_factory=list)
    state: RunState | None = None
    reached: Snapshot | None = None

    @property
    def group(self) -> Size:
        """The runs it may share calls with."""
        return ALONE if self.request.deterministic else self.size

    @property
    def rank(self) -> tuple[float, int]:
        """The smaller gets a place first."""
        return min((each.deadline for each in self.tickets), default=math.inf), self.order

    def calls_left(self, split: int | None = None) -> int:
        """Network calls until `split`, by default the request's own."""
        last = self.request.split if split is None else split
        return last if self.state is None else self.state.calls_until(last)


class Places:
    """The runs that wait and those that have a place. Used under the batcher's lock."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self._running: dict[Size, list[Job]] = {}
        self._used_s: dict[Size, float] = {}

    def __iter__(self) -> Iterator[Job]:
        yield from self.waiting
        for jobs in self._running.values():
            yield from jobs

    @property
    def running(self) -> int:
        """How many have a place."""
        return sum(len(jobs) for jobs in self._running.values())

    def in_group(self, group: Size) -> list[Job]:
        """Those of a group that have a place."""
        return list(self._running.get(group, ()))

    def queue(self) -> list[Job]:
        """Those that wait, the next first."""
        return sorted(self.waiting, key=lambda job: job.rank)

    def groups(self) -> set[Size]:
        """The groups that have anything to do."""
        return {*self._running, *(job.group for job in self.waiting)}

    def fill(self, capacity: Capacity) -> list[Job]:
        """Give places to those that wait, as far as there are any for their group; returns them."""
        joined = []
        for job in self.queue():
            held = self._running.get(job.group, [])
            if len(held) >= (1 if job.group == ALONE else capacity(job)):
                continue
            if not held:  # a group that was away does not get the time back that it did not use
                self._used_s[job.group] = min(self._used_s.values(), default=0.0)
                self._running[job.group] = held
            held.append(job)
            self.waiting.remove(job)
            joined.append(job)
        return joined

    def turn(self, capacity: Capacity) -> list[Job]:
        """Those that take the next call: of the group that has used the least time, as many as go into one call; where
        memory has become too short for all of them, they take turns too."""
        if not self._running:
            return []
        held = self._running[min(self._running, key=lambda group: self._used_s[group])]
        most = max(1, capacity(held[0]))
        chosen = held[:most]
        if len(held) > most:
            held[:] = [*held[most:], *chosen]
        return chosen

    def charge(self, group: Size, seconds: float) -> None:
        """A call of this group took so long."""
        if group in self._used_s:
            self._used_s[group] += seconds

    def remove(self, job: Job) -> None:
        """Free its place, or its place in the queue. Nothing where it has none."""
        if job in self.waiting:
            self.waiting.remove(job)
        held = self._running.get(job.group, [])
        if job in held:
            held.remove(job)
            if not held:
                del self._running[job.group], self._used_s[job.group]
