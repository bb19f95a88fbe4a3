"""Replicas: how many there are, and the socket's side that hands requests to them. Without Ray."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.ray_ingress import Ingress, Message, ReplicaLost
from latentrelay.cloud.ray_metrics import merged
from latentrelay.cloud.ray_replica import Replica
from latentrelay.cloud.replicas import METRIC, Replicas, desired_replicas
from latentrelay.runtime.errors import RequestError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


@pytest.mark.parametrize(("text", "low", "high"), [("1", 1, 1), ("3", 3, 3), ("1:4", 1, 4), ("2:2", 2, 2)])
def test_a_number_of_replicas(text: str, low: int, high: int) -> None:
    assert Replicas.parse(text) == Replicas(low, high)


@pytest.mark.parametrize("text", ["", "0", "2:1", "1:", ":2", "a", "1:b", "-1", "1:2:3", "1.5"])
def test_what_is_no_number_of_replicas(text: str) -> None:
    with pytest.raises(RequestError, match="number of replicas"):
        Replicas.parse(text)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [([0], 1), ([4], 1), ([5], 2), ([4, 5], 3), ([0, 0, 0], 1), ([40], 10), ([], 3)],
)
def test_the_jobs_in_hand_decide(held: list[float], wanted: int) -> None:
    points = {nth: [SimpleNamespace(value=99.0), SimpleNamespace(value=value)] for nth, value in enumerate(held)}
    context: Any = SimpleNamespace(
        target_num_replicas=3,
        current_num_replicas=3,
        config=SimpleNamespace(target_ongoing_requests=4),
        raw_metrics={METRIC: points} if held else None,
    )
    assert desired_replicas(context)[0] == wanted


async def _echo(request: Request) -> Response:
    body = await request.body()
    return JSONResponse({"body": body.decode(), "key": request.headers.get("idempotency-key")})


async def _stream(request: Request) -> Response:
    async def parts() -> AsyncGenerator[bytes, None]:
        for part in (b"a", b"b", b"c"):
            yield part

    return StreamingResponse(parts())


async def _metrics(request: Request) -> Response:
    return Response(b"one of them", status_code=200 if "authorization" in request.headers else 401)


def _replica() -> Replica:
    routes = [
        Route("/echo", _echo, methods=["GET", "POST"]),
        Route("/stream", _stream),
        Route("/metrics", _metrics),
    ]
    return Replica(lambda: None, lambda engine: Starlette(routes=routes))


Call = Callable[[Message, bytes], AsyncGenerator[list[Message], None]]


def _ask(call: Call, method: str, path: str, patience_s: float = 0.5, **options: Any) -> httpx.Response:
    async def text() -> bytes:
        return b"all of them"

    async def ask() -> httpx.Response:
        ingress = Ingress(call, metrics=text, patience_s=patience_s, max_body_bytes=100)
        transport = httpx.ASGITransport(app=ingress)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def _calls(replica: Replica, lost: int) -> tuple[Call, list[dict[str, str]]]:
    """A call that loses its replica so many times first, and the headers of every request."""
    seen: list[dict[str, str]] = []

    async def call(scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
        if len(seen) <= lost:
            raise ReplicaLost("gone")
        async for batch in replica.asgi(scope, body):
            yield batch

    return call, seen


def test_requests_and_answers_pass() -> None:
    call, seen = _calls(_replica(), 0)
    answer = _ask(call, "POST", "/echo", content=b"hello", headers={"Idempotency-Key": "mine"})
    assert answer.json() == {"body": "hello", "key": "mine"}
    assert _ask(call, "GET", "/stream").content == b"abc"
    assert _ask(call, "HEAD", "/stream").content == b""
    assert _ask(call, "GET", "/nowhere").status_code == 404
    assert len(seen) == 4


def test_a_lost_replica_is_replaced_and_the_key_stays_the_same() -> None:
    call, seen = _calls(_replica(), 2)
    answer = _ask(call, "POST", "/echo", content=b"hello", patience_s=10)
    assert answer.json()["body"] == "hello"
    keys = {each["idempotency-key"] for each in seen}
    assert len(seen) == 3
    assert len(keys) == 1  # so that a job which the lost one had accepted is not made twice


def test_without_replicas_a_refusal_that_says_when_to_ask_again() -> None:
    call, _ = _calls(_replica(), 10**6)
    refused = _ask(call, "GET", "/echo")
    assert (refused.status_code, refused.json()["title"], refused.headers["retry-after"]) == (503, "No replica", "1")
    assert refused.headers["content-type"] == "application/problem+json"
    assert _ask(call, "HEAD", "/echo").content == b""
    assert _ask(call, "GET", "/healthz").json() == {"status": "ok"}  # this process lives


def test_a_replica_that_takes_nothing_is_waited_for_only_so_long() -> None:
    async def call(scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        await asyncio.Event().wait()
        yield []

    assert _ask(call, "GET", "/echo", patience_s=0.2).status_code == 503


def test_bodies_are_cut_off_for_the_replica_to_refuse() -> None:
    call, _ = _calls(_replica(), 0)
    assert len(_ask(call, "POST", "/echo", content=b"x" * 5000).json()["body"]) == 101


def test_metrics_are_those_of_all_and_the_replica_lets_in() -> None:
    call, _ = _calls(_replica(), 0)
    assert _ask(call, "GET", "/metrics").status_code == 401
    answer = _ask(call, "GET", "/metrics", headers={"Authorization": "Bearer x"})
    assert answer.content == b"all of them"
    assert answer.headers["content-length"] == "11"


def test_a_replica_lost_in_the_middle_ends_the_answer_unfinished() -> None:
    async def call(scope: Message, body: bytes) -> AsyncGenerator[list[Message], None]:
        yield []
        yield [
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]},
            {"type": "http.response.body", "body": b"12345", "more_body": True},
        ]
        raise ReplicaLost("gone")

    async def ask() -> list[Message]:
        sent: list[Message] = []
        body = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            sent.append(message)

        async def text() -> bytes:
            return b""

        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        await Ingress(call, metrics=text)(scope, receive, send)
        return sent

    sent = asyncio.run(ask())
    assert [each["type"] for each in sent] == ["http.response.start", "http.response.body"]
    assert sent[-1]["more_body"] is True  # uvicorn then ends the connection, and the client resumes


def test_metrics_of_several_replicas_have_their_names() -> None:
    text = (
        b'# HELP a_total What.\n# TYPE a_total counter\na_total{kind="x"} 2.0\n# HELP b Now.\n# TYPE b gauge\nb 1.0\n'
    )
    lines = merged([("7", text), ("8", text)]).decode().splitlines()
    assert [line for line in lines if line.startswith(("a_total{", "b{"))] == [
        'a_total{kind="x",replica="7"} 2.0',
        'a_total{kind="x",replica="8"} 2.0',
        'b{replica="7"} 1.0',
        'b{replica="8"} 1.0',
    ]
    assert sum(line.startswith("# TYPE") for line in lines) == 2


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from latentrelay.cloud.ray_app import run_ray
from latentrelay.runtime.errors import MissingExtraError
try:
    run_ray(lambda: None, port=0)
except MissingExtraError as error:
    print(error.exit_status, error)
"""


