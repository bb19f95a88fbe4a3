"""The guarded protocol on real sockets: what a client may hold open, for how long, and what it is told."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvicorn
from latentrelay.cloud.guarded_protocol import ConnectionLimits, guarded_protocol

LARGE = 8 * 2**20


class Application:
    """Answers `/echo` with the body's length, `/large` with 8 MiB, `/events` without end, `/early` without reading."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        try:
            await self._answer(scope["path"], receive, send)
        finally:
            self.running -= 1

    async def _answer(self, path: str, receive: Any, send: Any) -> None:
        size = 0
        while path in ("/echo", "/events"):
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
        body = b"x" * LARGE if path == "/large" else str(size).encode()
        lines = [] if path == "/events" else [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": lines})
        left = asyncio.ensure_future(receive())  # a client's leaving is told here, never by `send`
        while path == "/events":
            if left.done():
                return
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        left.cancel()
        await send({"type": "http.response.body", "body": body, "more_body": False})


class Running:
    """A server in a thread and plain sockets to it."""

    def __init__(self, application: Application, limits: ConnectionLimits) -> None:
        self.application = application
        http = guarded_protocol(limits, application.refused.append)
        config = uvicorn.Config(application, http=http, ws="none", lifespan="off", log_config=None)
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(30)
        client.connect(self.listener.getsockname())
        return client


def everything(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with client:
        while True:
            try:
                part = client.recv(65536)
            except ConnectionResetError:
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts)


def answered(client: socket.socket) -> bytes:
    """One whole answer of a connection that stays open. Head and body may come apart."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += some(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(lines[b"content-length"]):
        body += some(client)
    assert len(body) == int(lines[b"content-length"])
    return head + b"\r\n\r\n" + body


def some(client: socket.socket) -> bytes:
    part = client.recv(65536)
    assert part, "the server closed before its answer was whole"
    return part


def problem(answer: bytes, status: int, kind: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert b"application/problem+json" in head
    assert b"connection: close" in head.lower()
    document = json.loads(body)
    assert document["type"] == f"urn:latentrelay:problem:{kind}"
    assert document["status"] == status


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@contextmanager
def serving(limits: ConnectionLimits) -> Iterator[Running]:
    application = Application()
    running = Running(application, limits)
    running.thread.start()
    try:
        until(lambda: running.server.started, "the server did not start")
        yield running
    finally:
        running.server.should_exit = True
        running.server.force_exit = True
        running.thread.join(30)
        running.listener.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """`serve(head_s=..., ...)`: a running server with these limits."""
    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(serving(ConnectionLimits(**limits)))


GET = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"


def post(size: int, path: bytes = b"/echo") -> bytes:
    return b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (path, size)


def test_requests_within_the_limits_are_answered(serve: Callable[..., Running]) -> None:
    with serve().connect() as client:
        for request in (GET, post(3) + b"abc", GET):
            client.sendall(request)
            assert b"200 OK" in answered(client)
        client.sendall(GET + GET + GET)
        answer = b""
        while answer.count(b"200 OK") < 3:
            answer += some(client)


def test_who_sends_nothing_is_let_go(serve: Callable[..., Running]) -> None:
    running = serve(head_s=0.3)
    assert everything(running.connect()) == b""
    assert running.application.refused == ["head-timeout"]


def trickle(client: socket.socket, stop: threading.Event) -> None:
    """A byte every 50 ms, as long as the server takes them."""
    try:
        while not stop.wait(0.05):
            client.sendall(b"a")
    except OSError:
        pass


@contextmanager
def trickling(client: socket.socket) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=trickle, args=(client, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


@pytest.mark.parametrize("first", [b"", GET], ids=["first request", "second request"])
def test_a_head_that_trickles_is_ended(serve: Callable[..., Running], first: bytes) -> None:
    running = serve(head_s=0.5, idle_s=20)
    client = running.connect()
    if first:
        client.sendall(first)
        assert b"200 OK" in answered(client)
    client.sendall(b"GET /echo HTTP/1.1\r\nX: ")
    with trickling(client):
        problem(everything(client), 408, "head-timeout")
    assert running.application.refused == ["head-timeout"]


def test_a_body_that_trickles_is_ended_and_the_application_told(serve: Callable[..., Running]) -> None:
    running = serve(body_s=0.5)
    client = running.connect()
    client.sendall(post(10**6))
    with trickling(client):
        problem(everything(client), 408, "body-timeout")
    assert running.application.refused == ["body-timeout"]
    until(lambda: running.application.running == 0, "the application still waits for the body")


def test_a_chunked_body_that_trickles_is_ended(serve: Callable[..., Running]) -> None:
    running = serve(body_s=0.5)
    client = running.connect()
    client.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n")
    with trickling(client):
        problem(everything(client), 408, "body-timeout")


def test_a_body_after_an_early_answer_is_not_waited_for(serve: Callable[..., Running]) -> None:
    running = serve(body_s=0.5, idle_s=20)
    client = running.connect()
    client.sendall(post(10**6, b"/early"))
    with trickling(client):
        assert b"200 OK" in everything(client)


def test_a_kept_connection_ends_when_idle(serve: Callable[..., Running]) -> None:
    running = serve(idle_s=0.3, head_s=20, body_s=20)
    client = running.connect()
    client.sendall(post(3, b"/early"))
    assert b"200 OK" in answered(client)
    client.sendall(b"abc")  # the body that was not waited for: the connection is idle from here
    assert everything(client) == b""
    assert running.application.refused == []


@pytest.mark.parametrize(
    ("request_bytes", "status", "kind"),
    [
        (b"GET /echo HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5000 + b"\r\n\r\n", 431, "headers-too-large"),
        (b"GET /" + b"a" * 5000, 431, "headers-too-large"),
        (b"GET /echo HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(20)) + b"\r\n", 431,
         "headers-too-large"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed-request"),
        (b"GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed-request"),
        (b"GET /echo HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400, "malformed-request"),
        (b"GET /echo HTTP/1.1\r\n\r\n", 400, "malformed-request"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "malformed-request"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "malformed-request"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "malformed-request"),
        (b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400, "malformed-request"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_a_problem_document(
    serve: Callable[..., Running], request_bytes: bytes, status: int, kind: str
) -> None:
    running = serve(head_bytes=4096, headers=16)
    client = running.connect()
    client.sendall(request_bytes)
    problem(everything(client), status, kind)
    assert running.application.refused == [kind]
    until(lambda: running.application.running == 0, "the application still waits")


def test_a_bad_chunk_after_the_answer_only_ends_the_connection(serve: Callable[..., Running]) -> None:
    running = serve()
    client = running.connect()
    client.sendall(b"POST /early HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert b"200 OK" in answered(client)
    client.sendall(b"zz\r\n")
    assert everything(client) == b""


def test_too_many_connections_are_refused_and_places_come_back(serve: Callable[..., Running]) -> None:
    running = serve(connections=3)
    clients = [running.connect() for _ in range(3)]
    for client in clients:
        client.sendall(GET)
        assert b"200 OK" in answered(client)
    refused = running.connect()
    refused.sendall(GET)
    problem(everything(refused), 503, "too-many-connections")
    clients.pop().close()
    until(lambda: len(running.server.server_state.connections) < 3, "the place did not come back")
    with running.connect() as client:
        client.sendall(GET)
        assert b"200 OK" in answered(client)
    for client in clients:
        client.close()


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz"])
def test_a_full_server_still_answers_its_probes(serve: Callable[..., Running], path: bytes) -> None:
    running = serve(connections=2, reserve=3, head_s=20, reserve_s=0.5)
    with ExitStack() as stack:
        held = [stack.enter_context(running.connect()) for _ in range(2)]
        for client in held:
            client.sendall(GET)
            assert b"200 OK" in answered(client)
        probe = running.connect()
        probe.sendall((b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path) * 2)
        answer = everything(probe)
        assert answer.count(b"200 OK") == 1
        assert b"connection: close" in answer.lower()
        for request in (GET, post(3) + b"abc", post(10**6)):
            asking = running.connect()
            asking.sendall(request)
            problem(everything(asking), 503, "too-many-connections")
        silent = [stack.enter_context(running.connect()) for _ in range(3)]  # the reserve is held for a moment only
        until(lambda: len(running.server.server_state.connections) == 5, "the reserve was not taken")
        problem(everything(running.connect()), 503, "too-many-connections")
        assert [everything(each) for each in silent] == [b""] * 3
        held[0].sendall(GET)  # nothing of this has touched those who were there before
        assert b"200 OK" in answered(held[0])


@pytest.mark.parametrize("path", [b"/large", b"/events"])
def test_who_does_not_read_is_let_go(serve: Callable[..., Running], path: bytes) -> None:
    running = serve(drain_s=0.5, drain_bytes_per_s=1e12, idle_s=20)
    with running.connect(receive_bytes=4096) as client:
        client.sendall(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path)
        until(lambda: running.application.refused == ["slow-reader"], "the connection is still held")
        until(lambda: not running.server.server_state.connections, "the connection is still held")
        until(lambda: running.application.running == 0, "the application still writes")


def test_who_reads_slowly_but_steadily_gets_it_all(serve: Callable[..., Running]) -> None:
    running = serve(drain_s=0.2, drain_bytes_per_s=2**18)
    with running.connect(receive_bytes=65536) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        size = 0
        while part := client.recv(2**18):
            size += len(part)
            time.sleep(0.005)
    assert size > LARGE
    assert running.application.refused == []


def test_limits_do_not_touch_an_answer_that_takes_long(serve: Callable[..., Running]) -> None:
    running = serve(head_s=0.2, body_s=0.2, idle_s=0.2, drain_s=0.2)
    with running.connect() as client:
        client.sendall(b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n")
        end = time.monotonic() + 1
        while time.monotonic() < end:
            assert client.recv(2**20)
    assert running.application.refused == []
