"""A TCP proxy that fails on purpose: every connection is reset after a given number of bytes, or passed on slowly.

`CuttingProxy(port, plan)`: plan(n) gives the Cut of the n-th connection (0 first). A reset is a real one (RST), on both
sides. Bytes are counted as they pass, request and response apart or together.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST


@dataclass(frozen=True)
class Cut:
    """None passes everything. sent: bytes from the client; received: bytes to it; both: of the two together."""

    sent: int | None = None
    received: int | None = None
    both: int | None = None
    bytes_per_s: float | None = None  # towards the client


PASS = Cut()


class CuttingProxy:
    """Listens on a free port of 127.0.0.1 and passes on to `port` there."""

    def __init__(self, port: int, plan: Callable[[int], Cut]) -> None:
        self._target, self._plan = port, plan
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.cuts = 0
        self._generation = 0
        self.passed = [0, 0]
        self.by_connection: list[list[int]] = []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> CuttingProxy:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def cut_now(self) -> None:
        """Reset every connection there is, as when the server's whole machine goes: nothing more comes from it."""
        self._generation += 1

    def _accept(self) -> None:
        while not self._ended.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client, _ = self._listener.accept()
            cut = self._plan(self.connections)
            self.connections += 1
            self.by_connection.append([0, 0])
            thread = threading.Thread(target=self._pass, args=(client, cut, self.by_connection[-1]), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass(self, client: socket.socket, cut: Cut, own: list[int]) -> None:
        try:
            server = _connected(self._target)
        except OSError:
            _reset(client)
            return
        counts = {client: 0, server: 0}
        generation = self._generation
        ends = {client: (server, cut.sent), server: (client, cut.received)}
        try:
            while not self._ended.is_set():
                if self._generation != generation:
                    self.cuts += 1
                    _reset(client)
                    _reset(server)
                    return
                for source in select.select([client, server], [], [], 0.05)[0]:
                    other, limit = ends[source]
                    room = _room(limit, counts[source], cut.both, sum(counts.values()))
                    most = max(1, int(cut.bytes_per_s / 20)) if cut.bytes_per_s and source is server else 65536
                    data = source.recv(min(most, room)) if room else b""
                    if not data and room:
                        return  # an end of its own accord
                    counts[source] += len(data)
                    way = 0 if source is client else 1
                    self.passed[way] += len(data)
                    own[way] += len(data)
                    other.sendall(data)
                    if cut.bytes_per_s and source is server:
                        time.sleep(len(data) / cut.bytes_per_s)
                    if _room(limit, counts[source], cut.both, sum(counts.values())) == 0:
                        self.cuts += 1
                        _reset(client)
                        _reset(server)
                        return
        except OSError:
            _reset(client)
        finally:
            client.close()
            server.close()


def _connected(port: int) -> socket.socket:
    """A connection that takes little at once, so that what is not read here is still the server's."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    connection.settimeout(10)
    try:
        connection.connect(("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    return connection


def _room(own: int | None, count: int, both: int | None, total: int) -> int:
    """How many bytes may still pass."""
    return max(0, min((own - count) if own is not None else 1 << 20, (both - total) if both is not None else 1 << 20))


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    connection.close()
