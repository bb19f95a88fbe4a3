"""W3C trace context: a `traceparent` header in, the trace and a span of our own out.

Parsed strictly; whatever is malformed starts a new trace and is repeated nowhere. `tracestate` is not read. Not a
tracer: nothing is exported; the ids stand in the log lines and in the answer's `traceresponse`.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_LENGTH = 55
_MAX_LENGTH = 512


@dataclass(frozen=True)
class Trace:
    """One span: `trace_id` 32 and `span_id` 16 lower-case hex digits, flags 0..255; `given`: the client sent it."""

    trace_id: str
    span_id: str
    flags: int = 0
    given: bool = False

    @classmethod
    def parse(cls, header: str | None) -> Trace:
        """The client's span, or a new trace where the header is missing or not in the form of W3C trace context."""
        text = header or ""
        match = _FORM.match(text) if len(text) <= _MAX_LENGTH else None
        if match is None:
            return cls.new()
        version, trace_id, span_id, flags = match.groups()
        longer = len(text) > _LENGTH
        fits = not longer if version == "00" else (not longer or text[_LENGTH] == "-")
        if version == "ff" or not fits or set(trace_id) == {"0"} or set(span_id) == {"0"}:
            return cls.new()
        return cls(trace_id, span_id, int(flags, 16), given=True)

    @classmethod
    def new(cls) -> Trace:
        """A trace of our own, not sampled."""
        return cls(_random_hex(16), _random_hex(8))

    def child(self) -> Trace:
        """A new span of the same trace."""
        return Trace(self.trace_id, _random_hex(8), self.flags, self.given)

    def header(self) -> str:
        """The value for `traceparent` or `traceresponse`, in version 00; of the flags only "sampled" is passed on."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags & 1:02x}"


def _random_hex(count: int) -> str:
    """`count` random bytes as hex, never all zero."""
    while True:
        text = secrets.token_hex(count)
        if set(text) != {"0"}:
            return text
