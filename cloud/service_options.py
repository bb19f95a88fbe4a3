"""How one service is run, apart from what a request may ask for (limits.py): times, sizes of queues, what is logged.

One frozen value, given to `create_app`; every time is relative and in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServiceOptions:
    """`None` for max_batch and memory_mib lets the batcher measure what fits.

    ttl_s: how long a result is kept after its job ended; tombstone_s: how long the service remembers that it was there.
    max_wait_s: the longest a POST or GET waits (`Prefer: wait` without a number waits that long). body_s: the time a
    body may take to come. heartbeat_s: between two signs of life on an event stream. stream_s: the longest an event
    stream lasts; the client opens another.
    streams_per_caller: event streams and waits that one of several callers has open at once; streams_alone: the same
    where all callers have one name (no token, or one), so that all clients share them and nobody else is kept out.
    replicas: others serve the same store, and a client may ask any of them, so that a result is written before anybody
    is told of it. log_prompts writes prompts into the log; nothing else does. warm_up: make a step of the default size
    before the first request is answered.
    """

    ttl_s: float = 600.0
    tombstone_s: float = 86_400.0
    max_wait_s: float = 60.0
    body_s: float = 10.0
    heartbeat_s: float = 5.0
    stream_s: float = 3600.0
    streams_per_caller: int = 16
    streams_alone: int = 256
    poll_s: float = 0.2
    max_attempts: int = 3
    cache: bool = True
    max_batch: int | None = None
    memory_mib: int | None = None
    open_jobs: int | None = None
    replicas: bool = False
    log_prompts: bool = False
    warm_up: bool = False
