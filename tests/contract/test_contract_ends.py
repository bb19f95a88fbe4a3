"""How jobs end: cancelled, deleted, expired, too late; and that the same call again changes nothing."""

from __future__ import annotations

import time
from typing import Any

import pytest

HANDOFF = "application/vnd.latentrelay.handoff"
Api = Any


def test_delete_cancels_a_job(service: Api) -> None:
    with service.long_job() as job:
        service.until(job, lambda status: status["state"] == "running")
        for _ in range(2):
            response = service.http.delete(f"/v1/handoffs/{job}")
            assert response.status_code == 200
            assert service.checked(response)["state"] == "cancelled"
        assert service.status(job)["state"] == "cancelled"
        service.problem(service.get(job), 410, "cancelled")


def test_a_waiting_client_hears_of_a_cancelled_job(service: Api) -> None:
    with service.long_job() as job:
        service.http.delete(f"/v1/handoffs/{job}")
        service.problem(service.get(job, HANDOFF, Prefer="wait=30"), 410, "cancelled")


def test_a_cancelled_job_leaves_room(service: Api) -> None:
    with service.long_job() as job:
        service.until(job, lambda status: status["state"] == "running")
        service.http.delete(f"/v1/handoffs/{job}")
        assert service.made(seed=51).status_code == 200


def test_delete_removes_a_result(service: Api) -> None:
    job = service.made(seed=52).headers["latentrelay-job"]
    first = service.http.delete(f"/v1/handoffs/{job}")
    again = service.http.delete(f"/v1/handoffs/{job}")
    assert (first.status_code, again.status_code) == (200, 200)
    assert service.checked(again)["state"] == "deleted"
    service.problem(service.get(job), 410, "deleted")
    assert service.status(job)["state"] == "deleted"


def test_delete_of_what_is_not_there(service: Api) -> None:
    service.problem(service.http.delete(f"/v1/handoffs/{'0' * 32}"), 404, "unknown-handoff")


def test_a_replayed_key_of_a_deleted_job_says_so(service: Api) -> None:
    body = service.body(seed=53)
    job = service.post(body, Prefer="wait=60", Idempotency_Key="deleted-later").headers["latentrelay-job"]
    service.http.delete(f"/v1/handoffs/{job}")
    response = service.post(body, Prefer="wait=60", Idempotency_Key="deleted-later")
    service.problem(response, 410, "deleted")
    assert response.headers["idempotency-replayed"] == "true"
    assert response.headers["latentrelay-job"] == job


def test_results_expire(brief: Api) -> None:
    job = brief.post(brief.body(seed=54)).headers["latentrelay-job"]
    ended = brief.until(job, lambda status: status["state"] in ("done", "expired"))
    if ended["state"] == "done":
        assert 0 <= ended["expires_in_s"] <= 1
    expired = brief.until(job, lambda status: status["state"] == "expired")
    assert (expired["bytes"], expired["expires_in_s"]) == (None, None) or expired["expires_in_s"] in (None, 0)
    brief.problem(brief.get(job), 410, "expired")


def test_a_deadline_that_cannot_be_met_is_refused_or_passes(service: Api) -> None:
    response = service.post(service.long_body(deadline_ms=150))
    if response.status_code == 503:
        service.problem(response, 503, "deadline-unreachable")
        return
    assert response.status_code == 202
    job = response.headers["latentrelay-job"]
    ended = service.ended(job)
    assert ended["state"] == "failed"
    assert ended["problem"]["type"] == "urn:latentrelay:problem:deadline-passed"
    service.problem(service.get(job), 504, "deadline-passed")
    service.problem(service.get(job, HANDOFF, Prefer="wait=5"), 504, "deadline-passed")


def test_an_early_split_meets_a_deadline(service: Api) -> None:
    if "accept_splits" not in service.facts["features"]:
        pytest.skip("this service hands over at the split asked for only")
    body = service.long_body(deadline_ms=4000, accept_splits=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    started = time.monotonic()
    response = service.post(body)
    if response.status_code == 503:
        service.problem(response, 503, "deadline-unreachable")
        return
    ended = service.ended(response.headers["latentrelay-job"])
    assert ended["state"] in ("done", "failed")
    if ended["state"] == "done":
        assert ended["next_step"] in (*body["accept_splits"], body["split"])
        assert time.monotonic() - started < 60
