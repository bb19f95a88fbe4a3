"""What an HTTP answer of the cloud means: an error of ours, a digest, a time to wait, a job's state. No I/O.

Nothing in an answer is trusted: types, lengths and digests are checked, text that goes into a message is cut, and no
address that the cloud names is ever followed, only the id of a job in it.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentrelay.runtime.errors import CloudError, CloudProtocolError, CloudRefusedError, CloudUnavailableError
from latentrelay.runtime.strict_json import read_json

ALONE = "Check the address and the network, or run all steps on the device."
MAX_JSON_BYTES = 2**20
PROBLEM_PREFIX = "urn:latentrelay:problem:"
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
STATES = ("queued", "running", "done", "failed", "cancelled", "expired", "deleted")
# Refusals that come for load, or from something between here and there: asking again may help.
_BUSY = (408, 425, 429, 502, 503, 504)
# What asking again may change without a Retry-After that says so, and what it does not change in spite of one.
_TEMPORARY_KINDS = ("unreachable", "dropped", "timeout", "busy", "body-timeout")
_FINAL_KINDS = ("deadline-unreachable", "quota-used", "run-interrupted")
# What a job that was accepted may have ended with; said of no job yet, the first three are refusals for load.
_JOB_ENDS = ("queue-full", "memory", "store-full", "run-failed", "run-interrupted", "deadline-passed")
_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15})")


@dataclass(frozen=True)
class Answer:
    """One answer: status, headers by lower-case name, the body as far as it came, and why it ended early, if it did."""

    status: int
    headers: Mapping[str, str]
    data: bytes = b""
    cut: CloudUnavailableError | None = None

    @property
    def media_type(self) -> str:
        """The media type without parameters, in lower case; empty without one."""
        return self.headers.get("content-type", "").split(";")[0].strip().lower()


@dataclass(frozen=True)
class Progress:
    """How far a job is: `state` one of STATES, `step` steps done of the `split` that the cloud runs of `num_steps`,
    `queue_position` while it waits (0 is next), None otherwise."""

    state: str
    step: int
    split: int
    num_steps: int
    queue_position: int | None = None


def json_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in a body, None where there is none."""
    try:
        document = read_json(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def read_progress(document: Mapping[str, Any]) -> Progress:
    """A status document as progress. Raises CloudProtocolError naming the field that is not what it must be."""
    state, position = document.get("state"), document.get("queue_position")
    if state not in STATES:
        raise CloudProtocolError("the cloud names no known state", got=state, expected=" | ".join(STATES))
    numbers = []
    for name in ("step", "split", "num_steps"):
        value = document.get(name)
        if type(value) is not int or not 0 <= value <= 10**6:
            raise CloudProtocolError(f"the job's {name} is no count", got=value, expected="0 or more")
        numbers.append(value)
    if position is not None and (type(position) is not int or position < 0):
        raise CloudProtocolError("the job's queue_position is no count", got=position, expected="0 or more, or null")
    return Progress(state, numbers[0], numbers[1], numbers[2], position)


def job_id(answer: Answer) -> str | None:
    """The job's id: the header Latentrelay-Job, or the last part of Location; None where neither holds one."""
    for text in (answer.headers.get("latentrelay-job"), answer.headers.get("location", "").rpartition("/")[2]):
        if text and JOB_ID.fullmatch(text):
            return text
    return None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of Retry-After; None without it. A date is not understood: clocks differ."""
    text = headers.get("retry-after", "").strip()
    return float(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def failure(answer: Answer) -> CloudError | None:
    """The error behind an answer's status, None for 2xx."""
    if 200 <= answer.status < 300:
        return None
    problem = json_object(answer.data) or {"detail": answer.data[:200].decode("utf-8", "replace")}
    return problem_error(answer.status, problem, retry_after_s(answer.headers))


def problem_error(status: int, problem: Mapping[str, Any], wait_s: float | None = None) -> CloudError:
    """The error behind a status and a problem document."""
    detail = str(problem.get("detail") or problem.get("title") or "no detail was given").rstrip(".")[:500]
    if status in _BUSY or status >= 500:
        kind = _kind(problem, "busy" if status in _BUSY else "broken")
        return CloudUnavailableError(
            f"the cloud cannot serve now ({status}): {detail}", kind=kind, retry_after_s=wait_s, do=ALONE
        )
    if status == 410 or (status == 404 and _kind(problem) == "unknown-handoff"):
        kind = _kind(problem)
        return CloudUnavailableError(
            f"the cloud's job is gone ({status}): {detail}", kind="lost" if status == 404 else f"job-{kind}", do=ALONE
        )
    if 400 <= status < 500:
        return CloudRefusedError(status, problem)
    return CloudProtocolError("the cloud answered with an unexpected status", got=status, expected=200)


def worth_asking_again(error: CloudError, *, of_a_job: bool) -> bool:
    """Whether the same request may succeed a little later: a refusal for load carries Retry-After. `of_a_job`: it was
    said of a job that was accepted, whose own end does not change."""
    if not isinstance(error, CloudUnavailableError) or error.kind in _FINAL_KINDS:
        return False
    if of_a_job and error.kind in _JOB_ENDS:
        return False
    return error.kind in _TEMPORARY_KINDS or error.retry_after_s is not None


def _kind(problem: Mapping[str, Any], otherwise: str = "gone") -> str:
    kind = str(problem.get("type", "")).removeprefix(PROBLEM_PREFIX)
    return kind if re.fullmatch(r"[a-z0-9-]{1,40}", kind) else otherwise


def etag_of(headers: Mapping[str, str]) -> str | None:
    """The sha256 in a strong ETag, None without one."""
    found = re.fullmatch(r'"([0-9a-f]{64})"', headers.get("etag", "").strip())
    return found.group(1) if found else None


def check_digests(data: bytes, headers: Mapping[str, str]) -> None:
    """ETag holds the sha256 in hex, Repr-Digest (RFC 9530) in base64: at least one must be there, all must be right."""
    digest = hashlib.sha256(data)
    etag = headers.get("etag", "").removeprefix("W/").strip('"')
    members = [member.strip() for member in headers.get("repr-digest", "").split(",")]
    stated = [member for member in members if member.startswith("sha-256=")]
    expected = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    if not etag and not stated:
        raise CloudProtocolError("the cloud sent no digest of its answer", expected="ETag or Repr-Digest")
    if (etag and etag != digest.hexdigest()) or any(member != expected for member in stated):
        raise CloudProtocolError(
            "the cloud's answer differs from its digest",
            got=etag or stated[0],
            expected=digest.hexdigest(),
            do="Ask again; something between here and there alters the bytes.",
        )


def range_start(headers: Mapping[str, str]) -> tuple[int, int] | None:
    """First byte and total of Content-Range, None where it does not name a whole range that ends with the total."""
    found = _RANGE.fullmatch(headers.get("content-range", "").strip())
    if found is None:
        return None
    first, last, total = (int(each) for each in found.groups())
    return (first, total) if first <= last == total - 1 else None
