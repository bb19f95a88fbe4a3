"""Progress of one job as server-sent events: `progress` with the status at every change, last `done`, `failed` or
`cancelled`, then the stream ends. A comment line every few seconds says that the connection lives.

In: a function that waits for the next status. Out: the chunks of a text/event-stream. A status is JSON on one line.
"""

from __future__ import annotations

import base64
import json
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
    first: Status, later: Callable[[int, float], Awaitable[Status]], *, heartbeat_s: float, stopping: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Chunks from `first` until the job ends or the service stops; `later(seen, seconds)` waits for another version."""
    status = first
    yield event(status)
    while status.to_dict()["state"] not in ENDS and not stopping():
        following = await later(status.version, heartbeat_s)
        if following.version == status.version:
            yield HEARTBEAT
        else:
            status = following
            yield event(status)
