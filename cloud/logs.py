"""The service's log: one line a request and one a job's end, as text for people or as JSON for machines.

`event(logger, "request", route=..., status=...)` logs fields; `configure(...)` is called once, by the command. Fields
that could hold a secret are never written, prompts only when asked for; of an exception, the type and the place are
written, not its message, which may quote what it was given. Control characters are escaped: one event is one line.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from pathlib import PurePath
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]
_NAMES = ("latentrelay", "uvicorn.error")
_SECRET = frozenset({"authorization", "token", "key", "idempotency_key", "password", "cookie"})
_PROMPTS = frozenset({"prompt", "negative_prompt"})
_ATTRIBUTE = "latentrelay_fields"
_MAX_CHARS = 2000


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log one event; None fields are left out. Trace id, job id, token name, route, status and ms are usual fields."""
    if logger.isEnabledFor(level):
        kept = {key: value for key, value in fields.items() if value is not None}
        logger.log(level, "%s", name, extra={_ATTRIBUTE: kept})


def configure(
    format: Format = "text", *, prompts: bool = False, stream: TextIO | None = None, level: int = logging.INFO
) -> None:
    """Write the service's and the server's log to `stream` (standard error), replacing what was configured before.

    With `prompts`, fields that hold prompts are written. Raises ValueError for another format.
    """
    if format not in ("text", "json"):
        raise ValueError(f"log format: got {format!r}, expected text or json")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(format, prompts=prompts))
    for name in _NAMES:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level if name == "latentrelay" else max(level, logging.WARNING))


class LineFormatter(logging.Formatter):
    """One line a record: `time level event key=value ...`, or one JSON object with the same."""

    def __init__(self, format: Format, *, prompts: bool = False) -> None:
        super().__init__()
        self._json = format == "json"
        self._hidden = _SECRET if prompts else _SECRET | _PROMPTS

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields = {key: value for key, value in getattr(record, _ATTRIBUTE, {}).items() if key not in self._hidden}
        if record.exc_info and record.exc_info[1] is not None:
            fields |= _exception(record.exc_info[1])
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        head = {"time": when, "level": record.levelname.lower(), "event": record.getMessage().rstrip()[:_MAX_CHARS]}
        if self._json:
            rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}
            return json.dumps(head | rounded, default=_plain)
        words = [when, head["level"], _escaped(head["event"])]
        return " ".join(words + [f"{key}={_escaped(_plain(value), quote=True)}" for key, value in fields.items()])


def _exception(error: BaseException) -> dict[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
    return {"error": type(error).__name__, "at": where}


def _plain(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)[:_MAX_CHARS]


def _escaped(text: str, *, quote: bool = False) -> str:
    """JSON's escapes where anything but plain visible characters is in the text; fields with spaces are quoted."""
    plain = all(" " < each <= "~" or (each == " " and not quote) for each in text) and '"' not in text
    if plain and text:
        return text
    escaped = json.dumps(text)
    return escaped if quote else escaped[1:-1]
