"""The HTTP half of a request and an answer: limits on the body, the token, `Prefer`, error documents, digests.

Nothing here knows the model. Whatever is wrong is a ProblemError; `problem_response` makes it the answer.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json

from latentrelay.cloud.errors import ProblemError
from latentrelay.runtime.handoff import MEDIA_TYPE
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

PROBLEM_MEDIA_TYPE = "application/problem+json"


def problem_response(problem: ProblemError) -> Response:
    """The error document of RFC 9457 with the problem's status and headers."""
    body = json.dumps(problem.document(), ensure_ascii=False).encode()
    return Response(body, problem.status, headers=problem.headers, media_type=PROBLEM_MEDIA_TYPE)


def require_token(request: Request, token: str | None) -> None:
    """Raise 401 unless `token` is None or comes as `Authorization: Bearer`; compared in constant time."""
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(_sha256(given.strip()), _sha256(token))
    if scheme.lower() != "bearer" or not same:
        raise ProblemError(
            401,
            "unauthorised",
            "This service needs its token as Authorization: Bearer.",
            field="authorization",
            headers={"WWW-Authenticate": "Bearer"},
        )


def require_wait(request: Request) -> None:
    """Raise 400 unless the client says `Prefer: wait` (RFC 7240; wait=seconds counts)."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    names = {each.split(";")[0].split("=")[0].strip().lower() for each in preferences}
    if "wait" not in names:
        raise ProblemError(
            400,
            "synchronous-only",
            "This version answers synchronously only: send the header Prefer: wait.",
            field="prefer",
            received=request.headers.get("prefer", "nothing")[:80],
            wanted="wait",
        )


def require_json(request: Request) -> None:
    """Raise 415 unless the body is declared as JSON."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise ProblemError(
            415,
            "unsupported-media-type",
            "Send the request as application/json.",
            field="content-type",
            received=media_type[:80] or "nothing",
            wanted="application/json",
        )


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, at most `max_bytes`. Raises 413 as soon as the length declared or what has come is more."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes, int(declared))
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes, f"more than {max_bytes}")
    except ClientDisconnect:
        raise ProblemError(400, "incomplete-body", "The connection ended before the body did.") from None
    return bytes(body)


def handoff_response(blob: bytes, cloud_ms: float) -> Response:
    """The blob with its strong ETag, its Repr-Digest (RFC 9530) and the time the cloud took."""
    digest = hashlib.sha256(blob)
    headers = {
        "ETag": f'"{digest.hexdigest()}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:",
        "Preference-Applied": "wait",
        "Latentrelay-Cloud-Ms": f"{cloud_ms:.1f}",
        "Cache-Control": "no-store",
    }
    return Response(blob, headers=headers, media_type=MEDIA_TYPE)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _too_large(max_bytes: int, received: object) -> ProblemError:
    detail = f"The body is too large: at most {max_bytes} bytes are read."
    return ProblemError(413, "body-too-large", detail, field="body", received=received, wanted=max_bytes)
