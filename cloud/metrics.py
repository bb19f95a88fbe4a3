"""Prometheus metrics of one service: requests, seconds, steps, bytes handed over, requests in flight.

Each service has its own registry, so that two in one process (tests, replicas) do not add up. No label holds anything
that a client can choose freely.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0)


class Metrics:
    """The counters; `text()` is what /metrics answers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "latentrelay_requests", "Requests answered.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "latentrelay_handoff_seconds",
            "Time in the engine per handoff, waiting included.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self.steps = Counter("latentrelay_steps", "Denoising steps made.", registry=self._registry)
        self.bytes = Counter("latentrelay_handoff_bytes", "Bytes of handoffs sent.", registry=self._registry)
        self.in_flight = Gauge("latentrelay_in_flight", "Runs that wait or are made now.", registry=self._registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)
