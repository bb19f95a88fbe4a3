"""Connections that are reset: after every tenth byte of a handoff, whichever way the bytes go; the client goes on."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest

DEADLINE_S = 120.0
AT_ONCE = 8
WAYS = ("sent", "received")
FIELDS: dict[str, Any] = {"prompt": "the red cat", "height": 16, "width": 16, "num_steps": 4, "split": 2}


def _whole(client: CloudClient, seed: int, **options: Any) -> Handoff:
    return client.handoff(HandoffRequest(**FIELDS, seed=seed, deterministic=True), deadline_s=DEADLINE_S, **options)


def _places(server: Any, proxies: Any, events: bool, every: int) -> list[tuple[int, str, int]]:
    """(connection, way, bytes) of every `every`-th byte of a whole handoff, from the capabilities to the blob."""
    with proxies.CuttingProxy(server.port, lambda _: proxies.PASS) as proxy, CloudClient(proxy.url) as client:
        _whole(client, 1, on_progress=(lambda _: None) if events else None)
        counts = list(proxy.by_connection)
    ways = [(nth, way, count) for nth, both in enumerate(counts) for way, count in zip(WAYS, both, strict=True)]
    return [(nth, way, at) for nth, way, count in ways for at in range(10, count, every)]


def _cut_at(server: Any, proxies: Any, place: tuple[int, str, int], expected: bytes, events: bool) -> bool:
    """One handoff through a proxy that resets that connection after so many bytes; whether it was cut."""
    nth, way, after = place

    def plan(connection: int) -> Any:
        return proxies.Cut(**{way: after}) if connection == nth else proxies.PASS

    with proxies.CuttingProxy(server.port, plan) as proxy, CloudClient(proxy.url) as client:
        handoff = _whole(client, 1, on_progress=(lambda _: None) if events else None)
        assert handoff.latents.tobytes() == expected, place
        return bool(proxy.cuts == 1)


def _all(server: Any, proxies: Any, events: bool, every: int) -> tuple[int, int]:
    """How many handoffs there were, and how many of them were cut; all have come."""
    server.ensure()
    with CloudClient(server.url) as client:
        expected = _whole(client, 1).latents.tobytes()
    places = _places(server, proxies, events, every)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        cut = list(pool.map(lambda place: _cut_at(server, proxies, place, expected, events), places))
    return len(places), sum(cut)


@pytest.mark.parametrize("events", [False, True], ids=["waits", "events"])
def test_a_connection_reset_somewhere(server: Any, proxies: Any, events: bool) -> None:
    count, cut = _all(server, proxies, events, every=170)
    assert count > 20
    assert cut > 0.8 * count  # a stream of events is not the same length every time


@pytest.mark.slow
@pytest.mark.parametrize("events", [False, True], ids=["waits", "events"])
def test_a_connection_reset_at_every_tenth_byte(server: Any, proxies: Any, events: bool) -> None:
    count, cut = _all(server, proxies, events, every=10)
    assert count > 300
    assert cut > 0.8 * count


def test_every_connection_is_cut_and_the_blob_still_comes(server: Any, proxies: Any) -> None:
    """No connection carries more than 24 kB to the client; the blob has 64 kB and comes piece by piece."""
    server.ensure()
    fields = FIELDS | {"height": 128, "width": 128, "split": 0, "dtype": "float32"}
    with CloudClient(server.url) as client:
        expected = client.handoff(HandoffRequest(**fields), deadline_s=DEADLINE_S)
    with (
        proxies.CuttingProxy(server.port, lambda _: proxies.Cut(received=24_000)) as proxy,
        CloudClient(proxy.url) as client,
    ):
        handoff = client.handoff(HandoffRequest(**fields), deadline_s=DEADLINE_S)
        assert handoff.latents.tobytes() == expected.latents.tobytes()
        assert proxy.cuts >= 2
        assert proxy.passed[1] < 2 * 65_536 + 20_000  # resumed, not begun again each time


def test_a_lost_answer_to_a_post_makes_no_second_job(server: Any, proxies: Any, processes: Any) -> None:
    """The POST arrives, its answer does not: asked again with the same key, it is the same job."""
    server.ensure()
    before = processes.jobs_accepted(server.url)
    done = threading.Event()

    def plan(connection: int) -> Any:
        return proxies.Cut(received=1) if connection < 3 and done.is_set() else proxies.PASS

    with proxies.CuttingProxy(server.port, plan) as proxy, CloudClient(proxy.url) as client:
        client.capabilities()
        done.set()
        client.close()
        _whole(client, 77)
        assert client.attempts > 1
    assert processes.jobs_accepted(server.url) - before == 1
