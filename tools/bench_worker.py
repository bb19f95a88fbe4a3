"""One row in a process of its own: it loads, warms up, then runs once each time it is told to, and waits without work.

`serve` is what the child runs; `Worker` is the parent's end of it. Only one worker runs at a time, so that rows take
turns on the same cores; how much memory a row needs is the peak of its own process.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.tools.bench_rows import Row, guided, open_row
from latentrelay.tools.bench_source import Network
from numpy.typing import NDArray

WARM_UPS = 2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MIB = 1 << 20


@dataclass(frozen=True)
class Loaded:
    """What a worker says when it is warm: seconds to load, on and in what it runs, bytes, peak MiB, its answer."""

    load_s: float
    ran: str
    bytes: int
    peak_memory_mib: int
    guided: NDArray[np.float64]


@dataclass(frozen=True)
class Lap:
    """One run: wall ms, and processor time / (wall time x threads)."""

    ms: float
    cpu_share: float


def serve(pipe: Connection, row: Row, network: Network, folder: Path, threads: int) -> None:
    """The child's whole life: ("ready", Loaded) or ("failed", words), then a Lap for every "run", until "stop"."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        started = time.perf_counter()
        try:
            with silent():
                opened = open_row(row, network, folder, threads)
                load_s = time.perf_counter() - started
                for _ in range(WARM_UPS):
                    outputs = opened.run()
        except Exception as error:  # a rival's own classes; the row says why instead of vanishing
            pipe.send(("failed", f"{type(error).__name__}: {error}"[:300]))
            return
        size = sum(path.stat().st_size for path in opened.files)
        pipe.send(("ready", Loaded(load_s, opened.ran, size, peak_mib(), guided(row, network, outputs))))
        while pipe.recv() == "run":
            cpu, wall = time.process_time(), time.perf_counter()
            opened.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            pipe.send(Lap(wall * 1e3, min(1.0, cpu / (wall * threads))))


class Worker:
    """The parent's end of one row. Use it in a `with` block, which ends the child."""

    def __init__(self, row: Row, network: Network, folder: Path, threads: int) -> None:
        self.row = row
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, row, network, folder, threads), daemon=False)
        with environment(threads):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send("stop")
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def loaded(self) -> Loaded | str:
        """Wait until the row is warm; the reason where it cannot run."""
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            return self._ended()
        result: Loaded | str = value
        return result if kind == "ready" else str(value)

    def lap(self) -> Lap | str:
        """Run once; the reason where the process is gone."""
        try:
            self._pipe.send("run")
            lap: Lap = self._pipe.recv()
        except (EOFError, OSError):
            return self._ended()
        return lap

    def _ended(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        return f"its process ended with status {code}" + (" (killed: out of memory?)" if code == -9 else "")


@contextlib.contextmanager
def environment(threads: int) -> Iterator[None]:
    """What the libraries of a child read when they start: how many threads."""
    wanted: Mapping[str, str] = dict.fromkeys(THREAD_VARIABLES, str(threads))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peak_mib() -> int:
    """The largest resident set this process has had. On Linux since it started its own program (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // _MIB  # macOS counts in bytes


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing that a library prints may reach the command's standard output, nor what diffusers says as it loads."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def in_child(function: Any, *arguments: Any, threads: int) -> None:
    """Call a module-level function in a process of its own and wait; raises what it raised."""
    from concurrent.futures import ProcessPoolExecutor

    with environment(threads), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(_silently, function, *arguments).result()


def _silently(function: Any, *arguments: Any) -> None:
    with silent():
        function(*arguments)
