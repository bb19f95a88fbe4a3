"""What a submitted request gets: a future, progress, and a way to cancel; and what a batcher tells its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime.handoff import Handoff

if TYPE_CHECKING:
    from latentrelay.cloud.places import Job

_log = logging.getLogger("latentrelay.cloud")


@dataclass(frozen=True)
class StepReport:
    """A step is done: `step` of `split` (1 first) in a run of `num_steps`; preview (rows, columns, RGB bytes)."""

    step: int
    split: int
    num_steps: int
    preview: tuple[int, int, bytes] | None = None


OnStep = Callable[[StepReport], None]


class BatchObserver(Protocol):
    """What a batcher tells its metrics, from any of its threads: be quick and do not raise."""

    def step(self, rows: int, capacity: int, seconds: float) -> None:
        """A network call for `rows` requests of `capacity` places took `seconds`."""

    def joined(self, wait_s: float) -> None:
        """A request got its place after `wait_s`."""

    def left(self, reason: str) -> None:
        """A request ended: done | early | cached | cancelled | deadline | failed | refused."""

    def cache(self, kind: str, hit: bool) -> None:
        """A look into a cache: kind "text" or "result"."""


class SilentObserver:
    """The observer of a batcher that has no metrics."""

    def step(self, rows: int, capacity: int, seconds: float) -> None:
        """Nothing."""

    def joined(self, wait_s: float) -> None:
        """Nothing."""

    def left(self, reason: str) -> None:
        """Nothing."""

    def cache(self, kind: str, hit: bool) -> None:
        """Nothing."""


class Ticket:
    """A submitted request. `future` gives the Handoff, or raises RunCancelled, DeadlinePassedError, NonFiniteError,
    RunFailedError or MemoryRefusedError. It is running from the start, so it cannot be cancelled; a ticket can."""

    def __init__(
        self,
        request: RunRequest,
        deadline: float,
        wire_version: str,
        on_step: OnStep | None,
        cancel: Callable[[Ticket], None],
        position: Callable[[Ticket], int | None],
    ) -> None:
        """deadline: on the clock of time.monotonic."""
        self.request, self.deadline, self.wire_version = request, deadline, wire_version
        self.submitted = time.monotonic()
        self.future: Future[Handoff] = Future()
        self.future.set_running_or_notify_cancel()
        self.job: Job | None = None  # the run it waits for
        self.ended = False  # set by whoever settles the future, under the batcher's lock
        self._on_step, self._cancel, self._position = on_step, cancel, position

    def cancel(self) -> None:
        """End this request's run before its next step; its place is free at once."""
        self._cancel(self)

    def queue_position(self) -> int | None:
        """How many runs get a place before this one; None once it has one, or has ended."""
        return self._position(self)

    def report(self, report: StepReport) -> None:
        """Tell the caller of a step. What its function raises is its own: logged by type and left."""
        if self._on_step is None or self.ended:
            return
        try:
            self._on_step(report)
        except Exception as error:
            _log.error("a progress function failed: %s", type(error).__name__)
