"""What one caller cannot take from the others: threads that look at jobs and at the service, and connections."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.rate_limits import Usage
from latentrelay.cloud.serve import CloudServer
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.tokens import ANONYMOUS, Caller, CallerLimits, Tokens

FILE = """
[[token]]
name = "narrow"
token = "narrow-token"
open_jobs = 3

[[token]]
name = "wide"
token = "wide-token"

[[token]]
name = "other"
token = "other-token"
"""
BODY = {"prompt": "the cat", "seed": 1, "height": 16, "width": 16, "num_steps": 4, "split": 2}


class SlowStore(FolderStore):
    """A store whose disk takes no new job while `held`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.free = threading.Event()
        self.free.set()
        self.reached = threading.Semaphore(0)

    def create(self, kind: str, key: str, data: bytes) -> bool:
        if kind == "job":
            self.reached.release()
            self.free.wait(60)
        return super().create(kind, key, data)


@pytest.fixture
def slow(engine: Engine, start: Callable[..., CloudServer], tmp_path: Path) -> Iterator[tuple[str, SlowStore]]:
    """A service with three callers and its store."""
    (tmp_path / "tokens.toml").write_text(FILE)
    store = SlowStore(tmp_path / "store")
    server = start(engine, app={"tokens": Tokens.from_file(tmp_path / "tokens.toml"), "store": store})
    yield server.url, store
    store.free.set()


def client(url: str, name: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {name}-token"}, timeout=30)


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_whoever_has_many_jobs_taken_on_keeps_nobody_from_looking(slow: tuple[str, SlowStore], name: str) -> None:
    url, store = slow

    async def ask() -> None:
        async with AsyncExitStack() as stack:
            mine, other = [await stack.enter_async_context(client(url, each)) for each in (name, "other")]
            job = (await other.post("/v1/handoffs", json=BODY)).json()["id"]
            store.reached.acquire()
            store.free.clear()
            posts = [asyncio.ensure_future(mine.post("/v1/handoffs", json=BODY | {"seed": n})) for n in range(60)]
            await asyncio.to_thread(store.reached.acquire)
            if name == "narrow":  # what has no turn soon is told so now, although nothing moves
                refused, _ = await asyncio.wait(posts, timeout=30, return_when=asyncio.FIRST_COMPLETED)
                for answer in [each.result() for each in refused]:
                    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
                    assert answer.json()["type"].endswith(":too-many-jobs")
            for path in ("/readyz", "/v1/capabilities", f"/v1/handoffs/{job}", "/metrics"):
                assert (await other.get(path, headers={"Accept": "application/json, text/plain"})).status_code == 200
            assert (await other.delete(f"/v1/handoffs/{job}")).status_code == 200
            store.free.set()
            statuses = [answer.status_code for answer in await asyncio.gather(*posts)]
            assert set(statuses) <= {202, 429}
            assert (statuses.count(202) <= 9) if name == "narrow" else (statuses.count(202) == 60)

    asyncio.run(ask())


def test_turns_go_round_and_are_bounded() -> None:
    async def ask() -> None:
        usage, who = Usage(), Caller("narrow", CallerLimits(open_jobs=3))
        inside: list[int] = []
        free = asyncio.Event()

        async def take(n: int) -> None:
            async with usage.turn(who):
                inside.append(n)
                await free.wait()
                inside.append(n)

        tasks = [asyncio.ensure_future(take(n)) for n in range(9)]
        await asyncio.sleep(0)
        with pytest.raises(ProblemError) as caught:
            await take(10)
        assert (caught.value.status, caught.value.kind) == (429, "too-many-jobs")
        tasks[8].cancel()  # who waits no more gives its place back
        await asyncio.sleep(0)
        tasks.append(asyncio.ensure_future(take(11)))
        free.set()
        ended: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in ended] == [type(None)] * 8 + [asyncio.CancelledError, type(None)]
        assert inside == [n for n in (*range(8), 11) for _ in range(2)]
        async with usage.turn(ANONYMOUS), usage.turn(ANONYMOUS):
            pass

    asyncio.run(ask())


