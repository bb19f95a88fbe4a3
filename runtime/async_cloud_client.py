"""The device's side of the cloud's HTTP for asyncio: `CloudClient` with `await`; what both share is cloud_protocol.py.

Cancelling the task cancels the cloud's job; so does the deadline. httpx is imported when a client is first used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from latentrelay.runtime.cloud_answers import Answer
from latentrelay.runtime.cloud_capabilities import CapabilitiesCache
from latentrelay.runtime.cloud_client import request_headers
from latentrelay.runtime.cloud_exchange import Exchange, Pause, Step, check_address, check_deadline
from latentrelay.runtime.cloud_line import check_head, take, translated, waits
from latentrelay.runtime.cloud_protocol import Conversation, OnPreview, OnProgress
from latentrelay.runtime.cloud_retries import DEFAULT_RETRIES, RetryPolicy
from latentrelay.runtime.cloud_trust import trusted
from latentrelay.runtime.errors import CloudError, CloudUnavailableError, MissingExtraError, RunCancelledError
from latentrelay.runtime.handoff import DEFAULT_LIMITS, Handoff, HandoffLimits
from latentrelay.runtime.handoff_request import HandoffRequest

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
_POLL_S = 0.05


class AsyncCloudClient:
    """A client of one cloud for one event loop; tasks may share it. Arguments as `CloudClient`'s, `transport` an async
    one. Callbacks are plain functions, called in the loop between the cloud's steps."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
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
        self._client: httpx.AsyncClient | None = None
        self.attempts = 0

    async def __aenter__(self) -> AsyncCloudClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; the client may be used again."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def capabilities(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """What the cloud serves, read now. Raises CloudError."""
        self._cache.forget()
        talk = self._conversation(HandoffRequest("", 0, 0, 0, 0), deadline_s)
        return dict((await self._made(talk.capabilities(), talk.deadline, None)).document)

    async def handoff(
        self,
        request: HandoffRequest,
        *,
        deadline_s: float | None = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        cancel: Callable[[], bool] | None = None,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
    ) -> Handoff:
        """Have the cloud run its steps; as `CloudClient.handoff`. A task that is cancelled meanwhile has the cloud stop
        (within half a second) and stays cancelled; `cancel()` is asked in the loop and raises RunCancelledError."""
        talk = self._conversation(
            request,
            deadline_s,
            on_progress=on_progress,
            on_preview=on_preview,
            cancellable=cancel is not None,
            **({} if idempotency_key is None else {"key": idempotency_key}),
            **({} if traceparent is None else {"traceparent": traceparent}),
        )
        steps = talk.run()
        try:
            return await self._made(steps, talk.deadline, cancel)
        except BaseException:
            steps.close()
            with contextlib.suppress(CloudError, RunCancelledError):
                await asyncio.shield(self._farewell(talk))
            raise
        finally:
            self.attempts = talk.attempts

    def _conversation(self, request: HandoffRequest, deadline_s: float | None, **options: Any) -> Conversation:
        seconds = self.timeout_s if deadline_s is None else deadline_s
        return Conversation(request, self.url, seconds, self._cache, self._limits, self._retries, **options)

    async def _farewell(self, talk: Conversation) -> None:
        steps = talk.farewell()
        with contextlib.suppress(CloudError):
            await self._made(steps, talk.deadline, None)

    async def _made(self, steps: Generator[Step, Answer, T], deadline: float, cancel: Callable[[], bool] | None) -> T:
        """Run a conversation's generator to its end and return what it returns."""
        answer: Answer | None = None
        error: CloudError | None = None
        try:
            while True:
                if cancel is not None and cancel():
                    raise RunCancelledError("the run was cancelled")
                step = steps.throw(error) if error is not None else steps.send(answer)  # type: ignore[arg-type]
                answer = error = None
                try:
                    answer = await self._step(step, cancel)
                except CloudUnavailableError as failure:
                    error = failure
        except StopIteration as done:
            result: T = done.value
            return result

    async def _step(self, step: Step, cancel: Callable[[], bool] | None) -> Answer | None:
        """One step of a conversation, ended early when the caller cancels."""
        work: Coroutine[Any, Any, Answer | None]
        work = asyncio.sleep(step.seconds) if isinstance(step, Pause) else self._ask(step)
        if cancel is None:
            return await work
        task = asyncio.ensure_future(work)
        try:
            while not task.done() and not cancel():
                await asyncio.wait({task}, timeout=_POLL_S)
            if not task.done():
                raise RunCancelledError("the run was cancelled")
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, CloudError):
                    await task

    async def _ask(self, exchange: Exchange) -> Answer:
        """Make one request; as `Line.ask`."""
        client = self._http()
        import httpx

        head: tuple[int, dict[str, str]] | None = None
        data = bytearray()
        try:
            async with (
                asyncio.timeout(max(0.001, exchange.deadline - time.monotonic())),
                client.stream(
                    exchange.method,
                    self.url + exchange.path,
                    content=exchange.body,
                    headers=exchange.headers,
                    timeout=httpx.Timeout(**waits(exchange)),
                ) as response,
            ):
                head = (response.status_code, {key.lower(): value for key, value in response.headers.items()})
                check_head(exchange, *head)
                async for chunk in response.aiter_raw():
                    if take(exchange, head[0], chunk, data):
                        break
        except CloudError:
            raise
        except Exception as error:
            failure = translated(error, self.url, exchange, begun=head is not None)
            if failure is None:
                raise
            if head is None or not isinstance(failure, CloudUnavailableError):
                raise failure from error
            return Answer(*head, bytes(data), failure)
        return Answer(*head, bytes(data))

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            try:
                import httpx
            except ImportError as error:
                raise MissingExtraError("httpx", None, purpose="Asking a cloud") from error
            self._client = httpx.AsyncClient(
                headers=self._headers,
                transport=self._transport,
                verify=True if self._trust is None else self._trust,
                trust_env=not self._loopback,
            )
        return self._client
