"""The device's side of the cloud's HTTP: ask for a handoff, check what comes back, tell apart why it did not.

What is asked and what an answer means is cloud_protocol.py's; here are the connections, the deadline and cancelling.
No answer in time, 5xx, 408, 425 and 429 are CloudUnavailableError (the device can go on alone); other 4xx are
CloudRefusedError (the request is wrong); a TLS certificate that nobody vouches for is CloudCertificateError; answers
that break the protocol are CloudProtocolError. httpx is imported when a client is first used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from latentrelay.runtime.cloud_answers import Answer
from latentrelay.runtime.cloud_capabilities import Capabilities, CapabilitiesCache
from latentrelay.runtime.cloud_exchange import Pause, Step, check_address, check_deadline
from latentrelay.runtime.cloud_line import Line, Watch
from latentrelay.runtime.cloud_protocol import Conversation, OnPreview, OnProgress
from latentrelay.runtime.cloud_retries import DEFAULT_RETRIES, RetryPolicy
from latentrelay.runtime.cloud_trust import trusted
from latentrelay.runtime.degrade import FailureMemory
from latentrelay.runtime.errors import CloudError, CloudUnavailableError, MissingExtraError, RunCancelledError
from latentrelay.runtime.handoff import DEFAULT_LIMITS, Handoff, HandoffLimits
from latentrelay.runtime.handoff_request import HandoffRequest

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Cancel = Callable[[], bool]


class CloudClient:
    """A client of one cloud; threads may share it. `timeout_s` bounds a whole handoff unless it is given a deadline.

    Plain http is for a loopback address only: prompts, and the token, would cross the network readable; `insecure=True`
    allows it, for a network that is trusted. `ca_file` is PEM: the certificates that an https address is checked
    against, in the place of the public ones; SSL_CERT_FILE counts without it. Capabilities are read
    at most every `capabilities_ttl_s` seconds. `memory` is what `generate` remembers of this cloud's failures.
    `transport` is an httpx transport, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        limits: HandoffLimits = DEFAULT_LIMITS,
        insecure: bool = False,
        retries: RetryPolicy = DEFAULT_RETRIES,
        capabilities_ttl_s: float = 30.0,
        ca_file: Path | str | None = None,
    ) -> None:
        self._loopback = check_address(url, token, insecure)
        self.url = url.rstrip("/")
        self._trust = trusted(url, ca_file)
        self._headers = request_headers(token)
        self.timeout_s = check_deadline(timeout_s)
        self._transport, self._limits, self._retries = transport, limits, retries
        self._cache = CapabilitiesCache(capabilities_ttl_s)
        self._idle: list[Line] = []
        self.memory = FailureMemory()
        self._of_thread = threading.local()

    def __enter__(self) -> CloudClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def attempts(self) -> int:
        """How often the cloud was asked for this thread's last handoff: 1, and 1 more for each repetition."""
        return int(getattr(self._of_thread, "attempts", 0))

    def close(self) -> None:
        """Close the connections that no handoff uses now; the client may be used again."""
        while self._idle:
            self._idle.pop().close()

    def capabilities(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """What the cloud serves, read now: wire versions, model, samplers, limits, load. Raises CloudError."""
        return dict(self.served(deadline_s=deadline_s, anew=True).document)

    def served(
        self, *, deadline_s: float | None = None, anew: bool = False, cancel: Cancel | None = None
    ) -> Capabilities:
        """The same, checked and as a handoff uses it; from the cache where it is fresh and not wanted `anew`."""
        if anew:
            self._cache.forget()
        talk = self._conversation(HandoffRequest("", 0, 0, 0, 0), deadline_s)
        try:
            return self._drive(talk, talk.capabilities(), cancel)
        finally:
            self._of_thread.attempts = talk.attempts

    def handoff(
        self,
        request: HandoffRequest,
        *,
        deadline_s: float | None = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        cancel: Cancel | None = None,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> Handoff:
        """Have the cloud run its steps; returns the parsed handoff.

        `deadline_s` bounds it all, `timeout_s` of the client without it; past it the job is cancelled, which takes up
        to half a second more. `on_progress(Progress)` and `on_preview(Preview)` are called here, between the cloud's
        steps. `cancel()` is asked from another thread, 20 times a second; once it is true the job is cancelled and
        RunCancelledError raised. The same `idempotency_key` with the same request gives the same job; without one each
        call is a job of its own. `traceparent` (W3C) is the app's, or a new one. Not bounded is how long the system
        takes to look a name up. Raises CloudError, HandoffFormatError, RequestError, RunCancelledError; whether the
        handoff fits a bundle is `Handoff.check`'s to say.
        """
        talk = self._conversation(
            request,
            deadline_s,
            on_progress=on_progress,
            on_preview=on_preview,
            cancellable=cancel is not None,
            **({} if idempotency_key is None else {"key": idempotency_key}),
            **({} if traceparent is None else {"traceparent": traceparent}),
        )
        try:
            return self._drive(talk, talk.run(), cancel)
        finally:
            self._of_thread.attempts = talk.attempts

    def _conversation(self, request: HandoffRequest, deadline_s: float | None, **options: Any) -> Conversation:
        seconds = self.timeout_s if deadline_s is None else deadline_s
        return Conversation(request, self.url, seconds, self._cache, self._limits, self._retries, **options)

    def _drive(self, talk: Conversation, steps: Generator[Step, Answer, T], cancel: Cancel | None) -> T:
        """Make the requests of a conversation; whatever ends it early has the cloud stop too."""
        if cancel is not None and cancel():
            raise RunCancelledError("the run was cancelled")
        with self._line() as line:
            try:
                with Watch(line, talk.deadline, cancel) as watch:
                    return _made(steps, line, watch)
            except BaseException:
                steps.close()
                with contextlib.suppress(CloudError, StopIteration):
                    farewell = talk.farewell()
                    with Watch(line, talk.deadline, None) as watch:
                        _made(farewell, line, watch)
                raise

    @contextlib.contextmanager
    def _line(self) -> Iterator[Line]:
        line = self._idle.pop() if self._idle else Line(self._http(), self.url)
        try:
            yield line
        finally:
            self._idle.append(line)

    def _http(self) -> httpx.Client:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", None, purpose="Asking a cloud") from error
        return httpx.Client(
            headers=self._headers,
            transport=self._transport,
            verify=True if self._trust is None else self._trust,
            trust_env=not self._loopback,  # no proxy stands between a machine and itself
        )


def request_headers(token: str | None) -> dict[str, str]:
    """What every request carries."""
    headers = {"User-Agent": "latentrelay", "Accept-Encoding": "identity"}
    return headers if token is None else {**headers, "Authorization": f"Bearer {token}"}


def _made(steps: Generator[Step, Answer, T], line: Line, watch: Watch) -> T:
    """Run a conversation's generator to its end and return what it returns."""
    answer: Answer | None = None
    error: CloudError | None = None
    try:
        while True:
            if watch.check():
                raise RunCancelledError("the run was cancelled")
            step = steps.throw(error) if error is not None else steps.send(answer)  # type: ignore[arg-type]
            answer = error = None
            if isinstance(step, Pause):
                watch.pause(step.seconds)
                continue
            try:
                answer = line.ask(step)
            except CloudUnavailableError as failure:
                error = failure
    except StopIteration as done:
        result: T = done.value
        return result
