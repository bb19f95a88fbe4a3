"""What the routes of one application share: engine, batcher, job board, callers, metrics, and whether it is ending.

`open` and `end` are called by the application's lifespan; `drain` when the server is told to stop: from then on
nothing new is taken on, those who wait are answered after a while, and unfinished jobs stay in the store.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from latentrelay.cloud.batcher import Batcher
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.jobs import JobBoard, JobOptions
from latentrelay.cloud.metrics import Metrics
from latentrelay.cloud.open_streams import OpenStreams
from latentrelay.cloud.rate_limits import Usage
from latentrelay.cloud.requests import parse_request
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.store import Store
from latentrelay.cloud.tokens import Tokens
from latentrelay.runtime.errors import LatentRelayError

P = ParamSpec("P")
T = TypeVar("T")
_LOOKING, _ACCEPTING = 8, 4  # threads
_log = logging.getLogger("latentrelay.cloud")
FEATURES = (
    "accept_splits",
    "deadline",
    "deterministic",
    "events",
    "idempotency",
    "preview",
    "range",
    "step_cache",
)


class Service:
    """One application's parts. `store` None is a temporary folder, made at the start and removed at the end."""

    def __init__(self, engine: Engine, *, tokens: Tokens, store: Store | None, options: ServiceOptions) -> None:
        self.engine, self.tokens, self.options = engine, tokens, options
        self.metrics = Metrics()
        self.batcher = Batcher(
            engine,
            max_batch=options.max_batch,
            memory_mib=options.memory_mib,
            cache=options.cache,
            result_ttl_s=options.ttl_s,
            observer=self.metrics,
        )
        self.streams = OpenStreams(tokens, each=options.streams_per_caller, alone=options.streams_alone)
        # Two, so that whoever has many jobs taken on keeps nobody from looking at theirs, or at the service.
        self._looking = ThreadPoolExecutor(_LOOKING, "latentrelay-look")
        self._accepting = ThreadPoolExecutor(_ACCEPTING, "latentrelay-accept")
        self._given, self._folder = store, None if store is not None else ""
        self._removed: Callable[[], object] | None = None  # also called where the process is left without an end
        self._store: Store | None = None
        self._board: JobBoard | None = None
        self._usage: Usage | None = None
        self._drain_until: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told = asyncio.Event()

    async def open(self) -> None:
        """Start, on the loop that will answer. Raises what the store raises."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._start)

    async def end(self) -> None:
        """End the board and the batcher; unfinished jobs stay in a store that outlives the process."""
        self.drain()
        await asyncio.to_thread(self._close)
        for executor in (self._looking, self._accepting):
            executor.shutdown(wait=False, cancel_futures=True)

    async def look(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """`function` of the store or the board on a thread: everything but taking on a job."""
        return await asyncio.get_running_loop().run_in_executor(self._looking, partial(function, *arguments, **named))

    async def accept(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """The same for taking on a job, which may wait for the disk and for other replicas."""
        return await asyncio.get_running_loop().run_in_executor(self._accepting, partial(function, *arguments, **named))

    def _start(self) -> None:
        """Open the store, start to run, take over what a dead process left."""
        if self._given is None:
            self._folder = tempfile.mkdtemp(prefix="latentrelay-jobs-")
            self._removed = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._store = self._given if self._given is not None else FolderStore(Path(self._folder or ""), durable=False)
        options = self.options
        self._usage = Usage(self._store, open_jobs=options.open_jobs)
        self._board = JobBoard(
            self._store,
            self.batcher,
            options=JobOptions(
                ttl_s=options.ttl_s,
                tombstone_s=options.tombstone_s,
                poll_s=options.poll_s,
                max_attempts=options.max_attempts,
                cache=options.cache,
                deadline_s=self.engine.limits.deadline_s,
                record_first=options.replicas,
            ),
            observer=self.metrics,
            model=_identity(self.engine),
            parse=lambda body: parse_request(body, self.engine.limits),
        )
        if options.warm_up:
            self._warm_up()
        self.batcher.start()
        self._board.start()

    def _warm_up(self) -> None:
        try:
            self.batcher.warm_up()
        except LatentRelayError as error:  # what is wrong with the default size need not be with others
            _log.warning("the first step could not be made: %s", error)

    def drain(self, grace_s: float = 0.0) -> None:
        """Take on nothing new; whoever waits for a job gets `grace_s` more. From any thread, any number of times."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + grace_s
            self.batcher.drain()
            if self._board is not None and self.keeps_jobs:  # what waits here another replica can begin now
                threading.Thread(target=self._board.drain, name="latentrelay-drain", daemon=True).start()
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._told.set)

    async def dismissal(self) -> None:
        """Return when those who wait for a job are to be answered, because the service ends."""
        await self._told.wait()
        await asyncio.sleep(max(0.0, (self._drain_until or 0.0) - time.monotonic()))

    def _close(self) -> None:
        if self._board is not None:
            self._board.close()
        self.batcher.close()
        if self._removed is not None:
            self._removed()

    @property
    def board(self) -> JobBoard:
        """The jobs. Raises ProblemError 503 before the start."""
        if self._board is None:
            raise not_ready("starting", "The service starts.")
        return self._board

    @property
    def usage(self) -> Usage:
        """What callers have used. Raises ProblemError 503 before the start."""
        if self._usage is None:
            raise not_ready("starting", "The service starts.")
        return self._usage

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken on."""
        return self._drain_until is not None

    @property
    def keeps_jobs(self) -> bool:
        """Whether accepted jobs outlive this process."""
        return self._given is not None

    def not_ready(self) -> ProblemError | None:
        """Why no job is taken on now, None when jobs are. Looks at the store: not for the event loop."""
        if self._board is None or self._store is None:
            return not_ready("starting", "The service starts.")
        if self.draining:
            return not_ready("draining", "The service is ending and takes on nothing new.")
        if not self._store.healthy():
            return not_ready("store-unavailable", "The store of jobs cannot be written.")
        return None

    def metrics_text(self) -> bytes:
        """What /metrics answers."""
        self.metrics.load(self.batcher.load())
        return self.metrics.text()

    def capabilities(self) -> dict[str, Any]:
        """What the engine serves, the load now and what the protocol offers."""
        load = self.batcher.load()
        document = self.engine.capabilities()
        return document | {
            "queue": {"waiting": load.waiting, "running": load.running, "limit": load.limit},
            "max_batch": self.batcher.admission.max_batch,
            "step_ms": load.step_ms,
            "estimate_ms": load.estimate_ms,
            "features": [each for each in FEATURES if each != "step_cache" or self.engine.step_cache is not None],
            "ttl_s": self.options.ttl_s,
            "max_wait_s": self.options.max_wait_s,
        }


def not_ready(kind: str, detail: str, seconds: int = 1) -> ProblemError:
    """The 503 that says so, with Retry-After."""
    return ProblemError(503, kind, detail, headers={"Retry-After": str(seconds)})


def _identity(engine: Engine) -> str:
    """What decides the bytes of a result besides the request."""
    unet = engine.unet
    return f"{engine.digest} {engine.default_sampler} {unet.dtype} {unet.device.type}"
