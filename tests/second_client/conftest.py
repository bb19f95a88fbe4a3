"""The modules of the second client, and a server that answers from a script."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def second() -> SimpleNamespace:
    """`second.client`, `second.blob`, `second.loop`: the modules beside this file."""
    modules = {}
    for part in ("client", "blob", "loop"):
        name = f"second_{part}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        modules[part] = sys.modules[name]
    return SimpleNamespace(**modules)


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Script:
    """Answers each request, one a connection, with the bytes that `answer(request)` gives; then closes."""

    answer: Callable[[Request], bytes]
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection, connection.makefile("rb") as lines, contextlib.suppress(OSError):
                if not (first := lines.readline()):
                    return  # stop()
                method, path, _ = first.decode().split(" ", 2)
                headers = {}
                while line := lines.readline().strip().decode():
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                body = lines.read(int(headers.get("content-length", 0)))
                self.requests.append(Request(method, path, headers, body))
                connection.sendall(self.answer(self.requests[-1]))

    def stop(self) -> None:
        with socket.create_connection(self.listener.getsockname()):
            pass
        self.thread.join(30)
        self.listener.close()


@pytest.fixture
def script() -> Iterator[Callable[[Callable[[Request], bytes]], Any]]:
    """`script(answer)`: a running Script, stopped with the test."""
    made: list[Script] = []

    def start(answer: Callable[[Request], bytes]) -> Script:
        made.append(Script(answer))
        return made[-1]

    yield start
    for each in made:
        each.stop()
