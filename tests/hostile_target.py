"""A real server process to attack: a tiny model, tokens from a file, short time limits; and sockets to do it with.

`Target(pipeline_folder, folder)` as a context manager; `raw(bytes)` sends what no client library would send and gives
everything that comes back; `rss_mib()` is the process's own memory; `log()` is all it has written.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

TOKENS = {
    "alice": "alice-hush-7f1c",
    "bob": "bob-hush-91aa",
    "meagre": "meagre-hush-03bd",
    "narrow": "narrow-hush-55e0",
}
LIMITS = {"connections": 64, "head_s": 2.0, "body_s": 2.0, "idle_s": 3.0, "drain_s": 2.0, "drain_bytes_per_s": 1e6}
TOKENS_TOML = "".join(
    f'[[token]]\nname = "{name}"\ntoken = "{token}"\n'
    + ("requests_per_minute = 7\nsteps_per_day = 6\n" if name == "meagre" else "")
    + ("open_jobs = 1\n" if name == "narrow" else "")
    for name, token in TOKENS.items()
)
SCRIPT = """
import sys, json
from pathlib import Path
from latentrelay.cloud import logs
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.guarded_protocol import ConnectionLimits
from latentrelay.cloud.serve import serve
from latentrelay.cloud.tokens import Tokens
model, folder, limits = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
logs.configure("json")
serve(
    Engine.load(str(model), name="tiny"),
    port=0,
    port_file=folder / "port",
    tokens=Tokens.from_file(folder / "tokens.toml"),
    store=FolderStore(folder / "store"),
    connections=ConnectionLimits(**limits),
)
"""


class Target:
    """The process, once entered; killed at the end."""

    def __init__(self, model: Path, folder: Path, **limits: Any) -> None:
        self._model, self._folder, self._limits = model, folder, {**LIMITS, **limits}
        self._log = folder / "log.txt"

    def __enter__(self) -> Target:
        (self._folder / "tokens.toml").write_text(TOKENS_TOML)
        command = [sys.executable, "-c", SCRIPT, str(self._model), str(self._folder), json.dumps(self._limits)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        end = time.monotonic() + 120
        while not (self._folder / "port").exists():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{self.log()[-3000:]}")
            time.sleep(0.05)
        self.port = int((self._folder / "port").read_text())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, name: str | None = "alice") -> httpx.Client:
        """An ordinary client with the token of that name."""
        headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        """A bare connection."""
        bare = socket.socket()
        if receive_bytes is not None:
            bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        bare.settimeout(60)
        bare.connect(("127.0.0.1", self.port))
        return bare

    def raw(self, data: bytes, *, half_close: bool = True) -> bytes:
        """Send, end the sending half (or leave it open), and read until the server closes."""
        with self.connect() as bare:
            try:
                bare.sendall(data)
                if half_close:
                    bare.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused before all was sent
            return everything(bare)

    def rss_mib(self) -> float:
        """Resident memory of the process."""
        return self._status("VmRSS") / 1024

    def peak_mib(self) -> float:
        """The most it ever was."""
        return self._status("VmHWM") / 1024

    def log(self) -> str:
        """Everything it has written."""
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        """Whether the process runs and answers."""
        with self.client() as http:
            return self.process.poll() is None and http.get("/readyz").status_code == 200

    def _status(self, name: str) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name))


def everything(bare: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    while True:
        try:
            part = bare.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    """The status of every answer in what came back."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
