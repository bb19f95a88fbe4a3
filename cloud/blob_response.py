"""One immutable blob over HTTP: conditions and ranges of RFC 9110, a strong ETag, its digest (RFC 9530).

In: the request, the bytes and their sha256 in hex. Out: 200, 206 or 304. What cannot be served is a ProblemError:
412 for an If-Match that fails, 416 for a range outside. Several ranges in one request are answered with the whole.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from latentrelay.cloud.errors import ProblemError
from latentrelay.runtime.handoff import MEDIA_TYPE
from starlette.requests import Request
from starlette.responses import Response

_RANGE = re.compile(r"^bytes=([0-9]{0,18})-([0-9]{0,18})$")


def blob_headers(digest: str) -> dict[str, str]:
    """ETag, Repr-Digest, Accept-Ranges and Cache-Control of the blob with this sha256 in hex."""
    return {
        "ETag": f'"{digest}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
        "Accept-Ranges": "bytes",
        "Cache-Control": "no-store",
    }


def whole_blob(blob: bytes, digest: str, extra: Mapping[str, str]) -> Response:
    """The blob as the answer to a POST, which knows no conditions and no ranges."""
    return Response(blob, headers={**blob_headers(digest), **extra}, media_type=MEDIA_TYPE)


def blob_response(request: Request, blob: bytes, digest: str, extra: Mapping[str, str]) -> Response:
    """The answer to a GET or HEAD of the blob: conditions first, then the range."""
    headers = {**blob_headers(digest), "Vary": "Accept", **extra}
    if_match = request.headers.get("if-match")
    if if_match is not None and not _names(if_match, digest, weak=False):
        raise ProblemError(
            412,
            "precondition-failed",
            "The result is not the one that If-Match names.",
            field="if-match",
            received=if_match[:80],
            wanted=f'"{digest}"',
            headers={"ETag": headers["ETag"]},
        )
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None and _names(if_none_match, digest, weak=True):
        return Response(status_code=304, headers=headers)
    span = _span(request, len(blob), digest)
    if span is None:
        return Response(blob, headers=headers, media_type=MEDIA_TYPE)
    first, last = span
    headers["Content-Range"] = f"bytes {first}-{last}/{len(blob)}"
    return Response(blob[first : last + 1], 206, headers=headers, media_type=MEDIA_TYPE)


def _span(request: Request, size: int, digest: str) -> tuple[int, int] | None:
    """First and last byte asked for, None for all of them. A range header that is not one is ignored (RFC 9110)."""
    asked = _RANGE.match(request.headers.get("range", "").strip())
    if_range = request.headers.get("if-range")
    if asked is None or asked.group(0) == "bytes=-" or (if_range is not None and if_range.strip() != f'"{digest}"'):
        return None
    start, end = asked.groups()
    if not start:
        first, last = max(0, size - int(end)), size - 1
    else:
        first, last = int(start), min(int(end), size - 1) if end else size - 1
        if end and int(end) < first:
            return None
    if first >= size or (not start and int(end) == 0):
        detail = f"The result has {size} bytes; the range lies outside."
        outside = {"ETag": f'"{digest}"', "Content-Range": f"bytes */{size}"}
        raise ProblemError(
            416,
            "range-not-satisfiable",
            detail,
            field="range",
            received=asked.group(0),
            wanted=f"within 0-{size - 1}",
            headers=outside,
        )
    return first, last


def _names(header: str, digest: str, *, weak: bool) -> bool:
    """Whether a list of entity tags names this one; `*` names any. Weak comparison ignores W/, strong refuses it."""
    tags = [each.strip() for each in header.split(",")]
    if weak:
        tags = [each.removeprefix("W/") for each in tags]
    return "*" in tags or f'"{digest}"' in tags
