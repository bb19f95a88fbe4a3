"""Ten minutes with all cores busy: the service's memory does not grow, no job is lost, none is made twice.

Sixteen clients in a closed loop, in slices; memory is read after each. Kept as docs/measured/service_soak.json.
LATENTRELAY_SOAK_SECONDS shortens it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentrelay.tools.bench_service import server, steps_made
from latentrelay.tools.bench_service_counts import duplicates, latencies, percentile
from latentrelay.tools.service_load import Load, Requests, run_load
from latentrelay.tools.sweep import cores

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LATENTRELAY_SOAK_SECONDS", "600"))
CLIENTS, SPLIT = 16, 4
SLICES = max(8, min(20, int(SECONDS // 10)))
TTL_S = 60  # results are kept so long, far less than the soak: what is held does not grow any more
MOST_GROWTH_MIB = 16.0  # over the soak, from the median of its second quarter to that of its last
BUSY = 0.8


@pytest.fixture(scope="module")
def soak(measured: Callable[[str, dict[str, Any]], Path]) -> Iterator[dict[str, Any]]:
    threads = cores()
    asked = {"num_steps": 25, "split": SPLIT, "guidance": 4.0, "height": 128, "width": 128}
    words = ["--model", "reference", "--threads", str(threads), "--queue", "64", "--ttl", str(TTL_S)]
    loads: list[Load] = []
    memory: list[float] = []
    with server("ours", words, threads) as service:
        run_load(service.url, Requests("warm", **asked), CLIENTS, each=1)
        requests, before, spent = Requests("soak", **asked), steps_made(service.url) or 0.0, service.cpu_s() or 0.0
        idle = _ticks()
        for _ in range(SLICES):
            loads.append(run_load(service.url, requests, CLIENTS, SECONDS / SLICES))
            memory.append(service.rss_mib() or 0.0)
        made, spent = (steps_made(service.url) or 0.0) - before, (service.cpu_s() or 0.0) - spent
        idle = [after - first for first, after in zip(idle, _ticks(), strict=True)]
    answers, wall = sum(len(load.answers) for load in loads), sum(load.elapsed_s for load in loads)
    quarter = SLICES // 4
    figures = {
        "seconds": round(wall, 1),
        "clients": CLIENTS,
        "threads": threads,
        "answers": answers,
        "per_second": round(answers / wall, 3),
        "p50_ms": round(percentile(latencies(loads), 0.5), 1),
        "p95_ms": round(percentile(latencies(loads), 0.95), 1),
        "lost": sum(len(load.lost) for load in loads),
        "lost_reasons": sorted({reason for load in loads for reason in load.lost.values()})[:5],
        "duplicated": duplicates(loads),
        "damaged": sum(load.damaged for load in loads),
        "refused": sum(load.refused for load in loads),
        "steps_more_than_asked": round(made - SPLIT * answers),
        "rss_mib": [round(each, 1) for each in memory],
        "rss_growth_mib": round(
            statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter]), 2
        ),
        "cpu_share": round(spent / (threads * wall), 3),
        "machine_busy_share": round(1 - idle[0] / idle[1], 3),
    }
    measured("service_soak", figures)
    return figures


def test_memory_does_not_grow(soak: dict[str, Any]) -> None:
    assert soak["rss_growth_mib"] <= MOST_GROWTH_MIB, soak["rss_mib"]


def test_no_job_is_lost_and_none_is_made_twice(soak: dict[str, Any]) -> None:
    assert (soak["lost"], soak["duplicated"], soak["damaged"]) == (0, 0, 0), soak["lost_reasons"]
    assert soak["steps_more_than_asked"] == 0


def test_all_cores_were_busy(soak: dict[str, Any]) -> None:
    """The service's work and whatever ran beside it: an idle soak proves nothing."""
    assert soak["machine_busy_share"] >= BUSY, soak


def _ticks() -> tuple[int, int]:
    """The machine's ticks so far: idle (waiting for the disk included), and all."""
    numbers = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)
