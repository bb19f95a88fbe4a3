"""Clients of a handoff service, in a closed loop over real sockets: each asks, waits for its blob, and asks again.

In: an address and how many clients for how long. Out: `Load`: every answer's latency, job and digest, and what was lost
or came twice. Written on asyncio's streams, because a client that shares the server's cores must cost next to nothing;
it speaks as much HTTP/1.1 as that takes and measures no server's limits.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from latentrelay.runtime.errors import LatentRelayError

_SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "moon", "bar")
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
_TRIES, _MAX_PAUSE_S = 5, 2.0


class LoadError(LatentRelayError):
    """The service's answers cannot be counted: it is not there, or speaks another protocol."""


@dataclass(frozen=True)
class Answer:
    """One request that was answered with a blob: its own key and the service's job, and when it began and ended."""

    key: str
    job: str | None
    digest: str
    bytes: int
    started_s: float
    ended_s: float
    cloud_ms: float | None = None

    @property
    def latency_ms(self) -> float:
        """From the first byte sent to the last one received."""
        return 1e3 * (self.ended_s - self.started_s)


@dataclass
class Load:
    """What happened. `lost`: keys that never got their blob, with the reason; `refused`: answers 503 or 429, each asked
    again; `damaged`: blobs that differ from their ETag; `cpu_s` is this process's own."""

    clients: int
    answers: list[Answer] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    damaged: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def per_second(self) -> float:
        """Answers a second, from the first request to the last answer."""
        return len(self.answers) / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def duplicated(self) -> int:
        """Jobs that answered two requests, and blobs that two different requests got."""
        jobs = [answer.job for answer in self.answers if answer.job is not None]
        digests = [answer.digest for answer in self.answers]
        return len(jobs) - len(set(jobs)) + len(digests) - len(set(digests))


class Requests:
    """Distinct requests, one after another: no two share a prompt or a seed. Shared by all clients and rounds."""

    def __init__(self, name: str, **common: Any) -> None:
        self._name, self._common, self._count = name, common, itertools.count()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        return self

    def __next__(self) -> tuple[str, bytes]:
        number = next(self._count)
        shape, colour = _SHAPES[number % 8], _COLOURS[number // 8 % 8]
        body = {"prompt": f"a {colour} {shape}, {self._name} {number}", "seed": number, **self._common}
        return f"{self._name}-{number}", json.dumps(body).encode()


def run_load(
    url: str,
    requests: Requests,
    clients: int,
    seconds: float = math.inf,
    *,
    each: int | None = None,
    token: str | None = None,
    timeout_s: float = 600.0,
) -> Load:
    """Let `clients` ask for `seconds`, and `each` of them so many times at most; what is in flight at the end is waited
    for. Raises LoadError if nobody answers."""
    load, before = Load(clients), _cpu_s()
    started = time.perf_counter()
    turns = _Turns(started + seconds, each)
    asyncio.run(_all(url, requests, load, turns, token, timeout_s))
    ended = max((answer.ended_s for answer in load.answers), default=time.perf_counter())
    load.elapsed_s, load.cpu_s = ended - started, _cpu_s() - before
    if not load.answers:
        raise LoadError("no request was answered", got=next(iter(load.lost.values()), "nothing"), expected="blobs")
    return load


@dataclass(frozen=True)
class _Turns:
    """When a client stops asking: at a moment of the clock, or after so many requests. It asks once at least."""

    until: float
    each: int | None

    def go_on(self, made: int) -> bool:
        return made == 0 or (time.perf_counter() < self.until and (self.each is None or made < self.each))


async def _all(url: str, requests: Requests, load: Load, turns: _Turns, token: str | None, timeout_s: float) -> None:
    await asyncio.gather(*(_client(url, requests, load, turns, token, timeout_s) for _ in range(load.clients)))


async def _client(url: str, requests: Requests, load: Load, turns: _Turns, token: str | None, timeout_s: float) -> None:
    connection, made = _Connection(url, token), 0
    try:
        while turns.go_on(made):
            made += 1
            key, body = next(requests)
            try:
                load.answers.append(await asyncio.wait_for(_asked(connection, key, body, load), timeout_s))
            except (OSError, EOFError, TimeoutError, LoadError) as error:
                load.lost[key] = f"{type(error).__name__}: {error}"[:200]
                connection.close()
    finally:
        connection.close()


async def _asked(connection: _Connection, key: str, body: bytes, load: Load) -> Answer:
    """One request until its blob is here; a connection that breaks is opened again under the same key."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": key, "Prefer": "wait"}
    started, fails = time.perf_counter(), 0
    method, path, sent = "POST", "/v1/handoffs", body
    while True:
        try:
            status, answer, data = await connection.send(method, path, headers, sent)
        except (OSError, EOFError) as error:
            connection.close()
            fails += 1
            if fails >= _TRIES:
                raise LoadError(f"the connection broke {fails} times: {error}") from error
            continue
        if status == 200:
            return _answer(key, answer, data, started, load)
        if status == 202:  # the service waits no longer in one request: ask for the job
            method, path, sent = "GET", answer["location"], b""
        elif status in (429, 503) and "retry-after" in answer:
            load.refused += 1
            await asyncio.sleep(min(float(answer["retry-after"]), _MAX_PAUSE_S))
        else:
            raise LoadError("the service refused", got=f"{status} {data[:160]!r}", expected="200")


def _answer(key: str, headers: Mapping[str, str], data: bytes, started: float, load: Load) -> Answer:
    ended, digest = time.perf_counter(), hashlib.sha256(data).hexdigest()
    load.damaged += headers.get("etag", "").strip('"') not in ("", digest)
    return Answer(key, headers.get("latentrelay-job"), digest, len(data), started, ended)


class _Connection:
    """One kept-alive connection, opened when first used."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._common = {"Host": f"{self._host}:{self._port}"}
        if token is not None:
            self._common["Authorization"] = f"Bearer {token}"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        """Drop the connection; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """One request and its answer: status, headers in lower case, body. Raises OSError, EOFError, LoadError."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        lines = {**self._common, **headers, "Content-Length": str(len(body))}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(head.encode() + b"\r\n" + body)
        await writer.drain()
        status, answer = _head(await reader.readuntil(b"\r\n\r\n"))
        if "content-length" not in answer:
            raise LoadError("an answer has no length", got=f"{status} {answer}", expected="Content-Length")
        data = await reader.readexactly(int(answer["content-length"]))
        if answer.get("connection", "").lower() == "close":
            self.close()
        return status, answer, data


def _head(text: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = text.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
