"""The HTTP of a handoff with the standard library: a second reading of docs/embedding.md, sections 1 and 2.

`SecondClient(url, token).handoff(request, deadline_s)` returns the bytes of the blob, its digest checked, or raises
Unavailable, Refused or ProtocolError.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import ipaddress
import json
import random
import re
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Document = dict[str, Any]
T = TypeVar("T")
HANDOFF, STATUS, EVENTS = "application/vnd.latentrelay.handoff", "application/json", "text/event-stream"
PROBLEM, JSON_BYTES, BLOB_BYTES, STREAM_BYTES = "application/problem+json", 2**20, 2**26, 2**26
SILENCE_S, CONNECT_S, WAIT_S, KEPT_S, LEAVE_S = 15.0, 5.0, 10.0, 30.0, 0.5
FEATURE = {"accept_splits": "accept_splits", "deadline_ms": "deadline", "deterministic": "deterministic",
           "preview": "preview", "step_cache": "step_cache"}  # fmt: skip
OVER_ONCE_ACCEPTED = {"queue-full", "memory", "store-full", "run-interrupted"}
NEVER_REPEATED = {"deadline-unreachable", "run-interrupted", "quota-used"}


class Failed(Exception):
    """`kind`: a problem's kind, or what happened; `field`: what it is about, where that is known."""

    def __init__(self, kind: str, why: str = "", *, field: str | None = None) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind = kind
        self.field = field


class Unavailable(Failed):
    """The cloud cannot do it now; the device can."""


class Refused(Failed):
    """The request is wrong for this cloud."""


class ProtocolError(Failed):
    """An answer that the protocol does not know."""


class _Again(Exception):
    """The same request may be made again; `error` is raised if there is no time for it."""

    def __init__(self, error: Failed, after: float = 0.0) -> None:
        self.error = error
        self.after = after


class _Cut(Exception):
    """The connection ended, or stayed silent, before the answer did."""


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    pieces: Iterator[bytes]

    @property
    def media_type(self) -> str:
        return (self.headers.get("Content-Type") or "").split(";")[0].strip().lower()

    def seconds(self) -> float | None:
        text = (self.headers.get("Retry-After") or "").strip()
        return float(text) if re.fullmatch(r"[0-9]{1,6}", text) else None

    def document(self, *media_types: str) -> Document:
        if self.media_type not in media_types:
            raise ProtocolError("media-type", f"{self.status} with {self.media_type!r}")
        try:
            document = json.loads(b"".join(self.pieces))
        except (ValueError, RecursionError) as error:
            raise ProtocolError("json", str(error)) from None
        if not isinstance(document, dict):
            raise ProtocolError("json", "not an object")
        return document


@dataclass
class _Job:
    """What is known of one handoff."""

    until: float
    body: bytes = b""
    key: str | None = None
    modern: bool = True
    features: frozenset[str] = frozenset()
    posted: bool = False  # the cloud may have the job
    id: str | None = None
    part: bytearray = field(default_factory=bytearray)
    etag: str | None = None
    pieced: bool = False
    whole: bool = False
    failures: int = 0
    unreachable: int = 0
    losses: int = 0

    def left(self) -> float:
        return self.until - time.monotonic()

    def drop(self) -> None:
        self.part.clear()
        self.etag, self.pieced = None, False


