"""GET and HEAD of a job: three forms by Accept, conditions, ranges, and what a job that has no blob answers."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest

HANDOFF, STATUS, EVENTS = "application/vnd.latentrelay.handoff", "application/json", "text/event-stream"
Api = Any


@pytest.fixture(scope="module")
def done(service: Api) -> tuple[str, bytes, str]:
    """(id, blob, sha256 in hex) of a finished job."""
    response = service.made(seed=21)
    return response.headers["latentrelay-job"], response.content, hashlib.sha256(response.content).hexdigest()


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", HANDOFF),
        ("application/*", HANDOFF),
        (HANDOFF, HANDOFF),
        (f"{HANDOFF}, application/problem+json", HANDOFF),
        (STATUS, STATUS),
        (f"{STATUS};q=0.5, {HANDOFF};q=0.9", HANDOFF),
        (f"{HANDOFF};q=0.1, {STATUS}", STATUS),
        (f"{HANDOFF};q=0, */*;q=0.1", STATUS),
        (EVENTS, EVENTS),
        ("text/*", EVENTS),
        ("image/png, */*;q=0.1", HANDOFF),
    ],
)
def test_accept_chooses_the_form(service: Api, done: tuple[str, bytes, str], accept: str, media_type: str) -> None:
    response = service.get(done[0], accept)
    assert response.status_code == 200
    assert response.headers["content-type"].split(";")[0] == media_type
    assert "accept" in response.headers["vary"].lower()


def test_no_accept_header_gets_the_blob(service: Api, done: tuple[str, bytes, str]) -> None:
    request = service.http.build_request("GET", f"/v1/handoffs/{done[0]}")
    del request.headers["accept"]
    assert service.http.send(request).content == done[1]


def test_no_form_that_is_accepted_is_a_406(service: Api, done: tuple[str, bytes, str]) -> None:
    for accept in ("image/png", f"{HANDOFF};q=0", "nonsense"):
        document = service.problem(service.get(done[0], accept), 406, "not-acceptable", "accept")
        assert HANDOFF in document["expected"]


def test_the_blob_and_its_headers(service: Api, done: tuple[str, bytes, str]) -> None:
    job, blob, digest = done
    response = service.get(job, HANDOFF)
    assert response.content == blob
    assert response.headers["etag"] == f'"{digest}"'
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-length"] == str(len(blob))
    assert "content-encoding" not in response.headers


def test_head_is_get_without_the_body(service: Api, done: tuple[str, bytes, str]) -> None:
    for accept in (HANDOFF, STATUS):
        head = service.http.head(f"/v1/handoffs/{done[0]}", headers={"Accept": accept})
        get = service.get(done[0], accept)
        assert (head.status_code, head.content) == (get.status_code, b"")
        for name in ("content-type", "etag", "repr-digest", "accept-ranges"):
            assert head.headers.get(name) == get.headers.get(name)
    assert service.http.head(f"/v1/handoffs/{done[0]}").headers["content-length"] == str(len(done[1]))
    assert service.http.head(f"/v1/handoffs/{'0' * 32}").status_code == 404
    assert service.http.head(f"/v1/handoffs/{done[0]}", headers={"Accept": EVENTS}).content == b""


def test_every_byte_can_be_had_by_ranges(service: Api, done: tuple[str, bytes, str]) -> None:
    job, blob, digest = done
    size, pieces, at = len(blob), b"", 0
    for step in (1, 7, size // 3, size):
        response = service.get(job, Range=f"bytes={at}-{at + step - 1}", If_Range=f'"{digest}"')
        last = min(at + step, size) - 1
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {at}-{last}/{size}"
        assert response.headers["etag"] == f'"{digest}"'
        assert response.headers["repr-digest"].startswith("sha-256=:")
        pieces, at = pieces + response.content, last + 1
    assert pieces == blob


@pytest.mark.parametrize(("asked", "first", "last"), [("bytes=10-", 10, -1), ("bytes=-5", -5, -1), ("bytes=0-0", 0, 0)])
def test_open_ranges(service: Api, done: tuple[str, bytes, str], asked: str, first: int, last: int) -> None:
    size = len(done[1])
    response = service.get(done[0], Range=asked)
    start, end = first % size, last % size
    assert response.status_code == 206
    assert response.headers["content-range"] == f"bytes {start}-{end}/{size}"
    assert response.content == done[1][start : end + 1]


def test_a_suffix_longer_than_the_blob_is_all_of_it(service: Api, done: tuple[str, bytes, str]) -> None:
    response = service.get(done[0], Range=f"bytes=-{10 * len(done[1])}")
    assert (response.status_code, response.content) == (206, done[1])


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes={size}-{size}", "bytes=-0", "bytes=99999999999-"])
def test_a_range_outside_is_a_416(service: Api, done: tuple[str, bytes, str], asked: str) -> None:
    size = len(done[1])
    response = service.get(done[0], Range=asked.format(size=size))
    service.problem(response, 416, "range-not-satisfiable", "range")
    assert response.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=a-b", "items=0-1", "bytes=-", "0-3", "bytes=0-1,3-4", ""])
def test_a_range_that_is_none_gets_the_whole(service: Api, done: tuple[str, bytes, str], asked: str) -> None:
    response = service.get(done[0], Range=asked)
    assert (response.status_code, response.content) == (200, done[1])
    assert "content-range" not in response.headers


def test_if_range_of_another_blob_gets_the_whole(service: Api, done: tuple[str, bytes, str]) -> None:
    for tag in ('"' + "0" * 64 + '"', f'W/"{done[2]}"', "Mon, 23 Nov 2026 10:00:00 GMT"):
        response = service.get(done[0], Range="bytes=0-3", If_Range=tag)
        assert (response.status_code, response.content) == (200, done[1])


def test_if_none_match(service: Api, done: tuple[str, bytes, str]) -> None:
    tag = f'"{done[2]}"'
    for held in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        response = service.get(done[0], If_None_Match=held)
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == tag
    assert service.get(done[0], If_None_Match='"x"').content == done[1]
    assert service.get(done[0], If_None_Match=tag, Range="bytes=0-1").status_code == 304


def test_if_match(service: Api, done: tuple[str, bytes, str]) -> None:
    tag = f'"{done[2]}"'
    for held in (tag, f'"x", {tag}', "*"):
        assert service.get(done[0], If_Match=held).status_code == 200
    for held in ('"x"', f"W/{tag}"):
        service.problem(service.get(done[0], If_Match=held), 412, "precondition-failed", "if-match")


def test_a_job_that_runs_has_a_status_only(service: Api) -> None:
    with service.long_job() as job:
        response = service.get(job)
        assert response.status_code == 202
        assert response.headers["retry-after"] == "1"
        assert service.checked(response)["state"] in ("queued", "running")
        running = service.until(job, lambda status: status["state"] == "running" and status["step"] > 0)
        assert running["step"] < running["split"]
        assert (running["etag"], running["bytes"], running["next_step"]) == (None, None, None)
        waited = service.get(job, Prefer="wait=0.05")
        assert waited.status_code == 202
        assert waited.headers["preference-applied"] == "wait=0.05"


def test_a_get_that_waits_gets_the_blob(service: Api) -> None:
    job = service.post(service.body(seed=22, num_steps=30, split=30)).headers["latentrelay-job"]
    response = service.get(job, HANDOFF, Prefer="wait=60")
    assert response.status_code == 200
    assert response.headers["etag"] == f'"{hashlib.sha256(response.content).hexdigest()}"'


@pytest.mark.parametrize("job", ["0" * 32, "nothing", "A" * 32, "0" * 31, "%2e%2e", "x" * 2000, "0" * 31 + "%00"])
def test_unknown_handoffs(service: Api, job: str) -> None:
    for accept in (HANDOFF, STATUS, EVENTS):
        service.problem(service.get(job, accept), 404)


def test_somebody_elses_handoff_is_unknown(service: Api, done: tuple[str, bytes, str]) -> None:
    with service.client("bob") as bob:
        for accept in (HANDOFF, STATUS, EVENTS):
            response = bob.get(f"/v1/handoffs/{done[0]}", headers={"Accept": accept})
            service.problem(response, 404, "unknown-handoff")
        service.problem(bob.delete(f"/v1/handoffs/{done[0]}"), 404, "unknown-handoff")
    assert service.get(done[0]).content == done[1]
