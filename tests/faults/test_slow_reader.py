"""Clients that read slowly get everything; clients that do not read at all keep nobody else waiting."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.handoff_request import HandoffRequest

LONG_S = 120.0
BIG: dict[str, Any] = {
    "prompt": "the red cat", "seed": 5, "height": 512, "width": 512, "num_steps": 4, "split": 0, "dtype": "float32",
}  # fmt: skip
SMALL = BIG | {"height": 16, "width": 16}
CROWD = 24


@pytest.fixture
def deaf(server: Any, processes: Any) -> Iterator[list[socket.socket]]:
    """Connections that ask for a blob of a mebibyte, and for events, and read nothing of the answers."""
    server.ensure()
    made = processes.post(server.url, BIG, key="big", prefer="wait=60")
    assert made.status_code == 200
    assert len(made.content) > 1_000_000
    path = f"/v1/handoffs/{made.headers['latentrelay-job']}"
    with ExitStack() as stack:
        connections = []
        for nth in range(CROWD):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            accept = "text/event-stream" if nth % 4 == 0 else "*/*"
            head = f"GET {path} HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\n\r\n"
            connection.sendall(head.encode())
            connections.append(connection)
        yield connections


def test_a_slow_reader_gets_everything(server: Any, processes: Any, proxies: Any) -> None:
    server.ensure()
    with CloudClient(server.url) as client:
        expected = client.handoff(HandoffRequest(**BIG), deadline_s=LONG_S)
    with (
        proxies.CuttingProxy(server.port, lambda _: proxies.Cut(bytes_per_s=500_000)) as proxy,
        CloudClient(proxy.url) as slow,
        CloudClient(server.url) as quick,
    ):
        thread, result = processes.asking(slow, HandoffRequest(**BIG), LONG_S)
        processes.until(lambda: proxy.passed[1] > 100_000)
        assert quick.handoff(HandoffRequest(**SMALL), deadline_s=LONG_S).latents.shape == (1, 4, 8, 8)
        assert not result  # the other one still reads
        thread.join(LONG_S)
        assert result
        assert not isinstance(result[0], BaseException), result[0]
        assert result[0].latents.tobytes() == expected.latents.tobytes()


def test_who_does_not_read_keeps_nobody_waiting(server: Any, deaf: list[socket.socket]) -> None:
    with CloudClient(server.url) as client:
        for seed in range(3):
            fields = SMALL | {"seed": seed, "split": 2}
            assert client.handoff(HandoffRequest(**fields), deadline_s=LONG_S).latents.shape == (1, 4, 8, 8)
    assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200


@pytest.mark.slow
def test_who_does_not_read_is_dropped_after_a_while(server: Any, deaf: list[socket.socket]) -> None:
    time.sleep(5)
    held = _connections(server)
    assert held >= 1
    deadline = time.monotonic() + 600
    while _connections(server) > 1:
        assert time.monotonic() < deadline
        time.sleep(2)


def _connections(server: Any) -> int:
    """Sockets that the process has open to clients, as the kernel says (Linux)."""
    port = f":{server.port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as lines:
        rows = [line.split() for line in list(lines)[1:]]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)
