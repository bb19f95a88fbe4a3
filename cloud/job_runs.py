"""The Protocols of what runs jobs and of who is told, and the options of a board; a `Batcher` and a `Metrics` fit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime.handoff import Handoff


class Report(Protocol):
    """A step was made: `step` counts from 1; preview is (rows, columns, RGB bytes)."""

    @property
    def step(self) -> int: ...

    @property
    def preview(self) -> tuple[int, int, bytes] | None: ...


class RunTicket(Protocol):
    """A run that waits or is made. The future gives the Handoff or raises RunCancelled, DeadlinePassedError, ..."""

    @property
    def future(self) -> Future[Handoff]: ...

    def cancel(self) -> None: ...

    def queue_position(self) -> int | None: ...


class Runs(Protocol):
    """What makes the runs; owners share none. `submit` raises ProblemError for what it cannot run, RefusedError for
    what it cannot run now."""

    def submit(
        self,
        request: RunRequest,
        *,
        deadline_s: float | None = None,
        on_step: Callable[[Report], None] | None = None,
        owner: str = "",
    ) -> RunTicket: ...

    def forget(self, owner: str) -> None:
        """Keep none of the results that were made for this owner until now."""


class JobObserver(Protocol):
    """What a board tells its metrics. Called from any thread: be quick and do not raise."""

    def job_accepted(self, replayed: bool) -> None:
        """A job was recorded, or its key was known already."""

    def job_ended(self, state: str, seconds: float | None = None) -> None:
        """A job reached its last state, `seconds` after it was accepted."""

    def job_recovered(self) -> None:
        """An unfinished job of a dead runner was taken over."""

    def cache(self, kind: str, hit: bool) -> None:
        """A look for a finished job with the same content; kind is "job"."""


@dataclass(frozen=True)
class JobOptions:
    """ttl_s: how long a result is kept after the end; tombstone_s: how long the job is remembered then. poll_s: how
    soon a board sees what other replicas did. max_attempts: how often a job is begun. cache: identical requests of one
    owner share results. deadline_s: of requests that name none. progress_s: the least time between two notes of a job's
    progress for other replicas. grace_s: how long a blob that no record names is left alone. record_first: a result is
    written before anybody is told of it, so that every replica says the same; without it only while other replicas are
    seen, else it is served from memory first."""

    ttl_s: float = 600.0
    tombstone_s: float = 86_400.0
    poll_s: float = 0.2
    max_attempts: int = 3
    cache: bool = True
    deadline_s: float | None = None
    progress_s: float = 0.5
    grace_s: float = 60.0
    record_first: bool = False

    @property
    def sweep_s(self) -> float:
        """Seconds between two looks at every record."""
        return min(30.0, max(self.poll_s, self.ttl_s / 10))
