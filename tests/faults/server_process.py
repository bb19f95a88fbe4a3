"""The service as its users start it: a process of the `latentrelay` command, with a store, on a port it keeps.

`kill()` is SIGKILL: nothing is said, nothing is tidied up. `start()` again is the restart, on the same port and store.
The process reads its clock from a file's offset (see `clock.py`), and its log goes to a file that must hold no prompt.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

CLOCK = '''"""Shifts this process's time of day by the seconds in the file $LATENTRELAY_TEST_CLOCK, read each time."""

import os
import time

_time, _path = time.time, os.environ["LATENTRELAY_TEST_CLOCK"]


def _offset():
    try:
        with open(_path) as file:
            return float(file.read() or 0)
    except (OSError, ValueError):
        return 0.0


time.time = lambda: _time() + _offset()
time.time_ns = lambda: int((_time() + _offset()) * 1e9)
'''


class ServerProcess:
    """`latentrelay serve` on `model`; `folder` gets the port file, the log, the clock and, by default, the store."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        store: Path | None = None,
        small: bool = False,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.model, self.folder, self.arguments = model, folder, arguments
        folder.mkdir(parents=True, exist_ok=True)
        self.store, self.small = store or folder / "store", small
        self.log = folder / "log.txt"
        self.port = 0
        self._port_file = folder / "port"
        self._clock = folder / "clock"
        (folder / "path").mkdir(exist_ok=True)
        (folder / "path" / "sitecustomize.py").write_text(CLOCK)
        self.set_clock(0)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers, also after a restart."""
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """What is run."""
        serve = [sys.executable, "-m", "latentrelay.tools.cli", "serve", "--model", str(self.model)]
        return [
            *serve, "--store", str(self.store), "--port", str(self.port), "--port-file", str(self._port_file),
            *self.arguments,
        ]  # fmt: skip

    def start(self, *, wait_s: float = 120.0) -> ServerProcess:
        """Start it and wait until it answers that it is ready."""
        self._port_file.unlink(missing_ok=True)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.folder / "path"), os.environ.get("PYTHONPATH")])),
            "LATENTRELAY_TEST_CLOCK": str(self._clock),
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + wait_s
        while not self._answers():
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server was not ready in {wait_s:g} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        return self

    def ensure(self) -> ServerProcess:
        """Running, with the right time and room in its store, whatever the test before left."""
        self.set_clock(0)
        if self.process is None or self.process.poll() is not None:
            self.start()
        else:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return self

    def wipe(self) -> None:
        """Remove the store, whoever uses it."""
        shutil.rmtree(self.store, ignore_errors=True)

    @contextmanager
    def filled(self) -> Iterator[None]:
        """No byte is free on the store's own file system."""
        filler = self.store.parent / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
            try:
                yield
            finally:
                filler.unlink()

    @contextmanager
    def without_room(self) -> Iterator[None]:
        """The process may not write a file beyond its first bytes (EFBIG), its log's included."""
        assert self.process is not None
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def terminate(self, *, wait_s: float = 60.0) -> int:
        """SIGTERM, and wait; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(wait_s)

    def set_clock(self, offset_s: float) -> None:
        """Put the server's time of day off by so much, from now on."""
        part = self._clock.with_suffix(".part")
        part.write_text(str(offset_s))
        part.replace(self._clock)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _answers(self) -> bool:
        if not self._port_file.exists():
            return False
        self.port = int(self._port_file.read_text())
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def small_file_system(path: Path, *, mib: int) -> Iterator[bool]:
    """Mount an empty file system of that size at `path`; False where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "latentrelay-test", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def post(url: str, fields: dict[str, Any], *, key: str, prefer: str = "respond-async") -> httpx.Response:
    """One POST with a key, as the wire description has it."""
    headers = {"Prefer": prefer, "Idempotency-Key": key}
    return httpx.post(f"{url}/v1/handoffs", json=fields, headers=headers, timeout=60)


def status(url: str, job: str) -> dict[str, Any]:
    """The status document of a job, whatever its state."""
    answer = httpx.get(f"{url}/v1/handoffs/{job}", headers={"Accept": "application/json"}, timeout=60)
    answer.raise_for_status()
    document: dict[str, Any] = answer.json()
    return document


def get(url: str, job: str) -> httpx.Response:
    """The answer to a GET of the job, whatever it is."""
    return httpx.get(f"{url}/v1/handoffs/{job}", timeout=60)


def asking(client: Any, request: Any, deadline_s: float, **options: Any) -> tuple[threading.Thread, list[Any]]:
    """A thread that asks for a handoff; the list gets it and the client's attempts in that thread, or the error."""
    result: list[Any] = []

    def ask() -> None:
        try:
            result.extend([client.handoff(request, deadline_s=deadline_s, **options), client.attempts])
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, result


def until(condition: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def jobs_accepted(url: str) -> int:
    """How many jobs the server has taken on, repeated keys left out, as its metrics say."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    found = [line for line in lines if line.startswith('latentrelay_jobs_accepted_total{replayed="false"')]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in found)


def wait_for(url: str, job: str, *, ready: Any, seconds: float = 90.0) -> dict[str, Any]:
    """Poll the status until `ready(document)`."""
    deadline = time.monotonic() + seconds
    while not ready(document := status(url, job)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} came no further than {document}")
        time.sleep(0.02)
    return document


def blob(url: str, job: str, *, seconds: float = 90.0) -> bytes:
    """The result, waited for."""
    deadline = time.monotonic() + seconds
    headers = {"Accept": "application/vnd.latentrelay.handoff", "Prefer": "wait=10"}
    while True:
        answer = httpx.get(f"{url}/v1/handoffs/{job}", headers=headers, timeout=60)
        if answer.status_code == 200:
            return answer.content
        if answer.status_code != 202 or time.monotonic() > deadline:
            raise AssertionError(f"{answer.status_code} {answer.text[:500]}")
