"""W3C trace context: what is taken over, and that nothing malformed is repeated."""

from __future__ import annotations

import re

import pytest
from latentrelay.cloud.tracing import Trace

ID, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
FORM = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{ID}-{SPAN}-01", "01"),
        (f"00-{ID}-{SPAN}-00", "00"),
        (f"00-{ID}-{SPAN}-ff", "01"),
        (f"cc-{ID}-{SPAN}-01", "01"),
        (f"cc-{ID}-{SPAN}-01-what-the-future-brings", "01"),
    ],
)
def test_a_valid_header_is_taken_over(header: str, flags: str) -> None:
    trace = Trace.parse(header)
    assert (trace.trace_id, trace.span_id, trace.given) == (ID, SPAN, True)
    child = trace.child()
    assert child.trace_id == ID
    assert child.span_id != SPAN
    assert child.given
    assert child.header() == f"00-{ID}-{child.span_id}-{flags}"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "garbage",
        f"00-{ID.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{ID}-{'0' * 16}-01",
        f"ff-{ID}-{SPAN}-01",
        f"00-{ID}-{SPAN}-01-more",
        f"00-{ID}-{SPAN}-011",
        f"cc-{ID}-{SPAN}-01more",
        f"00-{ID}-{SPAN}-0",
        f"00-{ID}-{SPAN}",
        f" 00-{ID}-{SPAN}-01",
        f"00-{ID}-{SPAN}-01\n",
        f"00-{ID}-{SPAN}-0g",
        f"00_{ID}_{SPAN}_01",
        f"00-{ID[:-1]}\u0661-{SPAN}-01",
        f"cc-{ID}-{SPAN}-01-" + "x" * 10_000,
    ],
)
def test_everything_else_starts_a_new_trace(header: str | None) -> None:
    trace = Trace.parse(header)
    assert not trace.given
    assert trace.trace_id != ID
    assert FORM.fullmatch(trace.header())
    assert FORM.fullmatch(trace.child().header())


def test_traces_differ() -> None:
    assert len({Trace.new().trace_id for _ in range(100)}) == 100
