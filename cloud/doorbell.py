"""Waking coroutines that wait for a job, from any thread: one future a waiter, no thread and no polling for it.

Whoever waits listens first and looks second, so that a change between the two is not missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading

_Waiter = tuple[asyncio.AbstractEventLoop, bool]  # whether it waits for the end alone


class Doorbell:
    """Waiters by job id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, dict[asyncio.Future[None], _Waiter]] = {}

    def listen(self, id: str, *, for_end: bool = False) -> asyncio.Future[None]:
        """A future of the running loop that the next `ring(id)` resolves; give it to `leave` in the end. With `for_end`
        a ring for a mere step leaves it alone."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            self._waiters.setdefault(id, {})[future] = (loop, for_end)
        return future

    def leave(self, id: str, future: asyncio.Future[None]) -> None:
        """Forget a waiter."""
        with self._lock:
            waiters = self._waiters.get(id, {})
            waiters.pop(future, None)
            if not waiters:
                self._waiters.pop(id, None)

    def ring(self, id: str, *, step: bool = False) -> None:
        """Wake whoever waits for `id` now; `step` says that the job has not ended."""
        if id not in self._waiters:  # most jobs most of the time; a waiter that listens from now on looks afterwards
            return
        with self._lock:
            waiters = list(self._waiters.get(id, {}).items())
        for future, (loop, for_end) in waiters:
            if step and for_end:
                continue
            with contextlib.suppress(RuntimeError):  # its loop has ended, and the waiter with it
                loop.call_soon_threadsafe(_resolve, future)

    def waited_for(self) -> list[str]:
        """The ids that somebody waits for."""
        with self._lock:
            return list(self._waiters)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
