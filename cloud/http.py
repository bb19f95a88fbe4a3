"""The HTTP half of a request: limits on the body and the time it takes, `Prefer`, `Idempotency-Key`, `Accept`.

Nothing here knows the model or the jobs. Whatever is wrong is a ProblemError; `problem_response` makes it the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentrelay.cloud.errors import ProblemError
from latentrelay.runtime.handoff import MEDIA_TYPE
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

PROBLEM_MEDIA_TYPE = "application/problem+json"
EVENTS, STATUS = "text/event-stream", "application/json"
MAX_KEY = 128
KEY_ADDED = "latentrelay.key_added"  # in the ASGI scope, which no client writes: the Idempotency-Key is not its own
_OFFERED = (MEDIA_TYPE, STATUS, EVENTS)  # the first is what a client without a preference gets
_WAIT = re.compile(r"^wait(?:=\"?([0-9]{1,9}(?:\.[0-9]{1,9})?)\"?)?$")


def problem_response(problem: ProblemError) -> Response:
    """The error document of RFC 9457 with the problem's status and headers."""
    body = json.dumps(problem.document(), ensure_ascii=False).encode()
    headers = {"Cache-Control": "no-store", **problem.headers}
    return Response(body, problem.status, headers=headers, media_type=PROBLEM_MEDIA_TYPE)


def document_response(document: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    """An error document that was made before, as the answer with its own status."""
    status = int(document["status"])
    more = {"Cache-Control": "no-store", **(retry_after(1) if status == 503 else {}), **headers}
    return Response(json.dumps(dict(document), ensure_ascii=False).encode(), status, more, PROBLEM_MEDIA_TYPE)


@dataclass(frozen=True)
class Preference:
    """What `Prefer` asks for: `wait_s` seconds of waiting, None for none; `applied` is Preference-Applied's value."""

    wait_s: float | None
    applied: str | None


def preference(request: Request, max_wait_s: float) -> Preference:
    """RFC 7240: `wait`, `wait=seconds` (at most `max_wait_s` counts) or `respond-async`; what else is there is ignored.

    The first of the two names wins, except that `respond-async, wait=10` means what the RFC says: wait so long first.
    """
    names = [each.split(";")[0].strip().lower() for each in ",".join(request.headers.getlist("prefer")).split(",")]
    for name in names:
        found = _WAIT.match(name.replace(" ", ""))
        if found:
            asked = found.group(1)
            wait_s = max_wait_s if asked is None else min(float(asked), max_wait_s)
            return Preference(wait_s, "wait" if asked is None else f"wait={asked}")
    return Preference(None, "respond-async" if "respond-async" in names else None)


def idempotency_key(request: Request) -> str | None:
    """The client's key, None without one. Raises 400 unless it is 1..128 printable ASCII characters, sent once."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    key = given[0]
    if len(given) > 1 or not 1 <= len(key) <= MAX_KEY or not (key.isascii() and key.isprintable()):
        raise ProblemError(
            400,
            "bad-idempotency-key",
            "The Idempotency-Key cannot be used.",
            field="idempotency-key",
            received=f"{len(given)} of them" if len(given) > 1 else f"{len(key)} characters",
            wanted=f"one of 1 to {MAX_KEY} printable ASCII characters",
        )
    return key


def accepted(request: Request) -> str:
    """Which of the handoff, its status or its events `Accept` asks for; the handoff where any will do. 406 for none.

    An exact name beats type/*, which beats */*; of equals the higher q wins, then the order above.
    """
    header = ",".join(request.headers.getlist("accept"))
    if not header.strip():
        return MEDIA_TYPE
    ranges = [_media_range(each) for each in header.split(",") if each.strip()]
    best, chosen = 0.0, ""
    for offered in _OFFERED:
        matching = [(_exactness(name, offered), q) for name, q in ranges if _exactness(name, offered)]
        quality = max(matching)[1] if matching else 0.0
        if quality > best:
            best, chosen = quality, offered
    if not chosen:
        raise ProblemError(
            406,
            "not-acceptable",
            "A handoff is there as a blob, as its status and as a stream of events.",
            field="accept",
            received=header[:80],
            wanted=", ".join(_OFFERED),
        )
    return chosen


def require_json(request: Request) -> None:
    """Raise 415 unless the body is declared as JSON and comes as it is, without a content coding."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if media_type == "application/json" and coding == "identity":
        return
    field, received, wanted = ("content-type", media_type, "application/json")
    if media_type == "application/json":
        field, received, wanted = ("content-encoding", coding, "identity")
    raise ProblemError(
        415,
        "unsupported-media-type",
        "Send the request as application/json, not compressed.",
        field=field,
        received=received[:80] or "nothing",
        wanted=wanted,
    )


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """The body, at most `max_bytes`, within `seconds`.

    Raises 413 as soon as the length declared or what has come is more, 408 when the time is over.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes, int(declared))
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes, f"more than {max_bytes}")
    except ClientDisconnect:
        raise ProblemError(400, "incomplete-body", "The connection ended before the body did.") from None
    except TimeoutError:
        detail = f"The body did not come within {seconds:g} s."
        raise ProblemError(408, "body-timeout", detail, headers={"Connection": "close"}) from None
    return bytes(body)


def retry_after(seconds: float) -> dict[str, str]:
    """Retry-After in whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _media_range(text: str) -> tuple[str, float]:
    """A media range and its q; a q that is no number counts as 0."""
    name, *parameters = [part.strip().lower() for part in text.split(";")]
    q = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    return name, float(q) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", q) else 0.0


def _exactness(name: str, offered: str) -> int:
    """3 for the type itself, 2 for its type/*, 1 for */*, 0 for another."""
    if name == offered:
        return 3
    if name == f"{offered.split('/')[0]}/*":
        return 2
    return 1 if name == "*/*" else 0


def _too_large(max_bytes: int, received: object) -> ProblemError:
    detail = f"The body is too large: at most {max_bytes} bytes are read."
    return ProblemError(413, "body-too-large", detail, field="body", received=received, wanted=max_bytes)