def test_without_ray_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 A service with replicas needs the module 'ray'")
    assert 'pip install "latentrelay[ray]"' in done.stdout


@pytest.mark.parametrize(
    ("headers", "left"),
    [([], 0), ([(b"latentrelay.key_added", b"1"), (b"idempotency-key", b"mine")], 1)],
    ids=["no key", "the client's key"],
)
def test_a_client_that_goes_away_ends_its_job_unless_it_gave_a_key(
    gated: Any, headers: list[tuple[bytes, bytes]], left: int
) -> None:
    engine, gate = gated
    gate.hold()
    app = create_app(engine)
    replica = Replica(lambda: engine, lambda engine: app)
    fields = {"prompt": "the cat", "seed": 1, "height": 16, "width": 16, "num_steps": 4, "split": 2}
    lines = [(b"content-type", b"application/json"), (b"prefer", b"wait=60"), *headers]
    scope = {"type": "http", "method": "POST", "path": "/v1/handoffs", "raw_path": b"/v1/handoffs", "headers": lines}
    scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": ""}

    async def ask() -> int:
        body = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await asyncio.to_thread(gate.await_call)  # the job runs, and its client goes
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            raise AssertionError("nobody is there to be answered")

        async def text() -> bytes:
            return b""

        await Ingress(replica.asgi, metrics=text)(scope, receive, send)
        board = app.state.service.board
        open_jobs = board.open_jobs("anonymous")
        gate.release()
        await replica.close()
        return int(open_jobs)

    assert asyncio.run(ask()) == left
