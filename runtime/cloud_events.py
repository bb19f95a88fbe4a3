"""Server-sent events, read as they come: bytes in, events out, with limits on lines, events and the whole stream.

The subset of the HTML standard's `text/event-stream` that the cloud uses: `event`, `data` (several lines join with a
newline), comments; `id` and `retry` are read over. Not a general client: reconnecting is cloud_protocol.py's.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from latentrelay.runtime.errors import CloudProtocolError
from latentrelay.runtime.preview import Preview

EVENTS_TYPE = "text/event-stream"
MAX_LINE_BYTES = 2**20
MAX_STREAM_BYTES = 64 * 2**20
_MAX_PREVIEW_SIDE = 512


class EventReader:
    """Feed it chunks; it gives back the events that they complete, as (name, data) pairs."""

    def __init__(self, max_line: int = MAX_LINE_BYTES, max_stream: int = MAX_STREAM_BYTES) -> None:
        self._max_line, self._max_stream = max_line, max_stream
        self._rest, self._seen, self._held = b"", 0, 0
        self._name, self._data = "", list[bytes]()

    def feed(self, chunk: bytes) -> list[tuple[str, bytes]]:
        """The events complete with `chunk`. Raises CloudProtocolError past a limit."""
        self._seen += len(chunk)
        if self._seen > self._max_stream:
            raise CloudProtocolError("the cloud's events are too long", expected=f"at most {self._max_stream} bytes")
        text = self._rest + chunk
        held = b"\r" if text.endswith(b"\r") else b""  # half of a line's end, perhaps
        lines = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        if len(self._rest) > self._max_line:
            raise CloudProtocolError("a line of the cloud's events is too long", expected=f"<= {self._max_line} bytes")
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> tuple[str, bytes] | None:
        if line:
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"event":
                self._name = value[:64].decode("utf-8", "replace")
            elif field == b"data":
                self._held += len(value)
                if self._held > self._max_line:
                    raise CloudProtocolError("an event of the cloud is too long", expected=f"<= {self._max_line} bytes")
                self._data.append(value)
            return None
        event = (self._name or "message", b"\n".join(self._data)) if self._data else None
        self._name, self._data, self._held = "", [], 0
        return event


def read_preview(document: Mapping[str, Any]) -> Preview | None:
    """The picture in a progress event, None without one. Raises CloudProtocolError where its size is wrong."""
    preview = document.get("preview")
    if preview is None:
        return None
    try:
        height, width = preview["height"], preview["width"]
        pixels = base64.b64decode(preview["rgb"], validate=True)
        sides = all(type(side) is int and 1 <= side <= _MAX_PREVIEW_SIDE for side in (height, width))
        if not sides or len(pixels) != 3 * height * width:
            raise ValueError("its size is wrong")
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise CloudProtocolError(f"the cloud's preview is malformed: {type(error).__name__}") from error
    rgb = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    return Preview(rgb, int(document.get("step", 0)), int(document.get("num_steps", 0)), "cloud")
