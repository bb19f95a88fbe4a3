"""The end of a server: nothing new is taken on, those who wait are answered, and the store's jobs go on elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime.handoff import Handoff

BODY = {"prompt": "the red cat", "seed": 3, "height": 16, "width": 16, "num_steps": 4, "split": 2}
KEY = {"Idempotency-Key": "one job"}


class Held:
    """An engine whose network waits until it is let go on."""

    def __init__(self, tiny: Any, folder: Path) -> None:
        pipeline = tiny.make_pipeline(folder)
        self.begun, self.go_on = threading.Event(), threading.Event()
        pipeline.unet.register_forward_pre_hook(self._wait)
        self.engine = Engine(pipeline, name="tiny")

    def _wait(self, *_: Any) -> None:
        if threading.current_thread().name == "latentrelay-batcher":
            self.begun.set()
            self.go_on.wait(60)


@pytest.fixture
def held(tiny: Any, tmp_path: Path) -> Iterator[Held]:
    made = Held(tiny, tmp_path / "pipeline")
    yield made
    made.go_on.set()


@contextmanager
def served(app: Any, shutdown_s: int = 2) -> Iterator[tuple[CloudServer, httpx.Client, Callable[[], None]]]:
    """(server, client, stop and wait for the end)."""
    server = CloudServer(app, shutdown_s=shutdown_s)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()

    def stop() -> None:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()

    try:
        assert ready.wait(30)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            yield server, client, stop
    finally:
        stop()


def in_background(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start the call on a thread; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def result() -> Any:
        thread.join(60)
        return results[0]

    return result


def test_a_waiting_client_is_told_where_its_job_is_and_the_next_server_finishes_it(
    held: Held, engine: Engine, tmp_path: Path
) -> None:
    with served(create_app(held.engine, store=FolderStore(tmp_path / "jobs"))) as (_, client, stop):
        answer = in_background(lambda: client.post("/v1/handoffs", json=BODY, headers={**KEY, "Prefer": "wait"}))
        assert held.begun.wait(30)
        let_go = threading.Timer(3, held.go_on.set)  # the step in progress ends after those who wait were answered
        let_go.start()
        stop()
        told = answer()
    assert told.status_code == 202
    location = told.headers["location"]
    with served(create_app(engine, store=FolderStore(tmp_path / "jobs"))) as (_, client, _stop):
        found = client.get(location, headers={"Prefer": "wait=60"})
        assert found.status_code == 200
        assert Handoff.from_bytes(found.content).meta.next_step == 2
        again = client.post("/v1/handoffs", json=BODY, headers={**KEY, "Prefer": "wait=60"})
        assert (again.content, again.headers["idempotency-replayed"]) == (found.content, "true")


def test_a_run_that_ends_in_time_is_answered_whole(held: Held) -> None:
    with served(create_app(held.engine), shutdown_s=60) as (server, client, stop):
        answer = in_background(lambda: client.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait"}))
        assert held.begun.wait(30)
        server.stop()
        held.go_on.set()
        assert answer().status_code == 200
        stop()


def test_a_service_that_ends_says_so(held: Held) -> None:
    app = create_app(held.engine)
    with served(app) as (_, client, _stop):
        assert client.get("/readyz").json() == {"status": "ready"}
        app.state.service.drain(30)
        for refused in (client.get("/readyz"), client.post("/v1/handoffs", json=BODY)):
            assert refused.status_code == 503
            assert refused.json()["type"] == "urn:latentrelay:problem:draining"
            assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/healthz").status_code == 200
        assert client.get("/v1/capabilities").status_code == 200


def test_event_streams_end(held: Held) -> None:
    with served(create_app(held.engine)) as (_, client, stop):
        job = client.post("/v1/handoffs", json=BODY).headers["location"]
        assert held.begun.wait(30)
        with client.stream("GET", job, headers={"Accept": "text/event-stream"}) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: progress"
            threading.Timer(3, held.go_on.set).start()
            stopping = in_background(stop)
            assert "event: done" not in list(lines)
        held.go_on.set()
        stopping()


def test_a_temporary_folder_is_gone_afterwards(engine: Engine, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with served(create_app(engine)) as (_, client, _stop):
        assert client.post("/v1/handoffs", json=BODY, headers={"Prefer": "wait"}).status_code == 200
        assert [each.name.startswith("latentrelay-jobs-") for each in tmp_path.iterdir()] == [True]
    assert list(tmp_path.iterdir()) == []
