"""Hostile connections to a real server process: held open, sent broken, never read; others are served all the while."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

BODY = {"prompt": "hush: a secret prompt", "seed": 3, "height": 16, "width": 16, "num_steps": 4, "split": 2}
ALLOWED_MIB = 48.0  # what Python and the allocator may keep after all this; every attack here sends much more


@pytest.fixture(scope="module")
def target(hostile_target: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for the file; at its end its memory, its log and its metrics are looked at."""
    model = tiny.save_pipeline(tiny.make_pipeline(tmp_path_factory.mktemp("work")), tmp_path_factory.mktemp("model"))
    with hostile_target.Target(model, tmp_path_factory.mktemp("target")) as target:
        assert served(target)
        before = target.rss_mib()
        yield target
        assert served(target)
        assert target.peak_mib() - before < ALLOWED_MIB
        with target.client() as http:
            assert 'status="500"' not in http.get("/metrics").text
        for word in ("hush", "Traceback", "a request failed"):
            assert word not in target.log()


def served(target: Any) -> bool:
    """Whether an ordinary client gets its handoff."""
    with target.client() as http:
        return bool(http.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait=60"}).status_code == 200)


def head(hostile_target: Any, *lines: str, method: str = "POST", path: str = "/v1/handoffs") -> bytes:
    fields = [f"{method} {path} HTTP/1.1", "Host: a", f"Authorization: Bearer {hostile_target.TOKENS['alice']}", *lines]
    return "\r\n".join([*fields, "", ""]).encode()


JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


def drained(hostile_target: Any, connections: list[socket.socket], seconds: float) -> list[bytes]:
    """What every connection got until the server closed it, which it must do within the time."""
    end = time.monotonic() + seconds
    answers = []
    for bare in connections:
        bare.settimeout(max(0.1, end - time.monotonic()))
        answers.append(hostile_target.everything(bare))
        bare.close()
    return answers


@pytest.mark.parametrize("held", ["nothing", "half a head", "half a body", "half a chunk"])
def test_connections_that_hold_on_are_let_go_while_others_are_served(
    target: Any, hostile_target: Any, held: str
) -> None:
    sent = {
        "nothing": b"",
        "half a head": head(hostile_target)[:-2] + b"X-Slow: ",
        "half a body": head(hostile_target, JSON, "Content-Length: 60000") + b" " * 100,
        "half a chunk": head(hostile_target, JSON, CHUNKED) + b"ea60\r\n" + b" " * 100,
    }[held]
    connections = [target.connect() for _ in range(40)]
    for bare in connections:
        bare.sendall(sent)
    assert served(target)
    for _ in range(3):  # a byte now and then gives no more time
        time.sleep(0.3)
        for bare in connections:
            with suppress(OSError):
                bare.sendall(b"a" if sent else b"")
    answers = drained(hostile_target, connections, 60)
    kind = {"nothing": None, "half a head": b"head-timeout"}.get(held, b"body-timeout")
    assert all(answer == b"" if kind is None else kind in answer for answer in answers), answers[0]
    assert served(target)


def test_more_connections_than_there_are_places(target: Any, hostile_target: Any) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(target.connect()) for _ in range(3 * hostile_target.LIMITS["connections"])]
        refused = [bare for bare in connections[-20:] if b"too-many-connections" in hostile_target.everything(bare)]
        assert refused
    end = time.monotonic() + 60
    while True:
        try:
            if served(target):
                return
        except Exception:
            assert time.monotonic() < end
        time.sleep(0.1)


def test_readers_that_do_not_read_are_let_go(target: Any, hostile_target: Any) -> None:
    """Their answers lie in the server's memory until then, so there is a time to that."""
    request = head(hostile_target, "Accept: application/json", method="GET", path="/v1/openapi.json")
    connections = [target.connect(receive_bytes=2048) for _ in range(20)]
    for bare in connections:
        bare.setblocking(False)
        for _ in range(50):
            try:
                bare.send(request * 20)
            except BlockingIOError:
                break
    time.sleep(hostile_target.LIMITS["drain_s"])
    assert served(target)
    deadline = time.monotonic() + 60
    for bare in connections:
        bare.setblocking(True)
        bare.settimeout(60)
        hostile_target.everything(bare)
        bare.close()
    assert time.monotonic() < deadline


def test_requests_in_one_piece_are_answered_in_turn(target: Any, hostile_target: Any) -> None:
    get = head(hostile_target, method="GET", path="/v1/capabilities")
    body = json.dumps(BODY).encode()
    post = head(hostile_target, JSON, "Prefer: wait=60", f"Content-Length: {len(body)}") + body
    last = head(hostile_target, "Connection: close", method="GET", path="/healthz")
    answer = target.raw(get * 50 + post + get * 50 + last, half_close=False)
    assert hostile_target.statuses(answer) == [200] * 102


def test_garbage_between_requests(target: Any, hostile_target: Any) -> None:
    get = head(hostile_target, method="GET", path="/healthz")
    answer = target.raw(get + get + b"garbage\0\r\n\r\n" + get, half_close=False)
    assert hostile_target.statuses(answer) == [200, 200, 400]
    assert b"application/problem+json" in answer


