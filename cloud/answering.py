"""Around every request: its trace, one log line, its metrics, and every error as a problem document.

ASGI middleware. In: what the routes raise. Out: application/problem+json that says nothing of this host: no path, no
traceback, no text of an exception that is not ours. The log gets the type of an error that nobody foresaw.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from latentrelay.cloud import logs
from latentrelay.cloud.errors import DeadlinePassedError, ProblemError, RefusedError, RunCancelled
from latentrelay.cloud.http import problem_response, retry_after
from latentrelay.cloud.metrics import Metrics
from latentrelay.cloud.store import StoreUnavailableError
from latentrelay.cloud.tracing import Trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_GONE = 499  # in the log and the metrics only: nobody is there to be answered
_log = logging.getLogger("latentrelay.cloud")


class Answering:
    """Wraps the routes. `request.state.trace`, `.caller`, `.job` and `.kind` go into the log line."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        trace = Trace.parse(Headers(scope=scope).get("traceparent")).child()
        state = scope.setdefault("state", {})
        state["trace"] = trace
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if trace.given:
                    MutableHeaders(scope=message)["traceresponse"] = trace.header()
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            status = CLIENT_GONE
        except (Exception, asyncio.CancelledError) as error:
            problem = as_problem(error)
            state["kind"] = problem.kind
            if status:  # the answer has begun: the server ends the connection, nothing else can tell the client
                logs.event(_log, "an answer broke off", level=logging.ERROR, error=type(error).__name__)
            else:
                await problem_response(problem)(scope, receive, sending)
        finally:
            self._account(scope, state.get("status", status), time.perf_counter() - started)

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        state: dict[str, Any] = scope["state"]
        route = state.get("route", "none")
        self._metrics.answered(route, status, state.get("kind"))
        caller = state.get("caller")
        logs.event(
            _log,
            "request",
            level=logging.DEBUG if state.get("quiet") else logging.INFO,
            trace=state["trace"].trace_id,
            job=state.get("job"),
            caller=caller.name if caller is not None else None,
            method=scope["method"],
            route=route,
            status=status,
            kind=state.get("kind"),
            ms=1000 * seconds,
        )


def as_problem(error: BaseException) -> ProblemError:
    """The problem that an error is answered with."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, HTTPException):
        kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
        return ProblemError(error.status_code, kind, "There is no such resource.", headers=dict(error.headers or {}))
    if isinstance(error, StoreUnavailableError):  # it says what the system said, which is not for clients
        return ProblemError(503, error.kind, "The store of jobs does not answer.", headers=_again(error))
    if isinstance(error, RefusedError):
        return ProblemError(503, error.kind, str(error), headers=_again(error))
    if isinstance(error, (RunCancelled, asyncio.CancelledError)):  # the latter only when the server ends
        return ProblemError(503, "draining", "The service is ending.", headers=retry_after(1))
    if isinstance(error, DeadlinePassedError):
        return ProblemError(504, "deadline-passed", "The job was not done by its deadline.")
    _log.error("a request failed", exc_info=error)
    return ProblemError(500, "internal-error", "The service failed; its log says where.")


def _again(error: RefusedError) -> dict[str, str]:
    return retry_after(error.retry_after_s)