def checked(request: Document, caps: Document) -> None:
    """Refused, with the first field of the request that this cloud does not take."""

    def demand(condition: bool, name: str) -> None:
        if not condition:
            raise Refused("capabilities", f"{name} is not what this cloud serves", field=name)

    sampler = request.get("sampler", caps["default_sampler"])
    demand(sampler in caps["samplers"], "sampler")
    served, limits, split = caps["samplers"][sampler], caps["limits"], request["split"]
    demand(request.get("model_digest") in (None, caps["model"]["digest"]), "model_digest")
    demand(request.get("scheduler_digest") in (None, served["scheduler_digest"]), "scheduler_digest")
    demand(request.get("dtype", "float16") in caps["dtypes"], "dtype")
    for name in ("height", "width"):
        demand(0 < request[name] <= limits["side"] and request[name] % caps["size_multiple"] == 0, name)
    demand(0 < request["num_steps"] <= caps["max_steps"], "num_steps")
    demand(0 <= split <= request["num_steps"], "split")
    splits = request.get("accept_splits", [])
    demand(len(splits) <= 64 and all(0 < each < split for each in splits), "accept_splits")
    for name in ("prompt", "negative_prompt"):
        demand(len(request.get(name, "")) <= limits["prompt_chars"], name)
    demand(1 <= request.get("guidance", 7.5) <= limits["guidance"], "guidance")
    demand(served["branches"] == 2 or request.get("guidance") == 1, "guidance")
    demand(served["branches"] == 2 or not request.get("negative_prompt"), "negative_prompt")
    demand(0 <= request["seed"] < 2**64, "seed")
    demand(bool(set(request.get("wire_versions", ["1.1", "1.0"])) & set(caps["wire_versions"])), "wire_versions")


