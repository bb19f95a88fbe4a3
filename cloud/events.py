"""Progress of one job as server-sent events: `progress` with the status at every change, last `done`, `failed` or
`cancelled`, then the stream ends. A comment line every few seconds says that the connection lives.

In: a function that waits for the next status. Out: the chunks of a text/event-stream. A status is JSON on one line.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

MEDIA_TYPE = "text/event-stream"
HEARTBEAT = b": alive\n\n"
ENDS = {"done": "done", "failed": "failed", "cancelled": "cancelled", "expired": "cancelled", "deleted": "cancelled"}
Preview = tuple[int, int, bytes]


class Status(Protocol):
    """What a stream needs of a job's status."""

    @property
    def version(self) -> int: ...  # another one after every change

    @property
    def preview(self) -> Preview | None: ...  # rows, columns, rgb bytes

    def to_dict(self) -> dict[str, Any]: ...


def event(status: Status) -> bytes:
    """One event: its name, the version as its id, the status as its data."""
    document = status.to_dict()
    name = ENDS.get(document["state"], "progress")
    if status.preview is not None and name == "progress":
        height, width, rgb = status.preview
        document["preview"] = {"height": height, "width": width, "rgb": base64.b64encode(rgb).decode()}
    data = json.dumps(document, separators=(",", ":"), ensure_ascii=True)
    return f"event: {name}\nid: {status.version}\ndata: {data}\n\n".encode()


async def stream(
    first: Status,
    later: Callable[[int, float], Awaitable[Status]],
    dismissed: Callable[[], Awaitable[None]],
    *,
    heartbeat_s: float,
    longest_s: float,
) -> AsyncIterator[bytes]:
    """Chunks from `first` until the job ends, `longest_s` are over or `dismissed()` returns (the service ends).

    `later(seen, seconds)` waits for a status of another version than `seen`, or for so many seconds.
    """
    status = first
    yield event(status)
    until = time.monotonic() + longest_s
    leaving = asyncio.ensure_future(dismissed())
    try:
        while status.to_dict()["state"] not in ENDS and time.monotonic() < until:
            following = asyncio.ensure_future(later(status.version, heartbeat_s))
            try:
                await asyncio.wait({following, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                following.cancel()
            if not following.done():
                return
            changed, status = following.result().version != status.version, following.result()
            yield event(status) if changed else HEARTBEAT
    finally:
        leaving.cancel()
