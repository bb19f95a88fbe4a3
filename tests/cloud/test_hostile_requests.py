"""Hostile requests to a real server process: always an answer below 500 (or a refusal with 503), nothing given away."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

PROMPT = "hush: a secret prompt"
BODY = {"prompt": PROMPT, "seed": 3, "height": 16, "width": 16, "num_steps": 4, "split": 2}
JOB = "0" * 32


@pytest.fixture(scope="module")
def target(hostile_target: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server for the file; at its end, what the log and the metrics must not hold."""
    model = tiny.save_pipeline(tiny.make_pipeline(tmp_path_factory.mktemp("work")), tmp_path_factory.mktemp("model"))
    with hostile_target.Target(model, tmp_path_factory.mktemp("target")) as target:
        yield target
        assert target.alive()
        with target.client() as http:
            text = http.get("/metrics").text
        assert 'status="500"' not in text
        log = target.log()
        assert "hush" not in log
        assert "Traceback" not in log
        assert "a request failed" not in log


@pytest.fixture(scope="module")
def http(target: Any) -> Iterator[httpx.Client]:
    with target.client() as client:
        yield client


def refused(response: httpx.Response, *statuses: int, kind: str | None = None) -> dict[str, Any]:
    """The problem document, which must hold no prompt, no token and nothing of the host."""
    assert response.status_code in statuses, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert len(response.content) < 4096
    for secret in ("hush", "/tmp", "/work", "site-packages", "Traceback", "Error("):
        assert secret not in response.text
    if kind is not None:
        assert document["type"] == f"urn:latentrelay:problem:{kind}"
    return document


def post(http: httpx.Client, content: bytes, **headers: str) -> httpx.Response:
    names = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return http.post("/v1/handoffs", content=content, headers=names)


def with_text(field: str, text: str) -> bytes:
    """The body with a field's JSON text as given."""
    return json.dumps({**BODY, field: "@@"}).replace('"@@"', text).encode()


def test_an_ordinary_request_works(http: httpx.Client) -> None:
    response = http.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait=60"})
    assert response.status_code == 200, response.text


NESTED = [b"[" * 60_000, b'{"a":' * 12_000, b"[" * 30_000 + b"]" * 30_000]
NESTED += [with_text("prompt", "[" * 20_000 + "]" * 20_000), with_text("new", '{"a":' * 9000 + "1" + "}" * 9000)]


@pytest.mark.parametrize("content", NESTED, ids=range(len(NESTED)))
def test_deeply_nested_json(http: httpx.Client, content: bytes) -> None:
    refused(post(http, content), 400, 422)


ODD_VALUES = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1", "1.5", "true", "null", "[]", "{}", '""', '"1"', "9" * 5000,
    "1" + "0" * 400, "18446744073709551616", "-0.0", "1e400", '"\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"',
]  # fmt: skip
FIELDS = ("seed", "guidance", "height", "width", "num_steps", "split", "dtype", "sampler", "model_digest",
          "scheduler_digest", "schema_version", "wire_versions", "accept_splits", "deadline_ms", "deterministic",
          "preview", "step_cache", "unknown")  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_of_every_field(http: httpx.Client, field: str) -> None:
    for text in ODD_VALUES:
        response = post(http, with_text(field, text), Prefer="wait=60")
        if response.status_code not in (200, 202):
            refused(response, 400, 406, 409, 410, 413, 422, 504)


def test_long_lists(http: httpx.Client) -> None:
    for field, item in (("accept_splits", "1"), ("wire_versions", '"1.0"'), ("wire_versions", '"9.9"')):
        response = post(http, with_text(field, "[" + ",".join([item] * 9000) + "]"), Prefer="wait=60")
        if response.status_code != 200:
            refused(response, 406, 422)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"1", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\0" * 100,
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "prompt": "b"}', b"{} {}", json.dumps(BODY).encode("utf-16"), json.dumps([BODY]).encode(),
    ],
)  # fmt: skip
def test_what_is_not_a_request(http: httpx.Client, content: bytes) -> None:
    refused(post(http, content), 400, 422)


