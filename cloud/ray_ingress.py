"""The socket's side of a service with replicas: an ASGI application that hands every request to one of them.

In: requests from uvicorn. Out: the replica's answer, message by message. A replica that is lost before it has answered
is replaced by another one: every request of the service may be repeated, because a POST without an idempotency key gets
one here. It is marked, so that the job still ends with its client, as that of a POST without a key does. Lost later,
the connection ends, and the client resumes. Nothing of Ray is imported here; see `Call`.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any

from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.http import KEY_ADDED

Message = MutableMapping[str, Any]
Call = Callable[[Message, bytes], AsyncGenerator[list[Message], None]]  # raises ReplicaLost
_SCOPE = (
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers",
    "client", "server",
)  # fmt: skip
_AGAIN_S = 0.1


class ReplicaLost(Exception):
    """The replica that had a request has ended, or none takes it now."""


class Ingress:
    """`call` reaches a replica. A request no replica takes within `patience_s` is answered with 503.

    `metrics()` is the text of all replicas, which replaces that of the one that was asked. Bodies longer than
    max_body_bytes are cut off after that many, for the replica to refuse.
    """

    def __init__(
        self,
        call: Call,
        *,
        metrics: Callable[[], Awaitable[bytes]],
        max_body_bytes: int = 64 * 1024,
        patience_s: float = 20.0,
    ) -> None:
        self._call, self._metrics, self._patience_s = call, metrics, patience_s
        self.max_body_bytes = max_body_bytes
        self.stopping = False

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """Answer one request; the lifespan of this application is whoever started Ray's to see to."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = await _body(receive, self.max_body_bytes)
        if body is None:
            return
        sent = {key: scope[key] for key in _SCOPE if key in scope} | {"headers": _headers(scope)}
        if scope["method"] == "POST" and not any(name == b"idempotency-key" for name, _ in scope["headers"]):
            sent |= {"headers": _with_key(scope), KEY_ADDED: True}
        gone = asyncio.ensure_future(_disconnected(receive))
        if scope["path"] == "/metrics" and scope["method"] == "GET":
            send = _replacing(send, self._metrics)
        try:
            await self._answered(sent, body, gone, send)
        finally:
            gone.cancel()

    async def _answered(self, scope: Message, body: bytes, gone: asyncio.Future[None], send: Any) -> None:
        patience_s = 2.0 if scope["path"] in ("/healthz", "/readyz") else self._patience_s
        deadline = time.monotonic() + patience_s
        while True:
            begun = False
            try:
                async with aclosing(self._call(scope, body)) as batches:
                    async for message in _until(batches, gone, deadline):
                        begun = True
                        await send(message)
                return
            except ReplicaLost:
                if begun or gone.done():
                    return  # uvicorn ends a connection whose answer is not complete
            if time.monotonic() > deadline or self.stopping:
                await _unanswered(scope, send)
                return
            await asyncio.sleep(_AGAIN_S)


async def _lifespan(receive: Any, send: Any) -> None:
    for part in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{part}.complete"})


async def _until(
    batches: AsyncGenerator[list[Message], None], gone: asyncio.Future[None], deadline: float
) -> AsyncGenerator[Message, None]:
    """The messages until the client has gone; the first, empty batch must come before the deadline."""
    taken = False
    while not gone.done():
        following = asyncio.ensure_future(anext(batches, None))
        wait_s = None if taken else max(0.1, deadline - time.monotonic())
        try:
            both: set[asyncio.Future[Any]] = {following, gone}
            await asyncio.wait(both, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                if gone.done():
                    return
                raise ReplicaLost("no replica took the request")
        finally:
            if not following.done():
                following.cancel()
                await asyncio.wait({following})
        batch = following.result()
        taken = True
        if batch is None:
            return
        for message in batch:
            yield message


async def _body(receive: Any, most: int) -> bytes | None:
    """The body, cut off after `most` + 1 bytes; None if the client has gone before its end."""
    body = bytearray()
    while len(body) <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return bytes(body[: most + 1])


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _with_key(scope: Message) -> list[tuple[bytes, bytes]]:
    """The headers and an idempotency key, for a POST that has none: it may be sent twice from here."""
    return [*_headers(scope), (b"idempotency-key", secrets.token_hex(16).encode())]


def _headers(scope: Message) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in scope["headers"]]


def _replacing(send: Any, text: Callable[[], Awaitable[bytes]]) -> Any:
    """A `send` that puts `text()` in the place of a 200's body, and lets other answers pass: whoever asks has to have
    been let in by the replica."""
    held: list[Message] = []

    async def replaced(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            held.append(message)
        elif not held:
            await send(message)
        elif not message.get("more_body", False):
            body = await text()
            headers = [each for each in held[0]["headers"] if each[0] != b"content-length"]
            await send({**held[0], "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await send({"type": "http.response.body", "body": body})

    return replaced


async def _unanswered(scope: Message, send: Any) -> None:
    """What is said where no replica answers: this process lives, but cannot serve now."""
    if scope["path"] == "/healthz":
        status, document, media_type = 200, {"status": "ok"}, "application/json"
    else:
        problem = ProblemError(503, "no-replica", "No replica of the service answers now; ask again.")
        status, document, media_type = 503, problem.document(), "application/problem+json"
    body = json.dumps(document).encode()
    headers = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1")] if status == 503 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
