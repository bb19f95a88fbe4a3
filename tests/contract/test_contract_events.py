"""The event stream of a job: progress in order, one last event, previews where asked for, a sign of life between."""

from __future__ import annotations

import base64
from typing import Any

import pytest

EVENTS = "text/event-stream"
Api = Any


def collect(service: Api, job: str, read_events: Any, most: int = 10_000) -> list[tuple[str, dict[str, Any]]]:
    """All events of a job, at most so many."""
    found: list[tuple[str, dict[str, Any]]] = []
    with service.http.stream("GET", f"/v1/handoffs/{job}", headers={"Accept": EVENTS}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].split(";")[0] == EVENTS
        assert response.headers["cache-control"] == "no-store"
        for each in read_events(response.iter_lines()):
            found.append(each)
            if len(found) >= most:
                break
    return found


def test_progress_then_done(service: Api, read_events: Any) -> None:
    body = service.body(num_steps=60, split=60, seed=31, height=64, width=64)
    job = service.post(body).headers["latentrelay-job"]
    events = collect(service, job, read_events)
    names = [name for name, _ in events]
    assert names[-1] == "done"
    assert set(names[:-1]) <= {"progress"}
    steps = [status["step"] for _, status in events]
    assert steps == sorted(steps)
    assert all(status["id"] == job and status["split"] == 60 for _, status in events)
    assert "preview" not in events[0][1]
    last = events[-1][1]
    assert (last["state"], last["step"], last["etag"]) == ("done", 60, service.get(job).headers["etag"].strip('"'))


def test_a_finished_job_has_one_event(service: Api, read_events: Any) -> None:
    job = service.made().headers["latentrelay-job"]
    assert [name for name, _ in collect(service, job, read_events)] == ["done"]


def test_a_running_job_is_seen_running(service: Api, read_events: Any) -> None:
    with service.long_job() as job:
        events = collect(service, job, read_events, most=3)
    assert [name for name, _ in events] == ["progress"] * 3
    assert events[-1][1]["state"] == "running"
    assert 0 < events[-1][1]["step"] < events[-1][1]["split"]


def test_cancelling_ends_the_stream(service: Api, read_events: Any) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    with (
        service.long_job() as job,
        service.client("alice") as other,
        service.http.stream("GET", f"/v1/handoffs/{job}", headers={"Accept": EVENTS}) as response,
    ):
        for each in read_events(response.iter_lines()):
            seen.append(each)
            if len(seen) == 1:
                other.delete(f"/v1/handoffs/{job}")
    assert seen[-1][0] == seen[-1][1]["state"] == "cancelled"


def test_previews_come_with_progress_where_asked_for(service: Api, read_events: Any) -> None:
    if "preview" not in service.facts["features"]:
        pytest.skip("this service makes no previews")
    with service.long_job(preview=True) as job:
        events = collect(service, job, read_events, most=4)
    shown = [status["preview"] for name, status in events if "preview" in status]
    assert shown
    for each in shown:
        assert len(base64.b64decode(each["rgb"])) == each["height"] * each["width"] * 3


def test_a_client_that_stops_reading_events_leaves_the_job_alone(service: Api, read_events: Any) -> None:
    with service.long_job() as job:
        collect(service, job, read_events, most=1)
        seen = service.status(job)["step"]
        service.until(job, lambda status: status["step"] > seen)


def test_no_events_of_what_is_not_there(service: Api) -> None:
    service.problem(service.get("0" * 32, EVENTS), 404, "unknown-handoff")
    job = service.made().headers["latentrelay-job"]
    service.http.delete(f"/v1/handoffs/{job}")
    service.problem(service.get(job, EVENTS), 410, "deleted")
