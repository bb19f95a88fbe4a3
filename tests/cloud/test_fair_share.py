"""What one caller cannot take from the others: the threads that look at jobs and at the service."""

from __future__ import annotations

import asyncio
import threading
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
