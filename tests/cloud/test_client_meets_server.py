"""The runtime's clients against the running service: what crosses, which error each refusal becomes, and a network
between them that cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime import AsyncCloudClient
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.cloud_retries import RetryPolicy
from latentrelay.runtime.errors import CloudRefusedError, CloudUnavailableError, RunCancelledError
from latentrelay.runtime.handoff_request import HandoffRequest

TOKEN = "correct horse"


def request(**changes: Any) -> HandoffRequest:
    fields: dict[str, Any] = {"prompt": "a cat", "height": 16, "width": 16, "num_steps": 4, "split": 2}
    return HandoffRequest(**{**fields, **changes})


@pytest.fixture
def server(engine: Engine, start: Callable[..., CloudServer]) -> CloudServer:
    return start(engine, token=TOKEN)


@pytest.fixture
def cloud(server: CloudServer) -> Iterator[CloudClient]:
    with CloudClient(server.url, token=TOKEN) as client:
        yield client


def test_a_handoff_crosses_whole(cloud: CloudClient, engine: Engine) -> None:
    served = cloud.capabilities()
    wanted = request(
        dtype="float32",
        sampler="dpmsolver++",
        model_digest=served["model"]["digest"],
        scheduler_digest=served["samplers"]["dpmsolver++"]["scheduler_digest"],
    )
    handoff = cloud.handoff(wanted)
    here = engine.run(RunRequest(**wanted.to_dict(), wire_versions=("1.1",)))
    assert handoff == here
    assert handoff.meta.schema_version == "1.1"
    np.testing.assert_array_equal(handoff.latents, here.latents)


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"model_digest": "sha256:" + "0" * 64}, 409, "model_digest"),
        ({"sampler": "euler"}, 409, "sampler"),
        ({"num_steps": 10**6}, 422, "num_steps"),
        ({"prompt": "x" * 100_000}, 413, "body"),
    ],
)
def test_refusals_keep_status_and_field(cloud: CloudClient, changes: dict[str, Any], status: int, field: str) -> None:
    with pytest.raises(CloudRefusedError) as caught:
        cloud.handoff(request(**changes))
    assert (caught.value.status, caught.value.problem["field"]) == (status, field)


def test_a_wrong_token_is_a_refusal(server: CloudServer) -> None:
    with CloudClient(server.url, token="wrong") as client, pytest.raises(CloudRefusedError) as caught:
        client.handoff(request())
    assert caught.value.status == 401


def test_a_service_that_ended_is_unavailable(engine: Engine, start: Callable[..., CloudServer]) -> None:
    server = CloudServer(start(engine).app, port=0)
    server.stop()
    server.run()
    with CloudClient(server.url) as client, pytest.raises(CloudUnavailableError):
        client.handoff(request())


LONG_S = 120.0  # patience on a machine with other things to do
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.1)
SLOW = {"height": 64, "width": 64, "num_steps": 200, "split": 200}  # seconds of work


def both(url: str, wanted: HandoffRequest, **options: Any) -> list[Any]:
    """The handoff by the sync and by the asyncio client."""

    async def by_async() -> Any:
        async with AsyncCloudClient(url, token=TOKEN, retries=QUICK, timeout_s=LONG_S) as client:
            return await client.handoff(wanted, **options)

    with CloudClient(url, token=TOKEN, retries=QUICK, timeout_s=LONG_S) as client:
        return [client.handoff(wanted, **options), asyncio.run(by_async())]


@pytest.mark.parametrize("split", [0, 2, 4])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_both_clients_get_the_same(server: CloudServer, split: int, dtype: str) -> None:
    first, second = both(server.url, request(split=split, dtype=dtype, deterministic=True))
    assert first.to_bytes() == second.to_bytes()
    assert first.meta.next_step == split


def test_progress_and_previews(server: CloudServer) -> None:
    told: list[Any] = []
    shown: list[Any] = []
    wanted = request(num_steps=20, split=16, height=64, width=64)
    for handoff in both(server.url, wanted, on_progress=told.append, on_preview=shown.append):
        assert handoff.meta.next_step == 16
    assert [each.step for each in told if each.state == "done"] == [16, 16]
    assert {(each.split, each.num_steps) for each in told} == {(16, 20)}
    assert all(each.rgb.shape[2] == 3 and each.where == "cloud" for each in shown)


def test_one_key_is_one_job(server: CloudServer) -> None:
    wanted = request(deadline_ms=60_000)
    with CloudClient(server.url, token=TOKEN) as client:
        first = client.handoff(wanted, idempotency_key="mine")
        assert client.handoff(wanted, idempotency_key="mine").to_bytes() == first.to_bytes()
        with pytest.raises(CloudRefusedError, match="422"):
            client.handoff(request(deadline_ms=60_000, seed=9), idempotency_key="mine")


def test_a_cancelled_run_frees_the_cloud(server: CloudServer) -> None:
    begun = threading.Event()
    with CloudClient(server.url, token=TOKEN, timeout_s=LONG_S) as client:
        with pytest.raises(RunCancelledError):
            client.handoff(request(**SLOW), on_progress=lambda progress: begun.set(), cancel=begun.is_set)
        assert client.handoff(request()).meta.next_step == 2  # and not after 200 steps
        until(lambda: client.capabilities()["queue"]["running"] == 0)


def test_a_deadline_ends_the_job_there_too(server: CloudServer) -> None:
    with CloudClient(server.url, token=TOKEN) as client:
        with pytest.raises(CloudUnavailableError) as caught:
            client.handoff(request(**SLOW), deadline_s=0.5)
        assert caught.value.kind in ("timeout", "deadline-passed", "deadline-unreachable")
        until(lambda: client.capabilities()["queue"]["running"] == 0)


def test_a_cloud_that_is_late_hands_over_early(server: CloudServer) -> None:
    wanted = request(**SLOW, accept_splits=tuple(range(1, 60)))
    with CloudClient(server.url, token=TOKEN) as client:
        client.handoff(request(height=64, width=64))  # so that the cloud has measured a step
        step_ms = client.capabilities()["step_ms"]
        handoff = client.handoff(wanted, deadline_s=max(0.5, 0.1 * step_ms))  # of 100 steps
    assert 1 <= handoff.meta.next_step < 200
    assert handoff.meta.num_steps == 200


def until(holds: Callable[[], bool]) -> None:
    """Wait for something that another process does in its own time."""
    pause = threading.Event()
    for _ in range(int(LONG_S * 20)):
        if holds():
            return
        pause.wait(0.05)
    raise AssertionError("it did not come about")


class CuttingProxy:
    """Passes bytes on to a server; connection number n is reset after `cuts[n]` bytes of what comes back."""

    def __init__(self, url: str, cuts: list[int]) -> None:
        parts = urlsplit(url)
        self._target, self._cuts = (parts.hostname, parts.port), cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._threads:
            each.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                left = self._cuts[self.connections] if self.connections < len(self._cuts) else None
                self.connections += 1
                for arguments in ((near, far, None), (far, near, left)):
                    self._threads.append(threading.Thread(target=self._pump, args=arguments))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536 if left is None else max(1, left)):
                sink.sendall(data)
                left = None if left is None else left - len(data)
                if left is not None and left <= 0:
                    sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def cutting(server: CloudServer) -> Iterator[Callable[[list[int]], CuttingProxy]]:
    """A proxy in front of the server that stops with the test."""
    proxies: list[CuttingProxy] = []

    def start(cuts: list[int]) -> CuttingProxy:
        proxies.append(CuttingProxy(server.url, cuts))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.stop()


@pytest.mark.parametrize("told", [True, False])
def test_a_network_that_resets_every_tenth_byte(
    server: CloudServer, cutting: Callable[[list[int]], CuttingProxy], told: bool
) -> None:
    """Each connection lives ten bytes longer than the one before it, whatever is on it; the bytes are the same."""
    wanted = request(split=3, deterministic=True)
    more: dict[str, Any] = {"on_progress": lambda progress: None} if told else {}
    proxy = cutting([*range(10, 2600, 40 if told else 20)])
    with CloudClient(proxy.url, token=TOKEN, retries=QUICK, timeout_s=LONG_S) as client:
        handoff = client.handoff(wanted, **more)
        attempts = client.attempts
    with CloudClient(server.url, token=TOKEN) as client:
        assert client.handoff(wanted).to_bytes() == handoff.to_bytes()
    assert attempts >= 20
    assert proxy.connections >= attempts
