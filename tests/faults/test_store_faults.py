"""The store fails under a running server: it is full, or somebody removes it. Nothing accepted is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.errors import CloudUnavailableError
from latentrelay.runtime.handoff_request import HandoffRequest

LONG_S = 120.0


def _fields(seed: int, steps: int = 20) -> dict[str, Any]:
    return {
        "prompt": "the red cat", "seed": seed, "height": 64, "width": 64, "num_steps": steps, "split": steps,
        "deterministic": True,
    }  # fmt: skip


@pytest.fixture(params=["file system", "file size limit"])
def full(request: pytest.FixtureRequest, server: Any) -> Callable[[], Any]:
    """`with full():` no file of the store can grow: ENOSPC of a file system, or EFBIG of a limit on the process."""
    server.ensure()
    if request.param == "file system" and not server.small:
        pytest.skip("this user may not mount a file system of its own")
    return server.filled if request.param == "file system" else server.without_room


def test_a_store_that_is_full_for_a_while(
    server: Any, processes: Any, full: Callable[[], Any], request: pytest.FixtureRequest
) -> None:
    name = request.node.name
    first = 200 + 10 * len(name)  # other seeds for each: an identical request would be answered from the cache
    running = processes.post(server.url, _fields(first), key=f"{name}-running").json()["id"]
    processes.wait_for(server.url, running, ready=lambda status: status["step"] >= 1)
    with full():
        refused = processes.post(server.url, _fields(first + 1), key=f"{name}-refused")
        assert (refused.status_code, refused.json()["title"]) == (503, "Store full")
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 503
        assert httpx.get(f"{server.url}/healthz", timeout=60).status_code == 200
        with CloudClient(server.url) as client, pytest.raises(CloudUnavailableError, match="store is full"):
            client.handoff(HandoffRequest(**_fields(first + 2)), deadline_s=5)
        blob = processes.blob(server.url, running, seconds=LONG_S)  # from memory
    processes.until(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200)
    etag = processes.status(server.url, running)["etag"]
    processes.until(lambda: (server.store / "blob" / etag).is_file())  # and now on the disk
    assert (server.store / "blob" / etag).read_bytes() == blob
    asked_again = processes.post(server.url, _fields(first + 1), key=f"{name}-refused")
    assert asked_again.status_code == 202
    assert processes.blob(server.url, asked_again.json()["id"], seconds=LONG_S)


def test_a_client_outwaits_a_full_store(server: Any, processes: Any) -> None:
    server.ensure()
    with CloudClient(server.url) as client:
        with server.without_room():
            thread, result = processes.asking(client, HandoffRequest(**_fields(60, steps=2)), LONG_S)
            processes.until(lambda: "503" in _statuses(server, "/v1/handoffs") or bool(result))
            assert not result, result
        thread.join(LONG_S)
        assert result
        assert not isinstance(result[0], BaseException), result[0]
        assert result[1] > 1


def test_a_store_wiped_while_a_job_runs(server: Any, processes: Any) -> None:
    server.ensure()
    running = processes.post(server.url, _fields(70), key="wiped-while").json()["id"]
    processes.wait_for(server.url, running, ready=lambda status: status["step"] >= 1)
    server.wipe()
    anew = processes.post(server.url, _fields(71, steps=2), key="after-wiping")
    assert anew.status_code == 202
    for job in (running, anew.json()["id"]):
        blob = processes.blob(server.url, job, seconds=LONG_S)
        assert processes.blob(server.url, job) == blob
        assert processes.status(server.url, job)["state"] == "done"
    again = processes.post(server.url, _fields(70), key="wiped-while")
    assert again.json()["id"] == running
    assert again.headers["idempotency-replayed"] == "true"


def test_a_result_wiped_after_it_was_made(server: Any, processes: Any) -> None:
    """What is gone is said to be gone, and made again when it is asked for."""
    server.ensure()
    made = processes.post(server.url, _fields(80, steps=2), key="gone", prefer="wait=60")
    assert made.status_code == 200
    job = made.headers["latentrelay-job"]
    processes.until(lambda: (server.store / "blob" / made.headers["etag"].strip('"')).is_file())
    server.wipe()
    assert processes.get(server.url, job).status_code in (404, 410)
    with CloudClient(server.url) as client:
        handoff = client.handoff(HandoffRequest(**_fields(80, steps=2)), deadline_s=LONG_S, idempotency_key="gone")
    assert handoff.latents.shape == (1, 4, 32, 32)


def _statuses(server: Any, route: str) -> set[str]:
    """The statuses that a route has answered with, as the metrics say."""
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return {
        line.split('status="')[1].split('"')[0]
        for line in lines
        if line.startswith("latentrelay_requests_total{") and f'route="{route}"' in line
    }
