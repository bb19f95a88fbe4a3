"""uvicorn's HTTP/1.1 protocol with time and size limits on every connection, against clients that hold it for nothing.

Limits: connections at once, with a few more for probes alone; time to send a request's head, from the connection or the
end of the last answer, however slowly bytes come; size and number of headers; time to send a body; time without reading
what was answered. Refusals before the application are problem documents too, and the connection ends. Not a firewall:
it counts no addresses.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import h11
from latentrelay.cloud.errors import ProblemError
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

Refused = Callable[[str], None]
_FULL = "Too many connections are open; ask again."
_PROBES = ("/healthz", "/readyz")  # an operator has to see that the process lives, above all when it is full
ASGIApplication = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds, bytes and counts for one connection, but for `connections`, which counts all of one process.

    reserve: connections beyond those, each for one request to /healthz or /readyz within reserve_s of its opening.
    head_s: from the connection, or from the first byte of a later request, to the end of its head. idle_s: between two
    requests. body_s: from the head to the body's last byte. drain_s: without room for more to be written, or from the
    answer's end until all of it was taken by the system; drain_bytes_per_s adds time for a large answer.
    """

    connections: int = 512
    reserve: int = 8
    reserve_s: float = 2.0
    head_s: float = 10.0
    head_bytes: int = 16 * 1024
    headers: int = 64
    body_s: float = 30.0
    idle_s: float = 15.0
    drain_s: float = 60.0
    drain_bytes_per_s: float = 4096.0


