"""POST /v1/handoffs: waiting or not, keys and replays, and what the answer says about the job."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from typing import Any

import pytest

HANDOFF = "application/vnd.latentrelay.handoff"
Api = Any


def key() -> str:
    return uuid.uuid4().hex


def test_a_client_that_waits_gets_the_blob(service: Api) -> None:
    response = service.made()
    digest = hashlib.sha256(response.content).hexdigest()
    assert response.headers["content-type"] == HANDOFF
    assert response.headers["etag"] == f'"{digest}"'
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["preference-applied"] == "wait=60"
    assert response.headers["location"] == f"/v1/handoffs/{response.headers['latentrelay-job']}"
    assert float(response.headers["latentrelay-cloud-ms"]) >= 0
    assert "idempotency-replayed" not in response.headers
    assert service.status(response.headers["latentrelay-job"])["etag"] == digest


@pytest.mark.parametrize("prefer", [None, "respond-async", "handling=lenient", ""])
def test_a_client_that_does_not_wait_gets_a_job(service: Api, prefer: str | None) -> None:
    response = service.post(service.body(seed=41), **({} if prefer is None else {"Prefer": prefer}))
    assert response.status_code == 202
    status = service.checked(response)
    assert response.headers["location"] == f"/v1/handoffs/{status['id']}"
    assert response.headers["latentrelay-job"] == status["id"]
    assert response.headers["retry-after"] == "1"
    assert response.headers.get("preference-applied") == (prefer if prefer == "respond-async" else None)
    assert (status["split"], status["num_steps"]) == (2, 4)
    ended = service.ended(status["id"])
    assert ended["state"] == "done"
    assert (ended["step"], ended["next_step"], ended["attempts"]) == (2, 2, 1)
    assert ended["problem"] is None
    assert 0 < ended["expires_in_s"] <= service.facts["ttl_s"]


def test_a_wait_that_is_too_short_ends_in_a_job(service: Api) -> None:
    response = service.post(service.long_body(), Prefer="wait=0.05")
    try:
        assert response.status_code == 202, response.text
        assert response.headers["preference-applied"] == "wait=0.05"
        assert service.checked(response)["state"] in ("queued", "running")
    finally:
        service.http.delete(response.headers["location"])


def test_the_same_key_is_the_same_job(service: Api) -> None:
    mine = key()
    first = service.post(service.body(seed=5), Prefer="wait=60", Idempotency_Key=mine)
    again = service.post(service.body(seed=5), Prefer="wait=60", Idempotency_Key=mine)
    asked = service.post(service.body(seed=5), Idempotency_Key=mine)
    assert (first.status_code, again.status_code, asked.status_code) == (200, 200, 202)
    assert first.headers["latentrelay-job"] == again.headers["latentrelay-job"] == asked.headers["latentrelay-job"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == asked.headers["idempotency-replayed"] == "true"
    assert first.content == again.content
    assert asked.json()["state"] == "done"


def test_without_a_key_every_request_is_a_job(service: Api) -> None:
    assert service.made().headers["latentrelay-job"] != service.made().headers["latentrelay-job"]


def test_a_key_with_another_body_is_refused(service: Api) -> None:
    mine = key()
    service.post(service.body(seed=6), Prefer="wait=60", Idempotency_Key=mine)
    response = service.post(service.body(seed=7), Prefer="wait=60", Idempotency_Key=mine)
    service.problem(response, 422, "idempotency-key-reused")


def test_keys_belong_to_their_caller(service: Api) -> None:
    mine = key()
    first = service.post(service.body(seed=8), Prefer="wait=60", Idempotency_Key=mine)
    with service.client("bob") as bob:
        other = service.post(service.body(seed=9), http=bob, Prefer="wait=60", Idempotency_Key=mine)
    assert other.status_code == 200
    assert first.headers["latentrelay-job"] != other.headers["latentrelay-job"]


def test_one_key_sent_at_once_is_one_job(service: Api) -> None:
    mine = key()
    answers: list[Any] = []

    def ask() -> None:
        with service.client("alice") as http:
            answers.append(service.post(service.body(seed=10), http=http, Prefer="wait=60", Idempotency_Key=mine))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert [each.status_code for each in answers] == [200] * 5
    assert len({each.headers["latentrelay-job"] for each in answers}) == 1
    assert sum("idempotency-replayed" not in each.headers for each in answers) == 1


@pytest.mark.parametrize("bad", ["", "x" * 129, "tab\there"])
def test_a_key_that_is_none_is_refused(service: Api, bad: str) -> None:
    service.problem(service.post(Idempotency_Key=bad), 400, "bad-idempotency-key", "idempotency-key")


def test_two_keys_are_refused(service: Api) -> None:
    headers = [("Idempotency-Key", "one"), ("Idempotency-Key", "two")]
    response = service.http.post("/v1/handoffs", json=service.body(), headers=headers)
    service.problem(response, 400, "bad-idempotency-key", "idempotency-key")


def test_a_client_that_leaves_with_a_key_finds_its_result(service: Api) -> None:
    mine, body = key(), service.body(num_steps=40, split=40, seed=12)
    with service.client("alice") as http, pytest.raises(Exception, match="timed out"):
        http.post(
            "/v1/handoffs",
            json=body,
            headers={"Prefer": "wait=60", "Idempotency-Key": mine},
            timeout=(30, 0.01, 30, 30),
        )
    deadline = time.monotonic() + 60
    while True:
        again = service.post(body, Prefer="wait=60", Idempotency_Key=mine)
        if again.status_code == 200 or time.monotonic() > deadline:
            break
    assert again.status_code == 200
    assert service.status(again.headers["latentrelay-job"])["state"] == "done"


def test_equal_requests_give_equal_bytes(service: Api) -> None:
    assert service.made(seed=13).content == service.made(seed=13).content
    assert service.made(seed=14).content != service.made(seed=13).content


def test_newer_wire_versions_are_chosen_when_the_client_reads_them(service: Api) -> None:
    versions = service.facts["wire_versions"]
    assert versions[-1] == "1.0"
    blobs = {each: service.made(wire_versions=[each]).content for each in versions}
    for version, blob in blobs.items():
        assert metadata(blob)["schema_version"] == version
    assert metadata(service.made(wire_versions=["1.0", versions[0], "9.9"]).content)["schema_version"] == versions[0]
    assert metadata(service.made().content)["schema_version"] == "1.0"


def test_no_wire_version_in_common_is_refused(service: Api) -> None:
    document = service.problem(
        service.post(service.body(wire_versions=["2.0", "7.1"])), 406, "wire-version", "wire_versions"
    )
    assert "2.0" in json.dumps(document["got"])
    assert service.facts["wire_versions"][0] in json.dumps(document["expected"])


def test_keys_of_a_newer_request_version_are_kept_out_of_the_way(service: Api) -> None:
    newer = service.body(schema_version="1.7", sharpness=3)
    assert service.post(newer, Prefer="wait=60").status_code == 200
    service.problem(service.post(service.body(sharpness=3)), 422, "invalid-request", "sharpness")


def test_a_trace_is_answered(service: Api) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    response = service.post(service.body(), Prefer="wait=60", traceparent=f"00-{trace}-00f067aa0ba902b7-01")
    version, answered, span, flags = response.headers["traceresponse"].split("-")
    assert (version, answered, flags) == ("00", trace, "01")
    assert span != "00f067aa0ba902b7"
    assert "traceresponse" not in service.made().headers


def metadata(blob: bytes) -> dict[str, Any]:
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return dict(json.loads(header["__metadata__"]["latentrelay"]))
