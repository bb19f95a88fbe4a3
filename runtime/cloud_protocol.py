"""The conversation with a cloud, without I/O: which request comes next, what its answer means, when to give up.

`Conversation.run()` is a generator: it yields an `Exchange` (one HTTP request to make) or a `Pause` (seconds to wait),
is sent an `Answer` or thrown a CloudUnavailableError, and returns the `Handoff`. The sync and the async client drive
it. Capabilities first, then POST with an idempotency key, then the job's events or status and its blob, resumed by
Range where a connection was cut. Every request is idempotent where the cloud knows keys, so each is asked again with
jittered back-off; a cloud from before that is asked once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial

from latentrelay.runtime.cloud_answers import (
    ALONE,
    MAX_JSON_BYTES,
    Answer,
    Progress,
    check_digests,
    failure,
    job_id,
    json_object,
    problem_error,
    read_progress,
    retry_after_s,
    worth_asking_again,
)
from latentrelay.runtime.cloud_blob import BlobParts
from latentrelay.runtime.cloud_capabilities import Capabilities, CapabilitiesCache, body_for
from latentrelay.runtime.cloud_events import EVENTS_TYPE, EventReader, read_preview
from latentrelay.runtime.cloud_exchange import Exchange, Pause, Step, check_deadline, check_key, check_traceparent
from latentrelay.runtime.cloud_retries import DEFAULT_RETRIES, RetryPolicy
from latentrelay.runtime.errors import CloudError, CloudProtocolError, CloudRefusedError, CloudUnavailableError
from latentrelay.runtime.handoff import DEFAULT_LIMITS, MEDIA_TYPE, Handoff, HandoffLimits
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.runtime.preview import Preview

OnProgress = Callable[[Progress], None]
OnPreview = Callable[[Preview], None]
JSON_TYPE, PROBLEM_TYPE = "application/json", "application/problem+json"
_ENDED_OTHERWISE = ("failed", "cancelled", "expired", "deleted")


@dataclass(eq=False)
class Conversation:
    """One handoff asked for. `attempts` is 1 and 1 more for each request that had to be repeated.

    `url` is for messages; `deadline_s` counts from when the conversation is made. `cancellable`: the job's id must be
    known while it runs. Raises RequestError when made with a key, a trace or a deadline that cannot be.
    """

    request: HandoffRequest
    url: str
    deadline_s: float
    cache: CapabilitiesCache
    limits: HandoffLimits = DEFAULT_LIMITS
    retries: RetryPolicy = DEFAULT_RETRIES
    on_progress: OnProgress | None = None
    on_preview: OnPreview | None = None
    cancellable: bool = False
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    traceparent: str = field(default_factory=lambda: f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01")
    attempts: int = 1
    job: str | None = None
    _body: bytes = b""
    _failures: int = 0  # in a row, since anything last moved
    _gone_since: float | None = None  # when the first of the last attempts in a row to find nobody began
    _asked: bool = False  # a POST was sent whose fate is not known: the cloud may have accepted it
    _over: bool = False  # nothing is left to cancel there

    def __post_init__(self) -> None:
        check_key(self.key)
        check_traceparent(self.traceparent)
        self.deadline = time.monotonic() + check_deadline(self.deadline_s)
        self._blob = BlobParts(self.limits.max_bytes)

    def run(self) -> Generator[Step, Answer, Handoff]:
        """The whole conversation; returns the parsed handoff. Raises CloudError, HandoffFormatError."""
        cloud = yield from self.capabilities()
        in_s = self._left() - min(1.0, 0.1 * self._left())  # the rest is for the blob's way here
        self._body = body_for(self.request, cloud, deadline_s=in_s, preview=self.on_preview is not None)
        try:
            blob = yield from (self._old_job() if cloud.features is None else self._job(cloud))
        except CloudRefusedError:
            self.cache.forget()  # what it serves may have changed
            raise
        self._over = True
        return Handoff.from_bytes(blob, self.limits)

    def capabilities(self) -> Generator[Step, Answer, Capabilities]:
        """What the cloud serves, from the cache where it is fresh. Raises CloudError."""
        known = self.cache.get()
        if known is not None:
            return known
        answer = yield from self._insist(lambda: self._exchange("GET", "/v1/capabilities", JSON_TYPE))
        document = json_object(_of_type(answer, JSON_TYPE))
        if document is None:
            raise CloudProtocolError(
                "the capabilities are not a JSON object", do="Check that this is a cloud's address."
            )
        capabilities = Capabilities.parse(document)
        self.cache.put(capabilities)
        return capabilities

    def farewell(self, grace_s: float = 0.5) -> Generator[Step, Answer, None]:
        """Have the cloud stop what nobody waits for any more: DELETE, its id asked for first where it is not known.
        Best effort, within `grace_s` seconds from now; whatever goes wrong is for nobody."""
        if self._over or not (self.job or self._asked):
            return
        self._over = True
        self.deadline = time.monotonic() + grace_s
        if self.job is None:
            self.job = job_id((yield self._post("respond-async", 0.0)))
        if self.job is not None:
            yield self._exchange("DELETE", self._path(), JSON_TYPE)

    # Parts of the conversation

    def _old_job(self) -> Generator[Step, Answer, bytes]:
        """A cloud without keys: one POST whose answer is the blob. Repeated, it would be paid for twice."""
        most, left = self.limits.max_bytes, self._left()
        if left <= 0:
            raise self.too_late()
        headers = {"Prefer": "wait"}
        answer = yield self._exchange(
            "POST", "/v1/handoffs", MEDIA_TYPE, headers, body=self._body, wait_s=left, max_bytes=most
        )
        refusal = failure(answer) or answer.cut
        if refusal is not None:
            raise refusal
        data = _of_type(answer, MEDIA_TYPE)
        check_digests(data, answer.headers)
        return data

    def _job(self, cloud: Capabilities) -> Generator[Step, Answer, bytes]:
        """POST until the cloud has accepted, follow the job, fetch its blob; all anew where the cloud has lost it."""
        reported = self.on_progress is not None or self.on_preview is not None
        while True:
            try:
                if self.job is None:
                    blob = yield from self._accepted(at_once=reported or self.cancellable)
                    if blob is not None:
                        return blob
                if reported:
                    yield from self._follow(cloud)
                return (yield from self._fetch())
            except CloudUnavailableError as error:
                if error.kind != "lost":
                    raise
                self.job = None
                self._blob.drop()
                yield from self._after(error)

    def _accepted(self, at_once: bool) -> Generator[Step, Answer, bytes | None]:
        """The blob where the cloud was done while the client waited; None otherwise, with `job` set."""
        while self.job is None:
            wait_s = 0.0 if at_once else self._wait_s()
            prefer = "respond-async" if at_once else f"wait={wait_s:.0f}"
            answer = yield from self._insist(partial(self._post, prefer, wait_s))
            self.job = job_id(answer)
            if answer.status == 200:
                blob = self._blob.take(answer)
                if blob is not None:
                    return blob
            elif self.job is None:
                raise CloudProtocolError("the cloud named no job", got=answer.status, expected="202 with Location")
            if answer.cut is not None:
                yield from self._after(answer.cut)
        return None

    def _follow(self, cloud: Capabilities) -> Generator[Step, Answer, None]:
        """Report progress until the job is done: by events, or by asking where the cloud has none."""
        done = False
        while not done:
            if cloud.has("events"):
                done = yield from self._watch()
                continue
            answer = yield from self._insist(lambda: self._exchange("GET", self._path(), JSON_TYPE))
            done = self._told(_of_type(answer, JSON_TYPE))
            if not done:
                yield self._pause(retry_after_s(answer.headers) or 0.5)

    def _watch(self) -> Generator[Step, Answer, bool]:
        """One connection of the job's events; whether the job is done when it ends."""
        reader, done = EventReader(), False

        def on_bytes(chunk: bytes) -> bool:
            nonlocal done
            for _, data in reader.feed(chunk):
                self._failures = 0
                done = self._told(data) or done
            return done

        answer = yield from self._insist(lambda: self._exchange("GET", self._path(), EVENTS_TYPE, on_bytes=on_bytes))
        _of_type(answer, EVENTS_TYPE)
        if not done:
            yield from self._after(answer.cut or self._dropped("the cloud's events ended before the job"))
        return done

    def _told(self, data: bytes) -> bool:
        """Hand a status document to the callbacks; whether the job is done. Raises what stands in a failed job's."""
        document = json_object(data)
        if document is None:
            raise CloudProtocolError("the job's status is not a JSON object")
        progress = read_progress(document)
        if progress.state in _ENDED_OTHERWISE:
            self._over = True
            problem = document.get("problem")
            if isinstance(problem, dict) and type(problem.get("status")) is int:
                raise problem_error(problem["status"], problem)
            raise CloudUnavailableError(f"the cloud's job was {progress.state}", kind=f"job-{progress.state}", do=ALONE)
        if self.on_progress is not None:
            self.on_progress(progress)
        preview = read_preview(document) if self.on_preview is not None else None
        if preview is not None and self.on_preview is not None:
            self.on_preview(preview)
        return progress.state == "done"

    def _fetch(self) -> Generator[Step, Answer, bytes]:
        """The blob, waited for and resumed."""
        while True:
            asked, wait_s = time.monotonic(), self._wait_s()
            answer = yield from self._insist(partial(self._get_blob, wait_s))
            if answer.status == 202:
                if time.monotonic() - asked < wait_s / 2:
                    yield self._pause(min(1.0, retry_after_s(answer.headers) or 0.5))
                continue
            blob = self._blob.take(answer)
            if blob is not None:
                return blob
            if self._blob.grown:
                self._failures = 0
            yield from self._after(answer.cut or self._dropped("the parts of the blob do not fit together"))

    # Requests

    def _get_blob(self, wait_s: float) -> Exchange:
        headers = self._blob.range_headers() or {"Prefer": f"wait={wait_s:.0f}"}
        return self._exchange("GET", self._path(), MEDIA_TYPE, headers, wait_s=wait_s, max_bytes=self._blob.room)

    def _post(self, prefer: str, wait_s: float) -> Exchange:
        headers, most = {"Prefer": prefer, "Idempotency-Key": self.key}, self.limits.max_bytes
        return self._exchange(
            "POST", "/v1/handoffs", MEDIA_TYPE, headers, body=self._body, wait_s=wait_s, max_bytes=most
        )

    def _exchange(
        self,
        method: str,
        path: str,
        media_type: str,
        headers: dict[str, str] | None = None,
        *,
        body: bytes | None = None,
        wait_s: float = 0.0,
        max_bytes: int = MAX_JSON_BYTES,
        on_bytes: Callable[[bytes], bool] | None = None,
    ) -> Exchange:
        sent = {"Accept": f"{media_type}, {PROBLEM_TYPE}", "traceparent": self.traceparent, **(headers or {})}
        if body is not None:
            sent["Content-Type"] = JSON_TYPE
        silence_s = wait_s + self.retries.silence_s
        return Exchange(method, path, sent, self.deadline, silence_s, self.deadline_s, body, max_bytes, on_bytes)

    def _path(self) -> str:
        return f"/v1/handoffs/{self.job}"

    # Asking again

    def _insist(self, make: Callable[[], Exchange]) -> Generator[Step, Answer, Answer]:
        """A 2xx answer to an idempotent request, asked again while that may help. Raises CloudError."""
        while True:
            if self._left() <= 0:
                raise self.too_late()
            exchange = make()
            before, self._asked = self._asked, self._asked or exchange.method == "POST"
            begun = time.monotonic()
            try:
                answer = yield exchange
            except CloudUnavailableError as error:
                if error.kind == "unreachable":
                    self._asked = before
                    self._gone_since = begun if self._gone_since is None else self._gone_since
                else:
                    self._gone_since = None
                if self._over:  # the job's own end, read from its events
                    raise
                yield from self._after(error)
                continue
            self._gone_since = None
            refusal = self._refusal(answer)
            if refusal is None:
                if exchange.on_bytes is None and answer.cut is None:
                    self._failures = 0
                return answer
            self._asked = before
            if not worth_asking_again(refusal, of_a_job=bool(self.job or job_id(answer))):
                raise refusal
            yield from self._after(refusal)

    def _refusal(self, answer: Answer) -> CloudError | None:
        """Why an answer is none; a part of a blob or of events is one."""
        if answer.status == 416:
            self._blob.drop()
            return self._dropped("the blob is not what it was")
        if answer.cut is not None and answer.media_type not in (MEDIA_TYPE, EVENTS_TYPE):
            return answer.cut
        return failure(answer)

    def _after(self, error: CloudError) -> Generator[Step, Answer, None]:
        """Wait before asking again; raises the error where that is of no use any more."""
        if not isinstance(error, CloudUnavailableError):
            raise error
        self._failures += 1
        alone = error.kind == "unreachable" and self.job is None and not self._asked
        wait_s = self.retries.wait(self._failures, error.retry_after_s)
        gone_s = 0.0 if self._gone_since is None else time.monotonic() + wait_s - self._gone_since
        dead = gone_s > self.retries.unreachable_s
        if (alone and self._failures >= self.retries.connects) or dead or wait_s >= self._left():
            raise error
        self.attempts += 1
        yield Pause(wait_s)

    def _pause(self, seconds: float) -> Pause:
        return Pause(max(0.0, min(seconds, self._left())))

    def _wait_s(self) -> float:
        """Whole seconds that the cloud is asked to hold an answer back; at least 1, so that none is asked for often."""
        return float(max(1, min(self.retries.wait_s, int(self._left()))))

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def too_late(self) -> CloudUnavailableError:
        """The error of a deadline that has passed."""
        return CloudUnavailableError(f"{self.url} did not answer in {self.deadline_s:g} s", kind="timeout", do=ALONE)

    def _dropped(self, what: str) -> CloudUnavailableError:
        return CloudUnavailableError(what, kind="dropped", do=ALONE)


def _of_type(answer: Answer, media_type: str) -> bytes:
    """The body of a 200 answer of that media type. Raises CloudProtocolError for another."""
    if answer.status != 200:
        raise CloudProtocolError("the cloud answered with an unexpected status", got=answer.status, expected=200)
    if answer.media_type != media_type:
        raise CloudProtocolError("the cloud answered in another media type", got=answer.media_type, expected=media_type)
    return answer.data
