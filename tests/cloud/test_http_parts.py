"""The headers of a request, one at a time: what Prefer, Accept and Idempotency-Key ask for, and byte ranges."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from latentrelay.cloud.answering import as_problem
from latentrelay.cloud.blob_response import blob_response
from latentrelay.cloud.errors import DeadlinePassedError, ProblemError, QueueFullError
from latentrelay.cloud.http import accepted, idempotency_key, preference
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.openapi import document
from latentrelay.cloud.route_table import OPERATIONS
from latentrelay.cloud.store import StoreFullError, StoreUnavailableError
from starlette.requests import Request

HANDOFF, STATUS, EVENTS = "application/vnd.latentrelay.handoff", "application/json", "text/event-stream"
BLOB = bytes(range(100))


def request(*headers: tuple[str, str], method: str = "GET") -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    return Request({"type": "http", "method": method, "path": "/", "headers": raw})


@pytest.mark.parametrize(
    ("prefer", "wait_s", "applied"),
    [
        ([], None, None),
        ([""], None, None),
        (["wait"], 60.0, "wait"),
        (["WAIT"], 60.0, "wait"),
        (["wait=5"], 5.0, "wait=5"),
        (["wait=0"], 0.0, "wait=0"),
        (["wait=0.25"], 0.25, "wait=0.25"),
        (['wait="7"'], 7.0, "wait=7"),
        (["wait=100000"], 60.0, "wait=100000"),
        (["respond-async"], None, "respond-async"),
        (["respond-async, wait=3"], 3.0, "wait=3"),
        (["handling=strict", "wait; x=1"], 60.0, "wait"),
        (["wait=-1"], None, None),
        (["wait=1e3"], None, None),
        (["wait=nan"], None, None),
        (["waiting, wait-not"], None, None),
        (["wait=" + "9" * 50], None, None),
    ],
)
def test_prefer(prefer: list[str], wait_s: float | None, applied: str | None) -> None:
    asked = preference(request(*(("prefer", each) for each in prefer)), 60.0)
    assert (asked.wait_s, asked.applied) == (wait_s, applied)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ([], HANDOFF),
        (["*/*"], HANDOFF),
        ([STATUS], STATUS),
        ([EVENTS], EVENTS),
        (["application/json;q=0.2", "text/event-stream;q=0.3"], EVENTS),
        (["application/*;q=0.5, text/event-stream;q=0.4"], HANDOFF),
        ([f"*/*, {HANDOFF};q=0"], STATUS),
        (["application/JSON; charset=utf-8"], STATUS),
        (["application/json;q=1.5, text/event-stream;q=0.1"], EVENTS),
        ([" , application/json"], STATUS),
    ],
)
def test_accept(accept: list[str], form: str) -> None:
    assert accepted(request(*(("accept", each) for each in accept))) == form


@pytest.mark.parametrize("accept", ["image/png", "application/json;q=0", "*", "text/html, application/xml"])
def test_nothing_acceptable(accept: str) -> None:
    with pytest.raises(ProblemError) as caught:
        accepted(request(("accept", accept)))
    assert (caught.value.status, caught.value.kind) == (406, "not-acceptable")


@pytest.mark.parametrize("key", ["a", "x" * 128, "with space", "!~"])
def test_keys(key: str) -> None:
    assert idempotency_key(request(("idempotency-key", key))) == key
    assert idempotency_key(request()) is None


@pytest.mark.parametrize("keys", [[""], ["x" * 129], ["é"], ["a\x7f"], ["a", "a"]])
def test_keys_that_are_none(keys: list[str]) -> None:
    with pytest.raises(ProblemError) as caught:
        idempotency_key(request(*(("idempotency-key", each) for each in keys)))
    assert caught.value.status == 400
    assert "x" * 129 not in json.dumps(caught.value.document())


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, BLOB[:10]),
        ("bytes=99-", 206, BLOB[99:]),
        ("bytes=90-1000", 206, BLOB[90:]),
        ("bytes=-1", 206, BLOB[99:]),
        ("bytes=-100", 206, BLOB),
        ("Bytes=0-9", 200, BLOB),
        ("bytes=9-0", 200, BLOB),
        ("bytes=0-9,20-29", 200, BLOB),
        ("bytes=\u00b2-9", 200, BLOB),
        ("bytes=" + "9" * 30 + "-", 200, BLOB),
    ],
)
def test_ranges(asked: str, status: int, part: bytes) -> None:
    response = blob_response(request(("range", asked)), BLOB, hashlib.sha256(BLOB).hexdigest(), {})
    assert (response.status_code, response.body) == (status, part)


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=-0", "bytes=500-600"])
def test_ranges_outside(asked: str) -> None:
    with pytest.raises(ProblemError) as caught:
        blob_response(request(("range", asked)), BLOB, hashlib.sha256(BLOB).hexdigest(), {})
    assert (caught.value.status, caught.value.headers["Content-Range"]) == (416, "bytes */100")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFullError(4, 2.5), 503, "queue-full"),
        (StoreFullError(), 503, "store-full"),
        (StoreUnavailableError("/secret/path"), 503, "store-unavailable"),
        (DeadlinePassedError("the deadline of job x passed"), 504, "deadline-passed"),
        (OSError(13, "Permission denied", "/secret/path"), 500, "internal-error"),
        (ValueError("a secret prompt"), 500, "internal-error"),
    ],
)
def test_errors_reveal_nothing_of_the_host(
    error: Exception, status: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    problem: Any = as_problem(error)
    assert (problem.status, problem.kind) == (status, kind)
    assert "secret" not in json.dumps(problem.document())
    assert ("Retry-After" in problem.headers) == (status == 503)


def test_the_document_has_an_answer_for_every_operation_of_the_table() -> None:
    paths = document(Limits())["paths"]
    for operation in OPERATIONS:
        described = paths[operation.path][operation.method.lower()]
        assert {int(each) for each in described["responses"]} >= {*operation.answers, *operation.problems, 500, 503}
        assert ("security" in described) == operation.public
