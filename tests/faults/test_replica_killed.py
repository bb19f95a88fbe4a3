"""`latentrelay serve --ray`: a replica is killed in the middle of its jobs, and the other one finishes them."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
LONG_S = 300.0
JOBS = 4


def _fields(seed: int) -> dict[str, Any]:
    return {
        "prompt": "the red cat", "seed": seed, "height": 64, "width": 64, "num_steps": 40, "split": 40,
        "deterministic": True,
    }  # fmt: skip


@pytest.fixture
def replicas(processes: Any, model_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Two replicas, by the command; at the end nothing of it may be left."""
    server = processes.ServerProcess(model_folder, tmp_path / "ray", arguments=("--ray", "--replicas", "2"))
    with server:
        yield server.start(wait_s=LONG_S)
        assert server.terminate(wait_s=120) == 0
        processes.until(lambda: not _left(tmp_path), seconds=60)


def test_a_replica_killed_in_the_middle_of_its_jobs(replicas: Any, processes: Any, model_folder: Path) -> None:
    url = replicas.url
    jobs = [processes.post(url, _fields(seed), key=f"job-{seed}").json()["id"] for seed in range(JOBS)]
    with CloudClient(url) as client:
        told: list[Any] = []
        thread, result = processes.asking(
            client, HandoffRequest(**_fields(JOBS)), LONG_S, on_progress=lambda each: told.append(each.step)
        )
        processes.until(lambda: bool(told and told[-1] >= 1) or bool(result), seconds=LONG_S)
        busy = _busiest(url)
        os.kill(busy, signal.SIGKILL)
        started = time.monotonic()
        blobs = [processes.blob(url, job, seconds=LONG_S) for job in jobs]
        thread.join(LONG_S)
    assert result
    assert not isinstance(result[0], BaseException), result[0]
    assert blobs == [_alone(model_folder, _fields(seed)) for seed in range(JOBS)]
    alone = Handoff.from_bytes(_alone(model_folder, _fields(JOBS)))
    assert result[0].latents.tobytes() == alone.latents.tobytes()
    states = [processes.status(url, job) for job in jobs]
    assert {each["state"] for each in states} == {"done"}
    assert sum(_samples(url, "latentrelay_jobs_recovered_total").values()) >= 1  # taken over by the other replica
    assert len(set(jobs)) == JOBS
    replayed = processes.post(url, _fields(0), key="job-0")
    assert replayed.json()["id"] == jobs[0]
    processes.until(lambda: len(_replicas(url)) == 2 and busy not in _replicas(url), seconds=LONG_S)
    print(f"all {JOBS + 1} done {time.monotonic() - started:.1f} s after the kill")


def _alone(model_folder: Path, fields: dict[str, Any]) -> bytes:
    """What one thread makes when nothing happens to it."""
    import torch
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.requests import RunRequest

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))  # as each of the two replicas has
    try:
        return Engine.load(str(model_folder)).run(RunRequest(**fields)).to_bytes()
    finally:
        torch.set_num_threads(threads)


def _samples(url: str, name: str) -> dict[int, float]:
    """Process id of each replica -> the value of a metric without other labels."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line.removeprefix(f'{name}{{replica="').split('"} ') for line in lines if line.startswith(f"{name}{{")]
    return {int(replica): float(value) for replica, value in found if replica.isdecimal()}


def _replicas(url: str) -> set[int]:
    return set(_samples(url, "latentrelay_in_flight"))


def _busiest(url: str) -> int:
    load = _samples(url, "latentrelay_in_flight")
    while len(load) < 2:  # a replica that is busy may have missed the scrape
        load = _samples(url, "latentrelay_in_flight")
    return max(load, key=lambda pid: load[pid])


def _left(folder: Path) -> list[int]:
    """Living processes that were started with this test's environment."""
    left = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"LATENTRELAY_TEST_CLOCK={folder}".encode() in environment:
                left.append(int(entry.name))
    return left