def guarded_protocol(
    limits: ConnectionLimits = ConnectionLimits(), refused: Refused | None = None
) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=...)`; `refused(reason)` is called for every connection it ends.

    Reasons: too-many-connections, head-timeout, headers-too-large, malformed-request, body-timeout, slow-reader.
    """
    return type(
        "BoundGuardedProtocol", (GuardedProtocol,), {"limits": limits, "refused": staticmethod(refused or _ignore)}
    )


def _ignore(reason: str) -> None:
    return None


class GuardedProtocol(H11Protocol):
    """One connection. One timer runs while the client owes something, another while it does not read."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()
    refused: ClassVar[Refused] = staticmethod(_ignore)

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = h11.Connection(h11.SERVER, self.limits.head_bytes)
        self.logger = cast(logging.Logger, _Quieter(self.logger))
        self._reserved = False
        self.app = _small_heads(self.app, self.limits, type(self).refused, lambda: self._reserved)
        self.timeout_keep_alive = cast(int, self.limits.idle_s)
        self._owed: asyncio.TimerHandle | None = None
        self._phase = ""
        self._draining: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the time for the first head, or refuse where there are too many connections."""
        super().connection_made(cast(asyncio.Transport, transport))
        beyond = len(self.connections) - self.limits.connections
        if beyond > self.limits.reserve:
            self._end(503, "too-many-connections", _FULL, {"retry-after": "1"})
            return
        self._reserved = beyond > 0
        self._expect("head", self._head_s)

    @property
    def _head_s(self) -> float:
        return min(self.limits.head_s, self.limits.reserve_s) if self._reserved else self.limits.head_s

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._expect("", 0)
        self._watch_reader(None)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Nothing more is read once the connection is being ended."""
        if self.transport.is_closing():
            return
        super().data_received(data)

    def handle_events(self) -> None:
        """After uvicorn has taken what has come: what does the client owe now?"""
        super().handle_events()
        if self.transport.is_closing():
            self._expect("", 0)
        elif self.conn.their_state is h11.SEND_BODY:
            if self._phase != "body":
                self._expect("body", self.limits.body_s)
        elif self.conn.their_state is not h11.IDLE:
            self._expect("", 0)
        elif self._phase != "head":
            begun = bool(self.conn.trailing_data[0])
            if begun or self._phase != "idle":
                self._expect(*(("head", self.limits.head_s) if begun else ("idle", self.limits.idle_s)))

    def on_response_complete(self) -> None:
        """What was answered must be read within its time; the keep-alive time of uvicorn begins beside it."""
        waiting = self.transport.get_write_buffer_size()
        if waiting:
            self._watch_reader(self.limits.drain_s + waiting / self.limits.drain_bytes_per_s)
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client reads more slowly than the application writes."""
        super().pause_writing()
        if self._draining is None:
            waiting = self.transport.get_write_buffer_size()
            self._watch_reader(self.limits.drain_s + waiting / self.limits.drain_bytes_per_s)

    def resume_writing(self) -> None:
        """It has caught up, as far as an answer still goes on."""
        super().resume_writing()
        if self.cycle is not None and not self.cycle.response_complete:
            self._watch_reader(None)

    def send_400_response(self, msg: str) -> None:
        """What h11 could not parse: 431 where it was too long, else 400, as a problem document."""
        error = sys.exc_info()[1]
        if getattr(error, "error_status_hint", 400) == 431:
            detail = f"The request's head is longer than {self.limits.head_bytes} bytes."
            self._end(431, "headers-too-large", detail, {})
        else:
            self._end(400, "malformed-request", "This is not an HTTP/1.1 request.", {})

    def _expect(self, phase: str, seconds: float) -> None:
        if self._owed is not None:
            self._owed.cancel()
        self._phase = phase
        self._owed = self.loop.call_later(seconds, self._too_slow) if phase else None

    def _too_slow(self) -> None:
        phase, self._phase, self._owed = self._phase, "", None
        if phase == "idle" or (phase == "head" and not self.conn.trailing_data[0]):
            if phase == "head":
                type(self).refused("head-timeout")
            self._close()  # nothing was asked, nothing is answered
            return
        seconds = self._head_s if phase == "head" else self.limits.body_s
        self._end(408, f"{phase}-timeout", f"The request's {phase} did not come within {seconds:g} s.", {})

    def _watch_reader(self, seconds: float | None) -> None:
        if self._draining is not None:
            self._draining.cancel()
        self._draining = self.loop.call_later(seconds, self._not_read) if seconds is not None else None

    def _not_read(self) -> None:
        self._draining = None
        if self.transport.get_write_buffer_size():
            type(self).refused("slow-reader")
            self.transport.abort()

    def _end(self, status: int, kind: str, detail: str, headers: dict[str, str]) -> None:
        """Answer with a problem document where an answer may still begin, and end the connection either way."""
        type(self).refused(kind)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            lines, body = _problem(status, kind, detail, headers)
            answer = h11.Response(status_code=status, headers=lines, reason=STATUS_PHRASES[status])
            with suppress(h11.LocalProtocolError):  # a HEAD's answer has no body
                for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
        self._close()

    def _close(self) -> None:
        """Tell the application that its client has gone; let the last words leave, for a time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._expect("", 0)
        if self.transport.get_write_buffer_size():
            self._watch_reader(self.limits.head_s)
        self.transport.close()


class _Quieter(logging.LoggerAdapter[logging.Logger]):
    """The server's logger, with a line for every malformed request at DEBUG only: they are counted instead."""

    def warning(self, msg: object, *args: object, **kwargs: Any) -> None:
        """A line at DEBUG."""
        self.debug(msg, *args, **kwargs)

    @property
    def level(self) -> int:
        """The logger's own; uvicorn asks."""
        return self.logger.level


def _small_heads(
    app: ASGIApplication, limits: ConnectionLimits, refused: Refused, reserved: Callable[[], bool]
) -> ASGIApplication:
    """The application, for heads within the limits; 431 for others, which came whole in one piece. On a reserved
    connection one request to a probe is answered, and 503 for what else is asked."""

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        lines = scope["headers"]
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) + 4 for name, value in lines)
        if size > limits.head_bytes or len(lines) > limits.headers:
            detail = f"At most {limits.headers} headers and {limits.head_bytes} bytes of them are read."
            status, kind, more = 431, "headers-too-large", {}
        elif not reserved():
            await app(scope, receive, send)
            return
        elif scope["path"] in _PROBES:
            await app(scope, receive, _closing(send))
            return
        else:
            detail, status, kind, more = _FULL, 503, "too-many-connections", {"retry-after": "1"}
        refused(kind)
        answer, body = _problem(status, kind, detail, more)
        await send({"type": "http.response.start", "status": status, "headers": answer})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return checked


def _closing(send: Any) -> Any:
    """A `send` whose answer ends the connection."""

    async def closing(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


def _problem(status: int, kind: str, detail: str, headers: dict[str, str]) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Header lines and body of a problem document that ends the connection."""
    body = json.dumps(ProblemError(status, kind, detail).document()).encode()
    fields = {"content-type": "application/problem+json", "content-length": str(len(body)), **headers}
    return [(name.encode(), value.encode()) for name, value in (fields | {"connection": "close"}).items()], body
