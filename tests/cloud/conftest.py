"""A tiny engine for the whole session, and real servers on loopback sockets."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.jobs import JobBoard, JobOptions
from latentrelay.cloud.serve import CloudServer


@contextmanager
def running(
    engine: Engine, *, token: str | None = None, app: dict[str, Any] | None = None, **options: Any
) -> Iterator[CloudServer]:
    """A server in a thread, stopped and joined at the end. app: more arguments of `create_app`."""
    server = CloudServer(create_app(engine, token=token, **(app or {})), **options)
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


class Gate:
    """Between the batcher and the network: counts calls and their rows, holds them back, or makes them fail."""

    def __init__(self, unet: Any) -> None:
        self.rows: list[int] = []
        self.timesteps: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.fault: Callable[[int], BaseException | None] = lambda rows: None
        self._open = threading.Event()
        self._open.set()
        self._permits = threading.Semaphore(0)
        unet.register_forward_pre_hook(self._before)

    def _before(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if type(arguments[0]).__name__ == "FakeTensor":
            return  # the memory forecast, which calls nothing
        self.rows.append(len(arguments[0]))
        self.timesteps.append(arguments[1].flatten().tolist())
        self.entered.release()
        while not self._open.is_set() and not self._permits.acquire(timeout=0.02):
            pass
        fault = self.fault(len(arguments[0]))
        if fault is not None:
            raise fault

    def hold(self) -> None:
        """From now on calls wait inside the network."""
        self._open.clear()

    def let(self, calls: int = 1) -> None:
        """Let so many held calls go on, and wait until the call after the last has come: the rest is held."""
        for _ in range(calls):
            self.await_call()
            self._permits.release()
        self.await_call()
        self.entered.release()

    def await_call(self) -> None:
        """Wait until a call that was not yet waited for has come."""
        if not self.entered.acquire(timeout=60):
            raise TimeoutError("the network was not called")

    def release(self) -> None:
        """Hold nothing back any more."""
        self._open.set()


@pytest.fixture
def gated(tiny: Any, tmp_path: Any) -> Iterator[tuple[Engine, Gate]]:
    """An engine of its own and the gate before its network, open at first."""
    pipeline = tiny.make_pipeline(tmp_path)
    gate = Gate(pipeline.unet)
    yield Engine(pipeline, name="gated"), gate
    gate.release()


@pytest.fixture
def batching() -> Iterator[Callable[..., Any]]:
    """`batching(engine, started=True, **options)`: a Batcher, closed after the test."""
    from latentrelay.cloud.batcher import Batcher

    with ExitStack() as stack:

        def make(engine: Engine, *, started: bool = True, **options: Any) -> Any:
            batcher = Batcher(engine, **options)
            stack.callback(batcher.close)
            if started:
                batcher.start()
            return batcher

        yield make


@pytest.fixture(scope="session")
def wanted() -> Callable[..., Any]:
    """`wanted(**changes)`: a RunRequest of six steps for the tiny model."""
    from latentrelay.cloud.requests import RunRequest

    def make(**changes: Any) -> Any:
        fields: dict[str, Any] = {"prompt": "the red cat", "negative_prompt": "on", "seed": 11, "guidance": 5.0}
        fields |= {"height": 16, "width": 16, "num_steps": 6, "split": 3, "dtype": "float32"}
        return RunRequest(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def thread_runs() -> Any:
    """tests/cloud/thread_runs.py as a module: a runner of real threads for the job board, and a board as a process."""
    path = Path(__file__).with_name("thread_runs.py")
    spec = importlib.util.spec_from_file_location("thread_runs", path)
    if spec is None or spec.loader is None:
        raise ImportError(path.name)
    module = sys.modules["thread_runs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def boards(thread_runs: Any, store: FolderStore) -> Iterator[Callable[..., tuple[JobBoard, Any]]]:
    """`boards("a", limit=..., observer=..., **options)`: another started replica of the model "a" on the store, and its
    runner."""
    made: list[tuple[JobBoard, Any]] = []

    def another(
        model: str = "m", *, limit: int = 64, observer: Any = None, paused: bool = False, **options: Any
    ) -> tuple[JobBoard, Any]:
        runs = thread_runs.ThreadRuns(limit=limit)
        if paused:
            runs.gate.clear()
        board = JobBoard(
            FolderStore(store.folder),
            runs,
            options=JobOptions(**{"poll_s": 0.02, **options}),
            observer=observer,
            model=model,
        )
        board.start()
        made.append((board, runs))
        return board, runs

    yield another
    for board, runs in made:
        board.close()
        runs.close()


@pytest.fixture
def accept(thread_runs: Any) -> Callable[..., str]:
    """`accept(board, prompt, key=..., **facts)`: the id of a job of "me"."""

    def accepted(board: JobBoard, prompt: str = "a fox", *, key: str | None = None, **facts: Any) -> str:
        document = thread_runs.body(prompt, **facts)
        return board.accept(thread_runs.parsed(document), document, owner="me", key=key).id

    return accepted
