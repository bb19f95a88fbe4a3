"""The event stream by itself: every last state ends it, silence is filled, and it leaves when it is dismissed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from latentrelay.cloud.events import HEARTBEAT, stream


@dataclass(frozen=True)
class Seen:
    version: int
    state: str
    preview: tuple[int, int, bytes] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"state": self.state}


def chunks(*statuses: Seen, dismissed: bool = False, longest_s: float = 60.0) -> list[bytes]:
    """What a stream sends when these statuses follow each other; after the last one nothing changes."""
    coming = list(statuses[1:])

    async def later(seen: int, seconds: float) -> Any:
        if not coming:
            await asyncio.sleep(3600)
        return coming.pop(0)

    async def leave() -> None:
        await asyncio.sleep(0.05 if dismissed else 3600)

    async def collect() -> list[bytes]:
        return [each async for each in stream(statuses[0], later, leave, heartbeat_s=1, longest_s=longest_s)]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("state", "name"),
    [
        ("done", "done"),
        ("failed", "failed"),
        ("cancelled", "cancelled"),
        ("expired", "cancelled"),
        ("deleted", "cancelled"),
    ],
)
def test_every_last_state_ends_the_stream(state: str, name: str) -> None:
    sent = chunks(Seen(1, "running"), Seen(2, state))
    assert [each.split(b"\n")[0] for each in sent] == [b"event: progress", f"event: {name}".encode()]
    assert sent[1].endswith(b"\n\n")
    assert b"id: 2\n" in sent[1]


def test_silence_is_filled() -> None:
    same = Seen(1, "running")
    assert chunks(same, same, same, Seen(2, "done"))[1:3] == [HEARTBEAT, HEARTBEAT]


def test_it_ends_when_dismissed_or_too_long() -> None:
    assert len(chunks(Seen(1, "running"), dismissed=True)) == 1
    assert len(chunks(Seen(1, "running"), longest_s=0)) == 1


def test_previews_stand_beside_progress_only() -> None:
    picture = (1, 2, bytes(6))
    sent = chunks(Seen(1, "running", picture), Seen(2, "done", picture))
    assert b'"preview":{"height":1,"width":2,"rgb":"AAAAAAAA"}' in sent[0]
    assert b"preview" not in sent[1]