CHUNKS: list[bytes] = [
    b"zz\r\n", b"-1\r\n", b"0x10\r\n", b"f" * 24 + b"\r\n", b"5\r\nabc", b"3\r\nabcdef\r\n0\r\n\r\n", b"\r\n",
    b"\0\r\n", b"5;" + b"x" * 20_000, b"0\r\n" + b"X: y\r\n" * 5000 + b"\r\n", b"1\n \n0\n\n", b"1 \r\n \r\n0\r\n\r\n",
    b"1\r\n \r\n" * 40_000 + b"0\r\n\r\n", b"7fffffffffffffff\r\n" + b" " * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("chunks", CHUNKS, ids=range(len(CHUNKS)))
def test_broken_chunks(target: Any, hostile_target: Any, chunks: bytes) -> None:
    answer = target.raw(head(hostile_target, JSON, CHUNKED) + chunks)
    given = hostile_target.statuses(answer)
    assert all(status in (400, 413, 422, 431) for status in given), answer[:300]


def test_lengths_that_contradict(target: Any, hostile_target: Any) -> None:
    body = json.dumps(BODY).encode()
    for lines in (
        ["Content-Length: 5", "Content-Length: 6"], ["Content-Length: -1"], ["Content-Length: +5"],
        ["Content-Length: 1e3"], ["Content-Length: " + "9" * 30], ["Content-Length: " + "9" * 5000],
        ["Content-Length: 5, 5"], ["Content-Length: 0x5"], ["Content-Length:"], ["Transfer-Encoding: identity"],
        ["Transfer-Encoding: chunked, chunked"], ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding: xchunked"], [CHUNKED, f"Content-Length: {len(body)}"],
    ):  # fmt: skip
        answer = target.raw(head(hostile_target, JSON, *lines) + body, half_close=False)
        given = hostile_target.statuses(answer)
        assert given, lines
        assert all(status in (400, 408, 413, 422, 501) for status in given), (lines, answer[:300])


def test_odd_request_lines(target: Any, hostile_target: Any) -> None:
    get = head(hostile_target, "Connection: close", method="GET", path="/healthz")
    for line in (
        b"GET http://elsewhere/healthz HTTP/1.1", b"GET //healthz HTTP/1.1", b"OPTIONS * HTTP/1.1", b"TRACE / HTTP/1.1",
        b"CONNECT a:80 HTTP/1.1", b"G\xc3\x89T / HTTP/1.1", b"GET /healthz HTTP/9.9", b"GET /healthz HTTP/1.0",
        b"GET /healthz", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\xff HTTP/1.1", b"GET /a b HTTP/1.1", b"\0" * 2000,
        b"GET / HTTP/1.1\r\n X: folded", b"PUT /v1/handoffs HTTP/1.1", b"A" * 5000 + b" / HTTP/1.1",
        b"GET /?" + b"a=b&" * 3000 + b" HTTP/1.1", b"GET /healthz HTTP/1.1\r\nExpect: 100-continue",
        b"GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x",
        b"GET /healthz HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    ):  # fmt: skip
        answer = target.raw(line + b"\r\n" + get.split(b"\r\n", 1)[1])
        given = hostile_target.statuses(answer)
        assert len(given) >= 1, (line[:60], answer[:200])
        assert all(status in (100, 200, 400, 404, 405, 431) for status in given), (line[:60], answer[:300])


def test_heads_that_are_too_large(target: Any, hostile_target: Any) -> None:
    for lines in (
        ["X: " + "a" * 20_000],
        [f"X{n}: a" for n in range(200)],
        ["X: " + "a" * 10_000, "Y: " + "a" * 10_000],
    ):
        answer = target.raw(head(hostile_target, *lines, method="GET", path="/healthz"))
        assert hostile_target.statuses(answer) == [431]


def test_a_body_after_a_refusal_is_not_kept(target: Any, hostile_target: Any) -> None:
    """A megabyte a time to requests that are refused at once: nothing of it may stay in memory."""
    before = target.rss_mib()
    for _ in range(40):
        target.raw(head(hostile_target, JSON, "Content-Length: 104857600") + b" " * 2**20)
        target.raw(b"POST /v1/handoffs HTTP/1.1\r\nHost: a\r\nContent-Length: 1048576\r\n\r\n" + b" " * 2**20)
    assert target.rss_mib() - before < ALLOWED_MIB / 2


def test_connections_that_come_and_go(target: Any, hostile_target: Any) -> None:
    body = json.dumps(BODY).encode()
    whole = head(hostile_target, JSON, "Prefer: wait=60", f"Content-Length: {len(body)}") + body
    before = target.rss_mib()
    for size in [*range(0, len(whole), 7), len(whole)]:
        with target.connect() as bare:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # ends with a reset
            bare.sendall(whole[:size])
    assert served(target)
    assert target.rss_mib() - before < ALLOWED_MIB / 2