def opened(url: str, count: int, *lines: str, method: str = "GET", path: str, body: bytes = b"") -> list[Any]:
    """So many plain sockets with the same request sent, and the head of each one's answer where it comes by itself."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode()
    sockets = []
    for _ in range(count):
        sockets.append(socket.create_connection((host, int(port)), timeout=30))
        sockets[-1].sendall(head + body)
    return sockets


def statuses(sockets: list[Any]) -> list[int]:
    return [int(each.recv(65536).split()[1]) for each in sockets]


def closed(sockets: list[Any]) -> None:
    for each in sockets:
        each.close()


@pytest.fixture
def held(gated: Any, start: Callable[..., CloudServer], tmp_path: Path) -> Iterator[Callable[..., tuple[str, str]]]:
    """`held(names, **limits)`: a service whose network stands still, and the id of a job of "wide" or of everybody."""
    engine, gate = gated
    gate.hold()

    def make(named: bool, **limits: Any) -> tuple[str, str]:
        (tmp_path / "tokens.toml").write_text(FILE)
        tokens = Tokens.from_file(tmp_path / "tokens.toml") if named else Tokens.none()
        url = start(engine, app={"tokens": tokens, "service": ServiceOptions(**limits)}).url
        headers = {"Authorization": "Bearer wide-token"} if named else {}
        return url, httpx.post(f"{url}/v1/handoffs", json=BODY, headers=headers, timeout=30).json()["id"]

    yield make
    gate.release()


def test_one_caller_opens_only_so_many_streams_and_waits(
    held: Callable[..., tuple[str, str]], hostile_target: Any
) -> None:
    url, job = held(True)
    token, events = "Authorization: Bearer wide-token", "Accept: text/event-stream"
    streams = opened(url, 16, token, events, path=f"/v1/handoffs/{job}")
    assert statuses(streams) == [200] * 16
    content = json.dumps(BODY | {"seed": 2}).encode()
    lines = [token, "Content-Type: application/json", f"Content-Length: {len(content)}"]
    headers = {"Authorization": "Bearer wide-token"}
    waits = ("Prefer: wait=30", "Connection: close")
    more = opened(url, 3, token, events, "Connection: close", path=f"/v1/handoffs/{job}")
    more += opened(url, 3, token, *waits, path=f"/v1/handoffs/{job}")
    more += opened(url, 3, *lines, *waits, method="POST", path="/v1/handoffs", body=content)
    for each in more:
        head, _, document = hostile_target.everything(each).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429")
        assert b"retry-after: 1" in head
        assert json.loads(document)["type"].endswith(":too-many-streams")
    assert httpx.get(f"{url}/v1/capabilities", headers=headers).json()["queue"]["running"] == 1  # no job was made
    assert httpx.get(f"{url}/v1/handoffs/{job}", headers=headers).status_code == 202  # looking takes no place
    created = httpx.post(f"{url}/v1/handoffs", json=BODY | {"seed": 3}, headers={"Authorization": "Bearer other-token"})
    other = opened(url, 1, "Authorization: Bearer other-token", events, path=f"/v1/handoffs/{created.json()['id']}")
    assert statuses(other) == [200]
    closed(streams[:2])
    deadline = time.monotonic() + 30
    while statuses(again := opened(url, 1, token, events, path=f"/v1/handoffs/{job}")) != [200]:
        assert time.monotonic() < deadline, "a place did not come back"
        closed(again)
        time.sleep(0.05)
    closed([*streams, *more, *other, *again])


def test_waits_give_their_places_back(held: Callable[..., tuple[str, str]]) -> None:
    url, job = held(True, streams_per_caller=2)
    headers = {"Authorization": "Bearer wide-token", "Prefer": "wait=0.1"}
    for n in range(6):
        assert httpx.get(f"{url}/v1/handoffs/{job}", headers=headers).status_code == 202
        assert httpx.post(f"{url}/v1/handoffs", json=BODY | {"seed": n}, headers=headers).status_code == 202
        assert httpx.post(f"{url}/v1/handoffs", json=BODY | {"split": 99}, headers=headers).status_code == 422


def test_callers_of_one_name_share_many_places(held: Callable[..., tuple[str, str]]) -> None:
    url, job = held(False)
    streams = opened(url, 257, "Accept: text/event-stream", path=f"/v1/handoffs/{job}")
    assert sorted(statuses(streams)) == [200] * 256 + [429]
    assert httpx.get(f"{url}/healthz").status_code == 200
    closed(streams)
