"""Clocks that are wrong, and jump: no deadline, no time to live and no retry is counted by the time of day."""

from __future__ import annotations

import time
from typing import Any

import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.handoff_request import HandoffRequest

LONG_S = 120.0
DAY_S = 86_400.0


def _fields(seed: int, steps: int = 20) -> dict[str, Any]:
    return {
        "prompt": "the red cat", "seed": seed, "height": 64, "width": 64, "num_steps": steps, "split": steps,
        "deterministic": True, "deadline_ms": int(1000 * LONG_S),
    }  # fmt: skip


@pytest.mark.parametrize("jump_s", [2 * DAY_S, -2 * DAY_S], ids=["forward", "back"])
def test_the_servers_clock_jumps_while_a_job_runs_and_one_waits(server: Any, processes: Any, jump_s: float) -> None:
    server.ensure()
    first = 100 if jump_s > 0 else 110  # other seeds: an identical request would be answered from the cache
    made = processes.post(server.url, _fields(first, steps=1), key=f"made-{jump_s}", prefer="wait=60")
    assert made.status_code == 200
    jobs = [processes.post(server.url, _fields(first + 1 + n), key=f"{jump_s}-{n}").json()["id"] for n in range(2)]
    processes.wait_for(server.url, jobs[0], ready=lambda status: status["step"] >= 1)
    assert processes.status(server.url, jobs[1])["state"] == "queued"
    server.set_clock(jump_s)
    for job in jobs:
        assert processes.blob(server.url, job, seconds=LONG_S)
    server.set_clock(0)
    for job in (made.headers["latentrelay-job"], *jobs):
        ended = processes.status(server.url, job)
        assert ended["state"] == "done"
        assert 0 < ended["expires_in_s"] <= 600
        assert processes.blob(server.url, job)


def test_the_clock_jumps_while_the_server_is_down(server: Any, processes: Any) -> None:
    server.ensure()
    made = processes.post(server.url, _fields(95, steps=1), key="before-the-jump", prefer="wait=60")
    job = processes.post(server.url, _fields(96), key="across-the-jump").json()["id"]
    processes.wait_for(server.url, job, ready=lambda status: status["step"] >= 1)
    etag = made.headers["etag"].strip('"')
    processes.until(lambda: (server.store / "blob" / etag).is_file())
    server.kill()
    server.set_clock(-2 * DAY_S)
    server.start()
    assert processes.blob(server.url, job, seconds=LONG_S)
    assert processes.blob(server.url, made.headers["latentrelay-job"]) == made.content


@pytest.mark.parametrize("offset_s", [400 * DAY_S, -400 * DAY_S], ids=["ahead", "behind"])
def test_the_devices_clock_is_wrong(server: Any, monkeypatch: pytest.MonkeyPatch, offset_s: float) -> None:
    server.ensure()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + offset_s)
    with CloudClient(server.url) as client:
        handoff = client.handoff(HandoffRequest(**_fields(97, steps=2)), deadline_s=LONG_S)
    assert handoff.latents.shape == (1, 4, 32, 32)
    assert client.attempts == 1
