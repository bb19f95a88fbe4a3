"""Step-level continuous batching: many requests' denoising runs through one network, a step at a time.

In: `RunRequest`s from any thread. Out: a `Ticket` each, whose future is the `Handoff`. One thread runs the network;
between two of its calls requests join and leave, whatever their step, split, sampler, guidance or prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime.handoff import Handoff


@dataclass(frozen=True)
class StepReport:
    """A step is done: `step` of `split` (1 first) in a run of `num_steps`; preview (rows, columns, RGB bytes)."""

    step: int
    split: int
    num_steps: int
    preview: tuple[int, int, bytes] | None = None


@dataclass(frozen=True)
class Load:
    """What the batcher holds now: runs that wait and run, how many it takes on, the median time of a network call,
    the mean share of a call's places that were used (0..1), and how long a new default-size request of half the default
    steps would take; the last three are None before the first call."""

    waiting: int
    running: int
    limit: int
    step_ms: float | None
    occupancy: float | None
    estimate_ms: float | None


class BatchObserver(Protocol):
    """What a batcher tells its metrics. Called on its thread: be quick and do not raise."""

    def step(self, rows: int, capacity: int, seconds: float) -> None:
        """A network call for `rows` requests of `capacity` places took `seconds`."""

    def joined(self, wait_s: float) -> None:
        """A request got its place after `wait_s`."""

    def left(self, reason: str) -> None:
        """A request ended: done | early | cached | cancelled | deadline | failed | refused."""

    def cache(self, kind: str, hit: bool) -> None:
        """A look into a cache: kind "text" or "result"."""


OnStep = Callable[[StepReport], None]


class Ticket:
    """A submitted request. `future` gives the Handoff, or raises RunCancelled, DeadlinePassedError, NonFiniteError."""

    future: Future[Handoff]

    def cancel(self) -> None:
        """End this request's run before its next step; its place is free at once."""
        raise NotImplementedError

    def queue_position(self) -> int | None:
        """How many wait before this one; None once it runs or has ended."""
        raise NotImplementedError


class Batcher:
    """Runs requests together on one engine. Every method may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int | None = None,
        memory_mib: float | None = None,
        cache: bool = True,
        observer: BatchObserver | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start the thread; requests submitted before wait for it."""
        raise NotImplementedError

    def drain(self) -> None:
        """Take nothing new from now on; what is held goes on."""
        raise NotImplementedError

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel everything between two steps and end the thread; a thread that hangs is left behind after a while."""
        raise NotImplementedError

    def submit(self, request: RunRequest, *, deadline_s: float | None = None, on_step: OnStep | None = None) -> Ticket:
        """Queue a request. deadline_s: seconds left; None takes the request's own, or the service's limit.

        Raises ProblemError for what the engine cannot run, and a RefusedError for what it cannot run now:
        QueueFullError, MemoryRefusedError, DeadlineRefusedError, DrainingError.
        """
        raise NotImplementedError

    def load(self) -> Load:
        """What is held now, and the measured times."""
        raise NotImplementedError
