"""The job board: accepted requests, recorded before they are run, run to their end, remembered for a while."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from latentrelay.cloud.job_record import JobStatus
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.store import Store
from latentrelay.runtime.handoff import Handoff

__all__ = ["Accepted", "JobBoard", "JobObserver", "JobOptions", "JobStatus", "Report", "RunTicket", "Runs"]


class Report(Protocol):
    """A step was made."""

    @property
    def step(self) -> int: ...

    @property
    def preview(self) -> tuple[int, int, bytes] | None: ...


class RunTicket(Protocol):
    """A run that waits or is made."""

    @property
    def future(self) -> Future[Handoff]: ...

    def cancel(self) -> None: ...

    def queue_position(self) -> int | None: ...


class Runs(Protocol):
    """What makes the runs: a Batcher."""

    def submit(
        self, request: RunRequest, *, deadline_s: float | None = None, on_step: Callable[[Report], None] | None = None
    ) -> RunTicket: ...


class JobObserver(Protocol):
    """What a board tells its metrics. Called from any thread: be quick and do not raise."""

    def job_accepted(self, replayed: bool) -> None: ...

    def job_ended(self, state: str, seconds: float | None = None) -> None: ...

    def job_recovered(self) -> None: ...


@dataclass(frozen=True)
class JobOptions:
    """ttl_s: how long results are kept; tombstone_s: how long jobs are remembered; poll_s: how soon a board sees what
    other replicas did; max_attempts: how often a job is begun; cache: identical requests of one owner share results;
    deadline_s: of requests that name none."""

    ttl_s: float = 600.0
    tombstone_s: float = 86_400.0
    poll_s: float = 0.2
    max_attempts: int = 3
    cache: bool = True
    deadline_s: float | None = None


@dataclass(frozen=True)
class Accepted:
    """The job's id; `replayed` where the key was known already."""

    id: str
    replayed: bool


class JobBoard:
    """Every method but `wait` may be called from any thread; `accept` and `cancel` write to the store (about 1 ms)."""

    def __init__(
        self,
        store: Store,
        runs: Runs,
        *,
        options: JobOptions | None = None,
        observer: JobObserver | None = None,
        model: str = "",
        parse: Callable[[bytes], RunRequest] | None = None,
    ) -> None:
        """model: digest of everything in the service that decides a result's bytes; "" switches the cache off."""
        raise NotImplementedError

    def start(self) -> None:
        """Register, adopt what dead runners left, and watch for more."""
        raise NotImplementedError

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take nothing new, wait drain_s for what runs; what is not ended is left to the next process or replica."""
        raise NotImplementedError

    def accept(
        self, request: RunRequest, document: bytes, *, owner: str, key: str | None = None, trace: str | None = None
    ) -> Accepted:
        """Record and submit. Raises ProblemError (422 idempotency-key-reused) and RefusedError."""
        raise NotImplementedError

    def status(self, id: str, owner: str) -> JobStatus:
        """ProblemError 404 unknown-handoff."""
        raise NotImplementedError

    async def wait(self, id: str, owner: str, *, seen: int | None = None, timeout_s: float) -> JobStatus:
        """The first status whose version is not `seen` (None: that is ended), or the status when the time is up."""
        raise NotImplementedError

    def blob(self, id: str, owner: str) -> tuple[str, bytes]:
        """(etag, bytes) of a job that is done; else a ProblemError."""
        raise NotImplementedError

    def cancel(self, id: str, owner: str) -> JobStatus:
        """Cancel, or remove the result of a finished job."""
        raise NotImplementedError

    def open_jobs(self, owner: str) -> int:
        """How many jobs of an owner are not ended."""
        raise NotImplementedError
