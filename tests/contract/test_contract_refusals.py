"""What is refused: tokens, media types, sizes, fields; every refusal is a problem document that names its field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

SECRET = "a secret cat nobody may read about"
Api = Any


@pytest.mark.parametrize("path", ["/v1/capabilities", "/v1/openapi.json", "/metrics", f"/v1/handoffs/{'0' * 32}"])
def test_a_token_is_needed(service: Api, path: str) -> None:
    for given in (None, "Bearer wrong", "Basic alice", "Bearer", "Bearer " + "x" * 3000, "alice-token"):
        with httpx.Client(base_url=service.url, timeout=60) as http:
            response = http.get(path, headers={"Authorization": given} if given else {})
        document = service.problem(response, 401, "unauthorised", "authorization")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "token" not in str(document.get("got"))


def test_nothing_is_made_without_a_token(service: Api) -> None:
    with service.client(None) as http:
        service.problem(service.post(http=http), 401, "unauthorised", "authorization")
        service.problem(http.delete(f"/v1/handoffs/{'0' * 32}"), 401, "unauthorised")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"promt": "a cat"}, "promt"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"guidance": 0.5}, "guidance"),
        ({"guidance": 1e9}, "guidance"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10**6}, "num_steps"),
        ({"split": 5}, "split"),
        ({"height": 10**7}, "height"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model_digest": "sha256:zz"}, "model_digest"),
        ({"prompt": "x" * 4001}, "prompt"),
        ({"wire_versions": []}, "wire_versions"),
        ({"wire_versions": ["new"]}, "wire_versions.0"),
        ({"accept_splits": [2]}, "accept_splits"),
        ({"accept_splits": [0]}, "accept_splits.0"),
        ({"deadline_ms": 0}, "deadline_ms"),
        ({"deadline_ms": 3_600_001}, "deadline_ms"),
        ({"deterministic": 1}, "deterministic"),
        ({"preview": "yes"}, "preview"),
        ({"schema_version": "2.0"}, "schema_version"),
    ],
)
def test_fields_out_of_range_are_named(service: Api, changes: dict[str, Any], field: str) -> None:
    service.problem(service.post(service.body(**changes)), 422, "invalid-request", field)


def test_another_model_is_a_conflict(service: Api) -> None:
    other = "sha256:" + "0" * 64
    document = service.problem(service.post(service.body(model_digest=other)), 409, "handoff-mismatch", "model_digest")
    assert (document["got"], document["expected"]) == (other, service.facts["model"]["digest"])


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 5000, b"[]", b"null", b"3"])
def test_what_is_not_a_request_is_refused(service: Api, text: bytes) -> None:
    response = service.http.post("/v1/handoffs", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    service.problem(response, response.status_code)


def test_only_json_as_it_is_is_read(service: Api) -> None:
    for headers, field in (
        ({"Content-Type": "text/plain"}, "content-type"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, "content-encoding"),
    ):
        response = service.http.post("/v1/handoffs", content=b"{}", headers=headers)
        service.problem(response, 415, "unsupported-media-type", field)


def test_a_large_body_is_not_read(service: Api) -> None:
    most = service.facts["limits"]["body_bytes"]
    document = service.problem(service.post(service.body(prompt="x" * (most + 1))), 413, "body-too-large", "body")
    assert document["expected"] == most

    def chunks() -> Any:
        for _ in range(most // 4096 + 2):
            yield b" " * 4096

    response = service.http.post("/v1/handoffs", content=chunks(), headers={"Content-Type": "application/json"})
    service.problem(response, 413, "body-too-large", "body")


def test_prompts_are_not_repeated(service: Api) -> None:
    wrong: list[dict[str, Any]] = [
        {"prompt": SECRET * 200},
        {"negative_prompt": [SECRET]},
        {"prompt": {"text": SECRET}},
        {"prompt": SECRET, "seed": -1},
        {"prompt": SECRET, "model_digest": "sha256:" + "0" * 64},
    ]
    for changes in wrong:
        assert "secret" not in service.post(service.body(**changes)).text
    good = service.made(prompt=SECRET, negative_prompt=SECRET)
    assert b"secret" not in good.content
    assert "secret" not in json.dumps(service.status(good.headers["latentrelay-job"]))
    assert "secret" not in service.http.get("/metrics").text


def test_unknown_paths_and_methods(service: Api) -> None:
    service.problem(service.http.get("/v1/nothing"), 404, "not-found")
    service.problem(service.http.get("/"), 404, "not-found")
    for method, path, allowed in (
        ("GET", "/v1/handoffs", {"POST"}),
        ("PUT", f"/v1/handoffs/{'0' * 32}", {"GET", "HEAD", "DELETE"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ):
        response = service.http.request(method, path)
        service.problem(response, 405, "method-not-allowed")
        assert set(response.headers["allow"].replace(" ", "").split(",")) == allowed


def test_too_many_open_jobs_of_one_caller(service: Api) -> None:
    with service.client("limited") as http:
        first = service.post(service.long_body(), http=http, Idempotency_Key="the-only-one")
        try:
            assert first.status_code == 202
            service.problem(service.post(service.body(), http=http), 429, "too-many-jobs")
        finally:
            http.delete(first.headers["location"])
        assert service.post(service.body(), http=http, Prefer="wait=60").status_code == 200


def test_long_heads_are_refused(service: Api) -> None:
    response = service.http.get("/healthz", headers={"X-Long": "x" * 100_000})
    service.problem(response, 431, "headers-too-large")
