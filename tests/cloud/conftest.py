"""A tiny engine for the whole session, and real servers on loopback sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.serve import CloudServer


@contextmanager
def running(engine: Engine, *, token: str | None = None, **options: Any) -> Iterator[CloudServer]:
    """A server in a thread, stopped and joined at the end."""
    server = CloudServer(create_app(engine, token=token), **options)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    try:
        if not ready.wait(20):
            raise TimeoutError("the server did not start")
        yield server
    finally:
        server.stop()
        thread.join(20)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


@pytest.fixture(scope="session")
def engine(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny.make_pipeline(tmp_path_factory.mktemp("pipeline")), name="tiny")


@pytest.fixture(scope="session")
def client(engine: Engine) -> Iterator[httpx.Client]:
    """A client of one running server that serves `engine`, with the headers a handoff needs."""
    with running(engine) as server, httpx.Client(base_url=server.url, headers={"Prefer": "wait"}, timeout=30) as client:
        yield client


@pytest.fixture
def start() -> Iterator[Callable[..., CloudServer]]:
    """`start(engine, token=..., **options)`: another running server, stopped after the test."""
    with ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(running(engine, **options))
