"""The log of real requests: one line each with who, what and which job; no prompt, token or key unless asked for."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.cloud import logs
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.serve import CloudServer
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.tokens import Tokens

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
BODY = {"prompt": "a secret cat", "seed": 3, "height": 16, "width": 16, "num_steps": 4, "split": 2}
HEADERS = {
    "Authorization": "Bearer the-token",
    "Prefer": "wait",
    "Idempotency-Key": "the-key",
    "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01",
}


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged; the loggers are as before afterwards."""
    names = ("latentrelay", "uvicorn.error")
    before = [(logging.getLogger(name), *_state(name)) for name in names]
    yield io.StringIO()
    for logger, handlers, propagate, level in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def _state(name: str) -> tuple[list[logging.Handler], bool, int]:
    logger = logging.getLogger(name)
    return list(logger.handlers), logger.propagate, logger.level


def asked(engine: Engine, options: ServiceOptions, call: Callable[[httpx.Client], None]) -> None:
    """Make the calls on a server with a token, and end it."""
    server = CloudServer(create_app(engine, tokens=Tokens.single("the-token", name="alice"), service=options))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    try:
        assert ready.wait(30)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            call(client)
    finally:
        server.stop()
        thread.join(60)


def test_one_line_a_request(engine: Engine, stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    jobs: list[str] = []

    def call(client: httpx.Client) -> None:
        jobs.append(client.post("/v1/handoffs", json=BODY, headers=HEADERS).headers["latentrelay-job"])
        client.post("/v1/handoffs", json=BODY)
        client.get("/v1/nothing?secret")
        client.get("/healthz")

    asked(engine, ServiceOptions(), call)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/v1/handoffs", 200),
        ("POST", "/v1/handoffs", 401),
        ("GET", "none", 404),
    ]
    first = requests[0]
    assert (first["trace"], first["job"], first["caller"]) == (TRACE, jobs[0], "alice")
    assert first["ms"]
    assert requests[1]["kind"] == "unauthorised"
    ends = [line for line in lines if line.get("job") == jobs[0] and line["event"] != "request"]
    assert [line["trace"] for line in ends] == [TRACE]
    for secret in ("secret", "the-token", "the-key"):
        assert secret not in stream.getvalue()


@pytest.mark.parametrize("shown", [False, True])
def test_prompts_only_where_asked_for(engine: Engine, stream: io.StringIO, shown: bool) -> None:
    logs.configure("text", prompts=shown, stream=stream)
    asked(
        engine,
        ServiceOptions(log_prompts=shown),
        lambda client: client.post("/v1/handoffs", json=BODY, headers=HEADERS).raise_for_status() and None,
    )
    assert ("a secret cat" in stream.getvalue()) == shown
    assert "the-token" not in stream.getvalue()


def test_a_failure_is_logged_by_its_type_only(tiny: Any, tmp_path: Path, stream: io.StringIO) -> None:
    logs.configure("json", stream=stream)
    engine = Engine(tiny.make_pipeline(tmp_path), name="tiny")

    def fail(*_: Any) -> str:
        raise ValueError("a secret of the host")

    engine.check = fail  # type: ignore[method-assign]

    def call(client: httpx.Client) -> None:
        response = client.post("/v1/handoffs", json=BODY, headers=HEADERS)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "ValueError" not in response.text

    asked(engine, ServiceOptions(), call)
    assert "ValueError" in stream.getvalue()
    assert "secret" not in stream.getvalue()
