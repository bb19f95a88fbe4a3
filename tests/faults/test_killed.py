"""A server that is killed and started again on the same store: what it accepted is finished, with the same bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.cloud_retries import RetryPolicy
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest

LONG_S = 120.0  # patience on a machine with other things to do; never how long something must take
PATIENT = RetryPolicy(unreachable_s=LONG_S)  # a restart takes longer than a device would wait


def _fields(seed: int, steps: int = 30) -> dict[str, Any]:
    """A request of some seconds, exact whoever shares the machine with it."""
    return {
        "prompt": "the red cat", "seed": seed, "height": 64, "width": 64, "num_steps": steps, "split": steps,
        "deterministic": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(model_folder: Any) -> Callable[[dict[str, Any]], bytes]:
    """The bytes that a run has when nothing happens to it: made here, by an engine alone."""
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.requests import RunRequest

    engine = Engine.load(str(model_folder))
    return lambda fields: engine.run(RunRequest(**fields)).to_bytes()


@pytest.mark.parametrize("how", ["SIGKILL mid-step", "SIGTERM"])
def test_a_running_and_two_queued_jobs_survive(
    server: Any, processes: Any, undisturbed: Callable[[dict[str, Any]], bytes], how: str
) -> None:
    server.ensure()
    seeds = range(3) if how == "SIGTERM" else range(3, 6)
    answers = [processes.post(server.url, _fields(seed), key=f"{how}-{seed}") for seed in seeds]
    assert [each.status_code for each in answers] == [202, 202, 202]
    jobs = [each.json()["id"] for each in answers]
    processes.wait_for(server.url, jobs[0], ready=lambda status: status["step"] >= 3)
    assert processes.status(server.url, jobs[2])["state"] == "queued"
    if how == "SIGTERM":
        assert server.terminate() == 0
    else:
        server.kill()
    server.start()
    for seed, job in zip(seeds, jobs, strict=True):
        assert processes.blob(server.url, job, seconds=LONG_S) == undisturbed(_fields(seed))
        ended = processes.status(server.url, job)
        assert ended["state"] == "done"
        assert 1 <= ended["attempts"] <= 2
    again = processes.post(server.url, _fields(seeds[0]), key=f"{how}-{seeds[0]}")
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json()["id"] == jobs[0]  # no duplicate
    assert "red cat" not in server.log.read_text()


def test_the_client_waits_through_a_restart(
    server: Any, processes: Any, undisturbed: Callable[[dict[str, Any]], bytes]
) -> None:
    server.ensure()
    started, progress = threading.Event(), []

    def told(status: Any) -> None:
        progress.append(status)
        if status.step >= 3:
            started.set()

    with CloudClient(server.url, retries=PATIENT) as client:
        thread, result = processes.asking(client, HandoffRequest(**_fields(10)), LONG_S, on_progress=told)
        processes.until(lambda: started.is_set() or bool(result))
        assert not result, result
        server.kill()
        server.start()
        thread.join(LONG_S)
        assert result, "the client neither got a result nor an error"
        assert not isinstance(result[0], BaseException), result[0]
        assert result[0].latents.tobytes() == Handoff.from_bytes(undisturbed(_fields(10))).latents.tobytes()
        assert result[1] > 1


def test_killed_mid_transfer_the_client_resumes(
    server: Any, processes: Any, proxies: Any, undisturbed: Callable[[dict[str, Any]], bytes]
) -> None:
    server.ensure()
    fields = _fields(20) | {"split": 0, "dtype": "float32", "height": 512, "width": 512}
    whole = undisturbed(fields)  # 1 MiB
    with (
        proxies.CuttingProxy(server.port, lambda _: proxies.Cut(bytes_per_s=len(whole) / 4)) as proxy,
        CloudClient(proxy.url, retries=PATIENT) as client,
    ):
        client.capabilities()
        before = proxy.passed[1]
        thread, result = processes.asking(client, HandoffRequest(**fields), LONG_S)
        processes.until(lambda: proxy.passed[1] - before > len(whole) / 2)
        server.kill()
        proxy.cut_now()  # what the system still held for the dead process is gone too, as with a machine
        assert not result
        reached = proxy.passed[1]
        server.start()
        thread.join(LONG_S)
        assert result
        assert not isinstance(result[0], BaseException), result[0]
        assert result[0].latents.tobytes() == Handoff.from_bytes(whole).latents.tobytes()
        assert proxy.passed[1] - reached < 0.75 * len(whole)  # it went on where it was cut
        assert result[1] > 1


def test_a_store_wiped_between_two_runs_of_the_server(server: Any, processes: Any) -> None:
    server.ensure()
    job = processes.post(server.url, _fields(30), key="wiped").json()["id"]
    with CloudClient(server.url, retries=PATIENT) as client:
        started = threading.Event()
        thread, result = processes.asking(
            client, HandoffRequest(**_fields(31)), LONG_S, on_progress=lambda status: started.set()
        )
        processes.until(lambda: started.is_set() or bool(result))
        assert not result, result
        server.kill()
        server.wipe()
        server.start()
        thread.join(LONG_S)
        assert result  # what it had asked for is gone; it asks again, and gets it
        assert not isinstance(result[0], BaseException), result[0]
    gone = processes.get(server.url, job)
    assert (gone.status_code, gone.json()["title"]) == (404, "Unknown handoff")
    anew = processes.post(server.url, _fields(30), key="wiped")
    assert anew.status_code == 202
    assert processes.blob(server.url, anew.json()["id"], seconds=LONG_S)