class SecondClient:
    """One cloud. `watch(status document)` is called for each event, if given; what it raises cancels the handoff."""

    def __init__(
        self, url: str, token: str | None = None, watch: Callable[[Document], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._url = urllib.parse.urlsplit(url)
        if self._url.scheme != "https" and not _is_loopback(self._url.hostname or ""):
            raise ValueError("plain HTTP to another machine")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._watch = watch
        self._sleep = sleep
        self._caps: tuple[float, Document] | None = None
        self._open = contextlib.ExitStack()

    def handoff(self, request: Document, deadline_s: float = 60.0) -> bytes:
        """The blob that the cloud makes of `request`, whose `deadline_ms` and `wire_versions` are set here."""
        job = _Job(time.monotonic() + deadline_s)
        try:
            caps = self.capabilities(job)
            try:
                checked(request, caps)
            except (KeyError, TypeError, AttributeError) as error:
                raise ProtocolError("capabilities", repr(error)) from None
            self._prepare(job, request, caps)
            self._post(job)
            while True:
                if job.whole:
                    return bytes(job.part)
                if self._watch and job.id and not job.part and "events" in job.features:
                    self._repeat(job, lambda: self._follow(job))
                if not job.whole:
                    self._repeat(job, lambda: self._fetch(job))
        except Failed as error:
            if isinstance(error, Refused):
                self._caps = None
            if job.left() <= 0 or getattr(error, "late", False):
                self._leave(job)
            raise
        except BaseException:  # the user cancels
            self._leave(job)
            raise
        finally:
            self._open.close()

    def capabilities(self, job: _Job) -> Document:
        if self._caps is None or time.monotonic() - self._caps[0] > KEPT_S:

            def ask() -> Document:
                answer = self._answer(job, "GET", "/v1/capabilities", STATUS)
                return self._judged(job, answer, 200).document(STATUS)

            self._caps = (time.monotonic(), self._repeat(job, ask))
        return self._caps[1]

    def _prepare(self, job: _Job, request: Document, caps: Document) -> None:
        job.modern, job.features = "features" in caps, frozenset(caps.get("features", ()))
        body = {name: value for name, value in request.items() if FEATURE.get(name, "") in (job.features | {""})}
        body.pop("wire_versions", None)
        if job.modern:
            body["wire_versions"] = request.get("wire_versions", ["1.1", "1.0"])
        if "deadline" in job.features:
            left = max(job.left(), 0.0)
            body["deadline_ms"] = min(max(int(1000 * (left - min(0.1 * left, 1.0))), 1), 3600000)
        job.body = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        job.key = secrets.token_hex(16) if "idempotency" in job.features else None
        if len(job.body) > caps["limits"].get("body_bytes", len(job.body)):
            raise Refused("capabilities", "the body is too long", field="body")

    def _post(self, job: _Job) -> None:
        """Leaves the job's id, or a part of the blob, or all of it."""

        def ask() -> None:
            prefer = "wait" if not job.modern else "respond-async" if self._watch else f"wait={_wait(job):.3f}"
            headers = {"Prefer": prefer, "Content-Type": STATUS} | ({"Idempotency-Key": job.key} if job.key else {})
            silence = job.left() if not job.modern else (_wait(job) if "wait" in prefer else 0) + SILENCE_S
            answer = self._answer(job, "POST", "/v1/handoffs", HANDOFF, headers, job.body, silence=silence)
            if answer.status >= 400:
                job.posted = answer.status in (408, 425) or answer.status >= 500
            answer = self._judged(job, answer, 200, 202)
            job.id = _job_id(answer.headers)
            if answer.status == 202 and job.id is None:
                raise ProtocolError("no-job", "202 without the job's id")
            try:
                self._take(job, answer) if answer.status == 200 else answer.document(STATUS)
            except _Cut:
                if job.id is None:
                    raise

        self._repeat(job, ask, may_repeat=job.key is not None)

    def _follow(self, job: _Job) -> None:
        """Events until the job has ended."""
        if job.id is None:
            return self._post(job)
        answer = self._judged(job, self._answer(job, "GET", f"/v1/handoffs/{job.id}", EVENTS), 200)
        if answer.media_type != EVENTS:
            raise ProtocolError("media-type", answer.media_type)
        for name, status in _events(answer.pieces):
            job.failures = 0
            _check_preview(status.get("preview"))
            if self._watch:
                self._watch(status)
            if name in ("failed", "cancelled"):
                problem = status.get("problem") or {"type": "urn:latentrelay:problem:cancelled", "status": 410}
                number = problem.get("status")
                raise self._verdict(job, number if type(number) is int else 500, problem, None, accepted=True)[0]
            if name == "done":
                return
        raise _Cut("the events ended early")

    def _fetch(self, job: _Job) -> None:
        """The blob, or what is missing of it."""
        if job.id is None:
            return self._post(job)
        wait, began = _wait(job), time.monotonic()
        headers = {"Prefer": f"wait={wait:.3f}"}
        if job.part and job.etag:
            headers |= {"Range": f"bytes={len(job.part)}-", "If-Range": job.etag}
        answer = self._answer(job, "GET", f"/v1/handoffs/{job.id}", HANDOFF, headers, silence=wait + SILENCE_S)
        if answer.status == 416:
            job.drop()
            raise _Again(Unavailable("dropped", "what came was longer than what is there"))
        if answer.status in (200, 206):
            return self._take(job, answer)
        self._judged(job, answer, 202).document(STATUS)
        if time.monotonic() - began < wait / 2:
            self._pause(job, answer.seconds() or 1.0, Unavailable("timeout", "the job is not done"))

    def _take(self, job: _Job, answer: Answer) -> None:
        """Adds a 200's or a 206's bytes to the part; returns when the whole is there."""
        if answer.media_type != HANDOFF:
            raise ProtocolError("media-type", f"{answer.status} with {answer.media_type!r}")
        etag = answer.headers.get("ETag")
        if answer.status == 206:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range") or "")
            numbers = [int(each) for each in match.groups()] if match else [-1, 0, 0]
            if numbers[0] != len(job.part) or numbers[1] != numbers[2] - 1 or etag != job.etag:
                job.drop()
                raise _Again(Unavailable("dropped", "another part than the one asked for"))
            if numbers[2] > BLOB_BYTES:
                raise ProtocolError("too-long", f"{numbers[2]} bytes")
            job.pieced = True
        else:
            job.drop()
            job.etag = etag if etag and re.fullmatch(r'"[0-9a-f]{64}"', etag) else None
        try:
            for piece in answer.pieces:
                job.part += piece
                job.failures = 0
                if len(job.part) > BLOB_BYTES:
                    raise ProtocolError("too-long", "more than a blob may have")
        except _Cut:
            if job.etag is None or "range" not in job.features:
                job.drop()
            raise
        digest = hashlib.sha256(job.part).digest()
        named = answer.headers.get("Repr-Digest")
        said = [(job.etag or "").strip('"') == digest.hex()] if job.etag else []
        said += [f"sha-256=:{base64.b64encode(digest).decode()}:" in named.replace(" ", "").split(",")] if named else []
        if all(said) and (said or not job.modern):
            job.whole = True
            return
        pieced = job.pieced
        job.drop()
        if not said or not pieced:
            raise ProtocolError("digest", "the bytes are not those of the digest" if said else "no digest came")
        raise _Again(Unavailable("dropped", "the parts do not make the whole"))

    def _leave(self, job: _Job) -> None:
        """Tells the cloud that nobody waits any more, for half a second at most."""
        if not job.posted or not job.modern:
            return
        rest = _Job(time.monotonic() + LEAVE_S, job.body, job.key, features=job.features, id=job.id)
        try:
            if rest.id is None and rest.key:
                headers = {"Prefer": "respond-async", "Content-Type": STATUS, "Idempotency-Key": rest.key}
                rest.id = _job_id(self._answer(rest, "POST", "/v1/handoffs", HANDOFF, headers, rest.body).headers)
            if rest.id:
                self._answer(rest, "DELETE", f"/v1/handoffs/{rest.id}", STATUS)
        except (Failed, _Again, _Cut):
            pass

    def _repeat(self, job: _Job, ask: Callable[[], T], may_repeat: bool = True) -> T:
        while True:
            try:
                result = ask()
            except _Again as again:
                error, after = again.error, again.after
            except _Cut as cut:
                error, after = Unavailable("timeout" if job.left() <= 0 else "dropped", str(cut)), 0.0
            else:
                job.failures = job.unreachable = 0
                return result
            job.unreachable = job.unreachable + 1 if error.kind == "unreachable" else 0
            if (job.unreachable >= 3 and not job.posted) or (job.posted and not may_repeat):
                raise error
            job.failures += 1
            self._pause(job, after + random.uniform(0, min(2.0, 0.1 * 2 ** min(job.failures - 1, 9))), error)

    def _pause(self, job: _Job, seconds: float, error: Failed) -> None:
        if seconds >= job.left():
            error.late = True  # type: ignore[attr-defined]
            raise error
        self._sleep(seconds)

    def _problem(self, answer: Answer) -> Document:
        """The problem document of an answer, or an empty one. Read once."""
        if answer.media_type != PROBLEM:
            return {}
        try:
            document = answer.document(PROBLEM)
        except ProtocolError as error:
            if error.kind != "json":
                raise
            return {}
        answer.pieces = iter([json.dumps(document).encode()])
        return document

    def _judged(self, job: _Job, answer: Answer, *good: int) -> Answer:
        if answer.status in good:
            return answer
        if answer.status < 400:
            raise ProtocolError("status", f"{answer.status}")
        accepted = job.id is not None or "Latentrelay-Job" in answer.headers
        error, again = self._verdict(job, answer.status, self._problem(answer), answer.seconds(), accepted=accepted)
        if error.kind == "unknown-handoff" and job.id is not None:
            job.drop()
            job.id, job.losses = None, job.losses + 1
            again, error = job.key is not None and job.losses <= 3, Unavailable("lost", "the job is not known any more")
        if again:
            raise _Again(error, answer.seconds() or 0.0)
        raise error

    def _verdict(
        self, job: _Job, status: int, problem: Document, after: float | None, *, accepted: bool
    ) -> tuple[Failed, bool]:
        """The error of a status and a problem, and whether to make the request again."""
        named = str(problem.get("type", ""))
        kind = named.rpartition(":")[2] if named.startswith("urn:latentrelay:problem:") else f"status-{status}"
        field, why = problem.get("field"), str(problem.get("detail", ""))[:300]
        waits = status in (429, 502, 503, 504) and (after is not None or not problem)
        over = kind in NEVER_REPEATED or (status == 503 and accepted and kind in OVER_ONCE_ACCEPTED)
        if not over and (status in (408, 425) or waits):
            return Unavailable(kind, why, field=field), job.modern
        if over or status == 410 or status >= 500:
            return Unavailable(kind, why, field=field), False
        return Refused(kind, why, field=field), False

    def _answer(
        self, job: _Job, method: str, path: str, accept: str, headers: Document | None = None,
        body: bytes | None = None, *, silence: float = SILENCE_S,
    ) -> Answer:  # fmt: skip
        """The start of an answer. Unreachable: _Again; an ended connection: _Cut. One connection at a time."""
        self._open.close()
        host, port = self._url.hostname or "", self._url.port
        secure = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(host, port, timeout=max(min(CONNECT_S, job.left()), 0.001))
        try:
            connection.connect()
        except OSError as error:
            raise _Again(Unavailable("unreachable", str(error))) from None
        sock = connection.sock
        self._open.callback(connection.close)
        job.posted = job.posted or method == "POST"
        fixed = {"Accept": f"{accept}, {PROBLEM}", "Accept-Encoding": "identity", "Connection": "close"}
        try:
            sock.settimeout(max(min(silence, job.left()), 0.001))
            connection.request(method, self._url.path.rstrip("/") + path, body, self._headers | fixed | (headers or {}))
            response = connection.getresponse()
        except OSError as error:
            raise _Cut(str(error)) from None
        except http.client.HTTPException as error:
            raise ProtocolError("http", str(error)) from None
        self._open.callback(response.close)
        answer = Answer(response.status, response.headers, iter(()))
        limit = {HANDOFF: BLOB_BYTES, EVENTS: STREAM_BYTES}.get(answer.media_type, JSON_BYTES)
        length = response.length
        if (response.headers.get("Content-Encoding") or "identity").lower() != "identity":
            raise ProtocolError("encoding", "an encoded body")
        if length is not None and length > limit:
            raise ProtocolError("too-long", f"{length} bytes")

        def pieces() -> Iterator[bytes]:
            got = 0
            try:
                while True:
                    sock.settimeout(max(min(silence, job.left()), 0.001))
                    if not (piece := response.read1(65536)):
                        break
                    got += len(piece)
                    if got > limit:
                        raise ProtocolError("too-long", f"more than {limit} bytes")
                    yield piece
                    if job.left() <= 0:
                        raise _Cut("the deadline passed")
            except (OSError, http.client.HTTPException) as error:
                raise _Cut(str(error)) from None
            if length is not None and got < length:
                raise _Cut(f"{got} bytes of {length}")

        answer.pieces = pieces()
        return answer


def _wait(job: _Job) -> float:
    return max(min(WAIT_S, job.left()), 0.0)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _job_id(headers: http.client.HTTPMessage) -> str | None:
    for text in (headers.get("Latentrelay-Job"), (headers.get("Location") or "").rpartition("/")[2]):
        if text and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
            return text
    return None


def _check_preview(preview: Any) -> None:
    """ProtocolError unless it is None or a picture of at most 512 pixels a side."""
    if preview is None:
        return
    try:
        height, width, data = preview["height"], preview["width"], base64.b64decode(preview["rgb"], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError("preview", repr(error)) from None
    if not all(type(side) is int and 1 <= side <= 512 for side in (height, width)) or len(data) != height * width * 3:
        raise ProtocolError("preview", f"{height} x {width}, {len(data)} bytes")


def _events(pieces: Iterator[bytes]) -> Iterator[tuple[str, Document]]:
    """(name, data) of each event."""
    rest, name, data = b"", "message", []
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if any(len(line) > JSON_BYTES for line in [*lines, rest]):
            raise ProtocolError("too-long", "a line of the events")
        for line in lines:
            key, _, value = line.decode("utf-8", "replace").rstrip("\r").partition(":")
            if key == "event":
                name = value.strip()
            elif key == "data":
                data.append(value.removeprefix(" "))
            elif not line.strip() and data:
                try:
                    document = json.loads("\n".join(data))
                except (ValueError, RecursionError) as error:
                    raise ProtocolError("json", str(error)) from None
                if not isinstance(document, dict):
                    raise ProtocolError("json", "an event that is no object")
                yield name, document
                name, data = "message", []
