"""The worker: one thread that runs jobs in the order they came, so that the event loop stays free to answer.

At most `queue` jobs are held, the running one included; one more is refused with the time after which to ask again.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from latentrelay.cloud.cancel import Cancellation
from latentrelay.cloud.errors import QueueFullError

T = TypeVar("T")


class Worker:
    """Runs jobs one at a time. Used from one event loop; `close` cancels what runs and what waits."""

    def __init__(self, queue: int) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latentrelay-engine")
        self._queue = queue
        self._held = 0
        self._mean_s = 1.0
        self.cancellation = Cancellation()

    @property
    def held(self) -> int:
        """How many jobs run or wait."""
        return self._held

    def submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """A future of `job()`. Raises QueueFullError when the queue is full."""
        if self._held >= self._queue:
            raise QueueFullError(self._held, max(1, math.ceil(self._mean_s * self._held)))
        self._held += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._timed, job)
        future.add_done_callback(self._release)
        return future

    def close(self) -> None:
        """Cancel every job between two steps and end the thread."""
        self.cancellation.cancel()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _timed(self, job: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return job()
        finally:
            self._mean_s += 0.2 * (time.perf_counter() - started - self._mean_s)

    def _release(self, future: asyncio.Future[T]) -> None:
        self._held -= 1
        if not future.cancelled():
            future.exception()  # seen, also where the client that would be told of it has gone
