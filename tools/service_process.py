"""A server as a process of its own: started, waited for, watched (memory, processor time), and ended.

In: the words to start it with; it must write its port to the file that `--port-file` names. Out: `ServerProcess`, a
context manager. It looks at Linux's /proc, children included; elsewhere memory and processor time are None.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from latentrelay.runtime.errors import LatentRelayError

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_MIB = 1 << 20


class ServerEndedError(LatentRelayError):
    """The server ended before it could be asked, or did not start in time."""


class ServerProcess:
    """`with ServerProcess("ours", ["-m", "latentrelay.tools...", ...], threads=1) as server:` server.url answers."""

    def __init__(self, name: str, words: Sequence[str], *, threads: int, start_s: float = 300.0) -> None:
        self.name, self._words, self._threads, self._start_s = name, list(words), threads, start_s
        self._folder = tempfile.TemporaryDirectory(prefix=f"latentrelay-{name}-")
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> ServerProcess:
        folder = Path(self._folder.name)
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self._threads)), "TMPDIR": str(folder)}
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._words, "--port-file", str(folder / "port")],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        try:
            self.url = f"http://127.0.0.1:{self._port(folder / 'port')}"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise ServerEndedError(f"{self.name} was not started")
        return self._process.pid

    def log_tail(self) -> str:
        """The last of what it printed."""
        with contextlib.suppress(OSError):
            return (Path(self._folder.name) / "log").read_text(errors="replace")[-600:].strip()
        return ""

    def rss_mib(self) -> float | None:
        """Resident memory with all children, MiB."""
        pages = [_field(f"/proc/{pid}/statm", 1) for pid in _family(self.pid)]
        known = [each for each in pages if each is not None]
        return sum(known) * os.sysconf("SC_PAGE_SIZE") / _MIB if known else None

    def cpu_s(self) -> float | None:
        """Processor time so far with all children, seconds."""
        ticks = [_times(pid) for pid in _family(self.pid)]
        known = [each for each in ticks if each is not None]
        return sum(known) / os.sysconf("SC_CLK_TCK") if known else None

    def _port(self, path: Path) -> int:
        until = time.monotonic() + self._start_s
        while time.monotonic() < until:
            if self._process is not None and self._process.poll() is not None:
                raise ServerEndedError(f"{self.name} ended at once", got=self.log_tail(), expected="a server")
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text())
            time.sleep(0.05)
        raise ServerEndedError(f"{self.name} did not start in {self._start_s:g} s", got=self.log_tail())


def end_with_parent(every_s: float = 1.0) -> None:
    """Called in the server's process: end it when the process that started it is gone, however that ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _family(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


def _field(path: str, place: int) -> float | None:
    try:
        return float(Path(path).read_text().split()[place])
    except (OSError, IndexError, ValueError):
        return None


def _times(pid: int) -> float | None:
    """User and system ticks; the command's name, which may hold spaces, ends with the last bracket."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return float(fields[11]) + float(fields[12])
    except (OSError, IndexError, ValueError):
        return None
