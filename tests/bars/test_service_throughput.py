"""Throughput of the service beside diffusers' own pipeline one request after another, at 8 and 32 clients.

Distinct prompts, caches off, no decode, the same precision, threads and steps; both on loopback, in turn. Kept as
docs/measured/service_throughput.json. LATENTRELAY_BENCH_SECONDS shortens it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentrelay.tools import bench_service
from latentrelay.tools.sweep import cores

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LATENTRELAY_BENCH_SECONDS", "240"))
LEAST_RATIO, LEAST_OF_STATIC = 1.5, 0.9
LATENCY_SLACK = 1.0  # p95 at 8 clients: no worse than one by one


@pytest.fixture(scope="module")
def documents(measured: Callable[[str, dict[str, Any]], Path]) -> Iterator[dict[int, dict[str, Any]]]:
    found = {
        clients: bench_service.measure(clients, SECONDS, "reference", 25, 8, cores(), 5, True) for clients in (8, 32)
    }
    measured("service_throughput", {"clients": {str(clients): document for clients, document in found.items()}})
    return found


@pytest.mark.parametrize("clients", [8, 32])
def test_batching_beats_one_by_one_or_comes_near_what_the_cores_allow(
    documents: dict[int, dict[str, Any]], clients: int
) -> None:
    document = documents[clients]
    ratio, of_static = document["throughput_ratio"], document["static_batch_ratio"]
    assert ratio >= LEAST_RATIO or of_static >= LEAST_OF_STATIC, (ratio, of_static)


def test_the_slow_tail_at_eight_clients_is_no_worse(documents: dict[int, dict[str, Any]]) -> None:
    assert documents[8]["p95_ratio"] <= LATENCY_SLACK


@pytest.mark.parametrize("clients", [8, 32])
def test_nothing_is_lost_doubled_or_damaged(documents: dict[int, dict[str, Any]], clients: int) -> None:
    document = documents[clients]
    assert (document["lost"], document["duplicated"], document["damaged"]) == (0, 0, 0), document["lost_reasons"]
    assert document["agreement_db"] >= 50  # both sides made the same latents
    assert document["cpu_share"]["clients"] < 0.02  # the clients left the cores to the servers
