"""The ASGI application: `POST /v1/handoffs`, `GET /v1/capabilities`, `GET /healthz`, `GET /metrics`.

Runs are made on one worker thread, so that every other request is answered meanwhile; a client that goes away cancels
its run between two steps. Errors are application/problem+json. Prompts are neither logged nor repeated in errors.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from latentrelay.cloud.cancel import Cancellation
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import ProblemError, QueueFullError, RunCancelled
from latentrelay.cloud.http import (
    handoff_response,
    problem_response,
    read_body,
    require_json,
    require_token,
    require_wait,
)
from latentrelay.cloud.metrics import Metrics
from latentrelay.cloud.requests import RunRequest, parse_request
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.worker import Worker
from latentrelay.runtime.errors import LatentRelayError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]
_log = logging.getLogger("latentrelay.cloud")
_DEFAULT_OPTIONS = ServiceOptions()


class Service:
    """What the routes share: the engine, the worker thread, the metrics, the token."""

    def __init__(self, engine: Engine, token: str | None) -> None:
        self.engine = engine
        self.metrics = Metrics()
        self.worker = Worker(engine.limits.queue)
        self._token = token

    async def health(self, request: Request) -> Response:
        """Open to everyone: the process answers."""
        return JSONResponse({"status": "ok"})

    async def capabilities(self, request: Request) -> Response:
        """What is served: model, samplers and their digests, limits."""
        require_token(request, self._token)
        return JSONResponse(self.engine.capabilities())

    async def prometheus(self, request: Request) -> Response:
        """The metrics, under the same token as the rest."""
        require_token(request, self._token)
        self.metrics.in_flight.set(self.worker.held)
        return Response(self.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def handoffs(self, request: Request) -> Response:
        """Run the first steps and answer with the blob."""
        require_token(request, self._token)
        require_wait(request)
        require_json(request)
        body = await read_body(request, self.engine.limits.max_body_bytes)
        wanted = parse_request(body, self.engine.limits)
        self.engine.check(wanted)
        started = time.perf_counter()
        blob = await self._made(request, wanted)
        seconds = time.perf_counter() - started
        self.metrics.seconds.observe(seconds)
        self.metrics.bytes.inc(len(blob))
        return handoff_response(blob, 1000 * seconds)

    async def _made(self, request: Request, wanted: RunRequest) -> bytes:
        """The blob from the worker thread; a client that disconnects first cancels the run."""
        cancellation = Cancellation(parent=self.worker.cancellation)
        run: asyncio.Future[bytes] = self.worker.submit(partial(self._job, wanted, cancellation))
        gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(request))
        both: set[asyncio.Future[Any]] = {run, gone}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return await run if run.done() else await _ended(run, cancellation)
        finally:
            cancellation.cancel()
            gone.cancel()

    def _job(self, wanted: RunRequest, cancellation: Cancellation) -> bytes:
        return self.engine.run(wanted, cancellation=cancellation, on_step=self._count).to_bytes()

    def _count(self, step: int, num_steps: int) -> None:
        self.metrics.steps.inc()


def create_app(
    engine: Engine,
    *,
    token: str | None = None,
    tokens: Any = None,
    store: Any = None,
    service: ServiceOptions = _DEFAULT_OPTIONS,
) -> Starlette:
    """The application around a loaded engine; with `token`, all but /healthz needs it. Limits are the engine's."""
    shared = Service(engine, token)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        shared.worker.close()

    routes = [
        _route("/healthz", shared.health, "GET", shared.metrics),
        _route("/metrics", shared.prometheus, "GET", shared.metrics),
        _route("/v1/capabilities", shared.capabilities, "GET", shared.metrics),
        _route("/v1/handoffs", shared.handoffs, "POST", shared.metrics),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    app.state.service = shared
    return app


def _route(path: str, handler: Handler, method: str, metrics: Metrics) -> Route:
    async def endpoint(request: Request) -> Response:
        response = await _answered(handler, request)
        metrics.requests.labels(route=path, status=str(response.status_code)).inc()
        return response

    return Route(path, endpoint, methods=[method])


async def _answered(handler: Handler, request: Request) -> Response:
    try:
        return await handler(request)
    except ProblemError as problem:
        return problem_response(problem)
    except QueueFullError as error:
        headers = {"Retry-After": str(error.retry_after_s)}
        return problem_response(ProblemError(503, "queue-full", str(error), headers=headers))
    except (RunCancelled, asyncio.CancelledError):  # the latter only when the server ends: answer before it does
        headers = {"Retry-After": "1"}
        return problem_response(
            ProblemError(503, "cancelled", "The run was cancelled before it ended.", headers=headers)
        )
    except LatentRelayError as error:
        _log.error("a run failed: %s", error)
        return problem_response(ProblemError(500, "run-failed", str(error)))
    except Exception as error:
        # The type alone: messages of tokenizers and the like may quote what they were given.
        _log.error("a request failed: %s", type(error).__name__)
        return problem_response(ProblemError(500, "internal-error", f"Internal error ({type(error).__name__})."))


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    kind = {404: "not-found", 405: "method-not-allowed"}.get(status, "http-error")
    detail = "There are POST /v1/handoffs, GET /v1/capabilities, GET /healthz and GET /metrics."
    return problem_response(ProblemError(status, kind, detail, headers=headers))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _ended(run: asyncio.Future[bytes], cancellation: Cancellation) -> bytes:
    """Cancel and wait, so that the next job does not start beside this one's last step."""
    cancellation.cancel()
    return await run
