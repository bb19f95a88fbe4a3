"""One replica: an engine and its application, called by messages instead of by a socket. Knows nothing of Ray.

In: an ASGI scope and the whole body of a request. Out: batches of the application's ASGI messages, the first of them
empty as soon as the request is taken on. Closing that generator early tells the application that its client has gone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from latentrelay.cloud.replicas import METRIC
from latentrelay.cloud.service_options import ServiceOptions

Message = MutableMapping[str, Any]
_AHEAD = 64  # messages the application may be ahead of whoever reads them
_NOTICE_S = 5.0  # for an application to end after its client has gone


def load_engine(model: str, **arguments: Any) -> Any:
    """`Engine.load`, imported where it is called: in the replica, not in the process that starts it."""
    from latentrelay.cloud import Engine

    return Engine.load(model, **arguments)


def make_app(
    engine: Any,
    *,
    store: Path,
    token: str | None = None,
    tokens_file: str | os.PathLike[str] | None = None,
    service: ServiceOptions | None = None,
) -> Any:
    """The application of one replica, on the store folder that all of them share."""
    from latentrelay.cloud.app import create_app
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.tokens import Tokens

    return create_app(
        engine,
        token=token,
        tokens=Tokens.from_file(tokens_file) if tokens_file is not None else None,
        store=FolderStore(store),
        service=service or ServiceOptions(),
    )


class Replica:
    """What is deployed. `make_engine()` loads the model; `make_app(engine)` is the application around it."""

    def __init__(self, make_engine: Callable[[], Any], make_app: Callable[[Any], Any]) -> None:
        self._engine = make_engine()
        self._app = make_app(self._engine)
        self._stack = AsyncExitStack()
        self._started = asyncio.Lock()
        self._running = False

    async def asgi(self, scope: Message, body: bytes) -> AsyncIterator[list[Message]]:
        """Run the application for one request; an empty batch comes first."""
        await self._start()
        yield []
        messages: asyncio.Queue[Message | None] = asyncio.Queue(_AHEAD)
        gone = asyncio.Event()
        task = asyncio.create_task(self._answer(scope, _receiving(body, gone), messages))
        try:
            while (batch := await _next(messages)) is not None:
                yield batch
        finally:
            gone.set()
            if not task.done():
                _discard(messages)
                await asyncio.wait({task}, timeout=_NOTICE_S)
                task.cancel()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy reads: jobs that wait or run here."""
        load = self._app.state.service.batcher.load()
        return {METRIC: float(load.waiting + load.running)}

    async def describe(self) -> dict[str, Any]:
        """What the front needs to know of its replicas."""
        await self._start()
        return {"pid": os.getpid(), "max_body_bytes": self._engine.limits.max_body_bytes}

    async def metrics(self) -> tuple[int, bytes]:
        """This replica's process id and its metrics as text."""
        return os.getpid(), self._app.state.service.metrics_text()

    async def drain(self, grace_s: float) -> None:
        """Take nothing new; whoever waits is answered after `grace_s`. Unfinished jobs stay in the store."""
        self._app.state.service.drain(grace_s)

    async def close(self) -> None:
        """The application's own end."""
        if self._running:
            self._running = False
            await self._stack.aclose()

    async def _start(self) -> None:
        """The application's start-up, on the loop that will answer; once."""
        async with self._started:
            if not self._running:
                await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
                self._running = True

    async def _answer(self, scope: Message, receive: Any, messages: asyncio.Queue[Message | None]) -> None:
        try:
            await self._app({**scope, "state": {}, "extensions": {}}, receive, messages.put)
        finally:
            await messages.put(None)


class DeployedReplica(Replica):
    """A replica whose end is awaited where it is deleted, as Ray Serve does; anybody else calls `close`."""

    async def __del__(self) -> None:
        await self.close()


def _receiving(body: bytes, gone: asyncio.Event) -> Callable[[], Any]:
    """An ASGI `receive` that has the whole body, then waits for the client to go."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def _next(messages: asyncio.Queue[Message | None]) -> list[Message] | None:
    """All messages there are, at least one; None after the last."""
    first = await messages.get()
    if first is None:
        return None
    batch = [first]
    while not messages.empty():
        following = messages.get_nowait()
        if following is None:
            messages.put_nowait(None)
            break
        batch.append(following)
    return batch


def _discard(messages: asyncio.Queue[Message | None]) -> None:
    """Make room, so that an application that still sends does not wait for a reader that has gone."""
    while not messages.empty():
        messages.get_nowait()
