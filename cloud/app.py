"""The ASGI application: jobs by `POST /v1/handoffs`, their state, events and blobs, capabilities, health, metrics.

Made from the table of routes (route_table.py), which the OpenAPI document at /v1/openapi.json is made from too. Errors
are application/problem+json. Prompts are neither logged nor repeated in errors. The job board and the batcher are
started and ended by the application's lifespan.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from latentrelay.cloud.answering import Answering, as_problem
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.http import problem_response
from latentrelay.cloud.route_table import OPERATIONS, Operation
from latentrelay.cloud.routes_handoffs import HandoffRoutes
from latentrelay.cloud.routes_service import ServiceRoutes
from latentrelay.cloud.service import Service
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.store import Store
from latentrelay.cloud.tokens import Tokens
from latentrelay.runtime.errors import RequestError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]
_DEFAULT = ServiceOptions()


def create_app(
    engine: Engine,
    *,
    token: str | None = None,
    tokens: Tokens | None = None,
    store: Store | None = None,
    service: ServiceOptions = _DEFAULT,
) -> Starlette:
    """The application around a loaded engine; its limits are the engine's.

    token or tokens: who may call (neither: everyone); /healthz and /readyz are open to all. store: where jobs are kept;
    None is a folder that ends with the application. Raises RequestError for both a token and tokens.
    """
    if token is not None and tokens is not None:
        raise RequestError("both a token and a file of tokens were given", do="Give one of them.")
    callers = tokens or (Tokens.single(token) if token is not None else Tokens.none())
    shared = Service(engine, tokens=callers, store=store, options=service)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await shared.open()
        try:
            yield
        finally:
            await shared.end()

    handlers = [HandoffRoutes(shared), ServiceRoutes(shared)]
    app = Starlette(
        routes=[_route(path, handlers, shared) for path in dict.fromkeys(each.path for each in OPERATIONS)],
        lifespan=lifespan,
        middleware=[Middleware(Answering, metrics=shared.metrics)],
        exception_handlers={HTTPException: _http_error},
    )
    app.state.service = shared
    return app


def _route(path: str, handlers: list[object], service: Service) -> Route:
    """All operations of one path, so that another method is answered with 405 and every method in Allow."""
    by_method: dict[str, tuple[Operation, Handler]] = {}
    for operation in OPERATIONS:
        if operation.path == path:
            handler = next(getattr(each, operation.name) for each in handlers if hasattr(each, operation.name))
            by_method[operation.method] = (operation, handler)
            if operation.method == "GET":
                by_method["HEAD"] = by_method["GET"]

    async def endpoint(request: Request) -> Response:
        request.state.route = path
        operation, handler = by_method[request.method]
        if not operation.public:
            request.state.caller = service.tokens.authenticate(request.headers.get("authorization"))
        return await handler(request)

    return Route(path, endpoint, methods=list(by_method))


async def _http_error(request: Request, error: Exception) -> Response:
    problem = as_problem(error)
    request.state.kind = problem.kind
    return problem_response(problem)