def test_prompts_with_odd_characters_are_taken_or_refused(http: httpx.Client) -> None:
    for prompt in (
        "\0",
        "\x1b[2J",
        "\u202e\ufeff",
        "\U0010ffff" * 100,
        "a\r\nSet-Cookie: x",
        "%s%n{}",
        "\u0301" * 3000,
    ):
        response = http.post("/v1/handoffs", json={**BODY, "prompt": prompt}, headers={"Prefer": "wait=60"})
        if response.status_code != 200:
            refused(response, 400, 422)


def test_large_bodies(http: httpx.Client) -> None:
    refused(post(http, b" " * 70_000), 413, kind="body-too-large")
    refused(
        http.post("/v1/handoffs", content=iter([b" " * 4096] * 20), headers={"Content-Type": "application/json"}), 413
    )
    padded = json.dumps(BODY).encode()
    assert post(http, padded + b" " * (65_536 - len(padded)), Prefer="wait=60").status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "x"])
def test_compressed_bodies_are_not_unpacked(http: httpx.Client, coding: str) -> None:
    bomb = gzip.compress(b" " * 2**24)
    refused(post(http, bomb, Content_Encoding=coding), 415, kind="unsupported-media-type")


@pytest.mark.parametrize(
    "media", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_other_media_types(http: httpx.Client, media: str) -> None:
    refused(http.post("/v1/handoffs", content=b"{}", headers={"Content-Type": media}), 415)


PATHS = [
    "../../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..%5cx", "%00", f"{JOB}%00", f"{JOB}%0a",
    f"{JOB}/", f"{JOB}/x", "..", ".", "", "A" * 32, "a" * 31, "a" * 33, "a" * 8000, "%F0%9F%92%A9", "%ff%fe",
    "index.json", "tokens.toml", "job", "C:%5c", "~root", "{id}", "%7Bid%7D", f"{JOB};x", f"{JOB}?x=../..",
    "%252e%252e%252f", "\u0663" * 32, "0x" + "0" * 30, "+" + "0" * 31,
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
def test_path_tricks_in_ids(http: httpx.Client, method: str) -> None:
    for path in PATHS:
        for accept in ("application/json", "*/*", "text/event-stream"):
            response = http.request(method, f"/v1/handoffs/{path}", headers={"Accept": accept})
            assert response.status_code in (307, 404, 405), (path, response.status_code, response.text)
            assert "root:" not in response.text


def test_somebody_elses_job_is_unknown(target: Any, http: httpx.Client) -> None:
    job = http.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait=60"}).headers["latentrelay-job"]
    with target.client("bob") as other:
        for method in ("GET", "DELETE"):
            theirs = refused(other.request(method, f"/v1/handoffs/{job}"), 404, kind="unknown-handoff")
            none = refused(other.request(method, f"/v1/handoffs/{JOB}"), 404, kind="unknown-handoff")
            assert theirs == none
    assert http.get(f"/v1/handoffs/{job}").status_code == 200


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", "Basic YTpi", "Bearer " + "x" * 9000, "bearer\talice"]
)
def test_missing_and_wrong_tokens(target: Any, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    with target.client(None) as nobody:
        for method, path in (
            ("POST", "/v1/handoffs"), ("GET", f"/v1/handoffs/{JOB}"), ("DELETE", f"/v1/handoffs/{JOB}"),
            ("GET", "/v1/capabilities"), ("GET", "/metrics"),
        ):  # fmt: skip
            response = nobody.request(method, path, headers=headers)
            refused(response, 401, kind="unauthorised")
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_token_in_the_wrong_place_does_not_count(target: Any, hostile_target: Any) -> None:
    token = hostile_target.TOKENS["alice"]
    with target.client(None) as nobody:
        refused(nobody.get(f"/v1/capabilities?token={token}&access_token={token}"), 401)
        refused(nobody.get("/v1/capabilities", headers={"X-Api-Key": token, "Cookie": f"token={token}"}), 401)
        both = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {token}")]
        refused(nobody.get("/v1/capabilities", headers=both), 401)


def test_quotas_hold_and_say_when_to_come_back(target: Any) -> None:
    with target.client("meagre") as http:

        def ask(key: str) -> httpx.Response:
            return http.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait=60", "Idempotency-Key": key})

        assert [ask(key).status_code for key in ("a", "b", "c")] == [200, 200, 200]
        again = ask("a")  # what was accepted once is answered again, whatever was used since
        assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
        used = ask("d")
        refused(used, 429, kind="quota-used")
        assert int(used.headers["retry-after"]) > 1
        again = ask("e")
        while again.status_code == 429 and "rate-limited" not in again.text:
            again = ask("e")
        refused(again, 429, kind="rate-limited")
        assert 1 <= int(again.headers["retry-after"]) <= 12


@pytest.mark.parametrize("key", ["", "x" * 129, "../../x", "a\tb", "\u00e9", "%00", "{}", "x" * 5000])
def test_idempotency_keys(http: httpx.Client, key: str) -> None:
    names = [
        (b"Idempotency-Key", key.encode("latin-1")),
        (b"Content-Type", b"application/json"),
        (b"Prefer", b"wait=60"),
    ]
    response = http.post("/v1/handoffs", content=json.dumps(BODY), headers=names)
    if response.status_code != 200:
        refused(response, 400, kind="bad-idempotency-key")


def test_odd_conditions_and_ranges(http: httpx.Client) -> None:
    made = http.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait=60"})
    path = made.headers["location"]
    tricks = [
        "bytes=0-0,1-1," * 500, "bytes=-0", "bytes=-1", "bytes=" + "9" * 5000 + "-", "bytes=1-0", "bytes=a-b", "bytes",
        "bytes=0-" + "9" * 5000, "bytes=", "bytes=\u00b2-", "items=0-1", "bytes=0x10-", "bytes=--1", "bytes= 0 - 1",
    ]  # fmt: skip
    for value in tricks:
        for name in ("Range", "If-Range", "If-Match", "If-None-Match", "Prefer", "Accept", "traceparent"):
            response = http.get(path, headers=[(name.encode(), value.encode("latin-1"))])
            assert response.status_code < 500, (name, value[:40], response.text)
            if response.status_code >= 400:
                refused(response, 406, 412, 416)
            elif response.status_code == 200:
                assert response.content == made.content


@pytest.mark.parametrize(
    "value", ["garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 4000, "00-<script>-1-01"]
)
def test_traceparent_garbage_is_not_repeated(http: httpx.Client, value: str) -> None:
    response = http.get("/v1/capabilities", headers={"traceparent": value})
    assert response.status_code == 200
    assert not any(value[:20] in each for each in response.headers.values())


def test_prefer_and_accept_garbage(http: httpx.Client) -> None:
    for value in (
        "wait=1e9",
        "wait=-1",
        "wait=NaN",
        "wait=" + "9" * 400,
        "wait=0",
        "wait;x" * 500,
        ",,,,",
        "respond-async=x",
    ):
        response = http.post("/v1/handoffs", json={**BODY, "seed": 4}, headers={"Prefer": value})
        assert response.status_code in (200, 202), response.text
    for value in ("*/*;q=2", "a/b", ";;;", "*/*;q=" + "9" * 5000, "a, " * 2000 + "b", "application/json;q=NaN"):
        response = http.get(f"/v1/handoffs/{JOB}", headers={"Accept": value})
        refused(response, 404, 406)


def test_open_jobs_are_counted_one_at_a_time(target: Any) -> None:
    """Requests that arrive together do not pass the limit together, and the open one may be asked for again."""
    long = {**BODY, "num_steps": 200, "split": 200, "height": 128, "width": 128, "deadline_ms": 3_600_000}
    answers: list[httpx.Response] = []
    with target.client("narrow") as http:

        def ask(key: str) -> None:
            answers.append(http.post("/v1/handoffs", json=long, headers={"Idempotency-Key": key}))

        threads = [threading.Thread(target=ask, args=(str(row),)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        taken = [each for each in answers if each.status_code == 202]
        assert len(taken) == 1, [each.text for each in answers]
        for other in answers:
            if other.status_code != 202:
                refused(other, 429, kind="too-many-jobs")
                assert int(other.headers["retry-after"]) >= 1
        key = taken[0].request.headers["idempotency-key"]
        answers.clear()
        ask(key)
        assert (answers[0].status_code, answers[0].headers["idempotency-replayed"]) == (202, "true")
        assert http.delete(taken[0].headers["location"]).status_code == 200
        ask("next")
        assert answers[1].status_code == 202
        assert http.delete(answers[1].headers["location"]).status_code == 200
