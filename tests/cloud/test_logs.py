"""Log lines: one event is one line, in text or JSON, and no secret is in any."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from latentrelay.cloud import logs

_log = logging.getLogger("latentrelay.cloud")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("latentrelay", "uvicorn.error")]
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def lines(format: logs.Format, *, prompts: bool = False, **fields: object) -> list[str]:
    stream = io.StringIO()
    logs.configure(format, prompts=prompts, stream=stream)
    logs.event(_log, "request", **fields)
    return stream.getvalue().splitlines()


FIELDS = {"trace": "4bf9", "job": "00ff", "caller": "phone", "route": "/v1/handoffs", "status": 202, "ms": 12.345}


def test_a_text_line() -> None:
    (line,) = lines("text", **FIELDS, kind=None)
    time, rest = line.split(" ", 1)
    assert len(time) == len("2026-11-23T16:53:03.123Z")
    assert rest == "info request trace=4bf9 job=00ff caller=phone route=/v1/handoffs status=202 ms=12.3"


def test_a_json_line() -> None:
    (line,) = lines("json", **FIELDS, kind=None)
    document = json.loads(line)
    assert document.pop("time").endswith("Z")
    assert document == {"level": "info", "event": "request", **FIELDS}


@pytest.mark.parametrize("format", ["text", "json"])
def test_secrets_and_prompts_are_left_out(format: logs.Format) -> None:
    secret = dict.fromkeys(("authorization", "token", "key", "idempotency_key", "prompt", "negative_prompt"), "hush")
    (line,) = lines(format, **FIELDS, **secret)
    assert "hush" not in line
    (line,) = lines(format, prompts=True, **FIELDS, **secret)
    assert line.count("hush") == 2


@pytest.mark.parametrize("format", ["text", "json"])
def test_one_event_is_one_line(format: logs.Format) -> None:
    nasty = 'a\nb\r\x1b[31m\u2028\u0085\x00" =c \ud800'
    written = lines(format, route=nasty, other="a b", empty="")
    assert len(written) == 1
    assert written[0].isascii()
    assert not any(ord(each) < 32 for each in written[0])
    if format == "json":
        assert json.loads(written[0])["route"] == nasty
    else:
        assert 'other="a b" empty=""' in written[0]


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exceptions_message_is_not_written(format: logs.Format) -> None:
    stream = io.StringIO()
    logs.configure(format, stream=stream)
    try:
        raise ValueError("hush: a prompt")
    except ValueError as error:
        _log.error("a request failed", exc_info=error)
        logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)
    written = stream.getvalue()
    assert len(written.splitlines()) == 2
    assert "hush" not in written
    assert "ValueError" in written
    assert "test_logs.py:" in written
    assert "/tests/" not in written


def test_configuring_again_replaces_and_bad_formats_are_named() -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure("text", stream=first)
    logs.configure("json", stream=second)
    logs.event(_log, "request")
    assert not first.getvalue()
    assert json.loads(second.getvalue())["event"] == "request"
    with pytest.raises(ValueError, match="xml"):
        logs.configure("xml")  # type: ignore[arg-type]


def test_levels() -> None:
    stream = io.StringIO()
    logs.configure("text", stream=stream)
    logs.event(_log, "quiet", level=logging.DEBUG)
    logging.getLogger("uvicorn.error").info("started")
    assert not stream.getvalue()


def test_numbers_are_written_to_a_few_digits() -> None:
    stream = io.StringIO()
    logs.configure("json", stream=stream)
    logs.event(_log, "request", ms=0.6241849987418391, status=200, route="/healthz")
    assert '"ms": 0.624, "status": 200, "route"' in stream.getvalue()
