"""Prometheus metrics of one service: requests, jobs, the queue, the batch, steps, bytes, caches, refusals.

Implements the observers of the batcher, of the job board and of the guarded protocol. Each service has its own
registry, so that two in one process (tests, replicas) do not add up. No label holds anything that a client can choose
freely: words that are not known count as "other".
"""

from __future__ import annotations

import re
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
_WORD = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
_MAX_WORDS = 64


class QueueLoad(Protocol):
    """What `Batcher.load()` answers with, as far as it is shown here."""

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def limit(self) -> int: ...


class Metrics:
    """The counters; `text()` is what /metrics answers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._known: dict[str, set[str]] = {}
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.seconds = self._histogram("handoff_seconds", "Time from accepting a job to its end.", _SECONDS)
        self.steps = self._counter("steps", "Denoising steps made, each request's counted.")
        self.bytes = self._counter("handoff_bytes", "Bytes of handoffs sent.")
        self.in_flight = self._gauge("in_flight", "Runs that wait or are made now.")
        self.waiting = self._gauge("queue_waiting", "Runs that wait for a place in the batch.")
        self.running = self._gauge("queue_running", "Runs in the batch.")
        self.limit = self._gauge("queue_limit", "Runs that may wait and run together.")
        self.occupancy = self._histogram(
            "batch_occupancy", "Rows of a network call over those it has room for.", _SHARES
        )
        self.step_seconds = self._histogram("step_seconds", "Time of one batched step.", _STEP_SECONDS)
        self.wait_seconds = self._histogram("queue_seconds", "Time a run waited for its place.", _SECONDS)
        self.ended = self._counter("batch_left", "Runs that left the batch, by reason.", "reason")
        self.cached = self._counter("cache", "Look-ups in the content caches.", "kind", "hit")
        self.refusals = self._counter("refusals", "Requests and connections refused, by reason.", "reason")
        self.jobs = self._counter("jobs", "Jobs that ended, by their last state.", "state")
        self.accepted = self._counter("jobs_accepted", "Jobs accepted.", "replayed")
        self.recoveries = self._counter("jobs_recovered", "Jobs of a dead process taken over.")

    def answered(self, route: str, status: int, reason: str | None = None) -> None:
        """Count an answer; `route` is the pattern, not the path; `reason` the problem's kind, where it is one."""
        self.requests.labels(route=route, status=str(status)).inc()
        if reason is not None and status in (401, 406, 408, 413, 415, 429, 431, 503):
            self.refused(reason)

    def refused(self, reason: str) -> None:
        """Count a refusal: of a request, or of a connection by the guarded protocol."""
        self.refusals.labels(reason=self._word("reason", reason)).inc()

    def step(self, rows: int, capacity: int, seconds: float) -> None:
        """BatchObserver: one network call of `rows` of `capacity` requests took `seconds`."""
        self.steps.inc(rows)
        self.occupancy.observe(rows / max(1, capacity))
        self.step_seconds.observe(seconds)

    def joined(self, wait_s: float) -> None:
        """BatchObserver: a run got its place after `wait_s`."""
        self.wait_seconds.observe(wait_s)

    def left(self, reason: str) -> None:
        """BatchObserver: a run left the batch: done, cancelled, deadline, failed."""
        self.ended.labels(reason=self._word("left", reason)).inc()

    def cache(self, kind: str, hit: bool) -> None:
        """BatchObserver: a look-up in the cache of texts or of results."""
        self.cached.labels(kind=self._word("cache", kind), hit=str(hit).lower()).inc()

    def job_accepted(self, replayed: bool) -> None:
        """Job observer: a job was accepted, or an idempotency key was sent again."""
        self.accepted.labels(replayed=str(replayed).lower()).inc()

    def job_ended(self, state: str, seconds: float | None = None) -> None:
        """Job observer: a job reached its last state, `seconds` after it was accepted."""
        self.jobs.labels(state=self._word("state", state)).inc()
        if seconds is not None and state == "done":
            self.seconds.observe(seconds)

    def job_recovered(self) -> None:
        """Job observer: an unfinished job of a process that has died was taken over."""
        self.recoveries.inc()

    def sent(self, size: int) -> None:
        """Count the bytes of a handoff, or of a part of one, that was sent."""
        self.bytes.inc(size)

    def load(self, load: QueueLoad) -> None:
        """Set the gauges of the queue; called before `text()`."""
        self.waiting.set(load.waiting)
        self.running.set(load.running)
        self.limit.set(load.limit)
        self.in_flight.set(load.waiting + load.running)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    def _word(self, label: str, word: str) -> str:
        """The word itself while there are few of them and it looks like one of ours; else "other"."""
        known = self._known.setdefault(label, set())
        if word not in known and (len(known) >= _MAX_WORDS or not _WORD.fullmatch(word)):
            return "other"
        known.add(word)
        return word

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"latentrelay_{name}", what, labels, registry=self._registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"latentrelay_{name}", what, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"latentrelay_{name}", what, buckets=buckets, registry=self._registry)
