"""The routes about the service itself: capabilities, the OpenAPI document, health, readiness, metrics."""

from __future__ import annotations

from latentrelay.cloud.http import problem_response
from latentrelay.cloud.openapi import document
from latentrelay.cloud.service import Service
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_FRESH = {"Cache-Control": "no-store"}


class ServiceRoutes:
    """One method an operation of the route table, by its name."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._openapi = document(service.engine.limits)

    async def health(self, request: Request) -> Response:
        """The process answers; nothing more is looked at."""
        request.state.quiet = True
        return JSONResponse({"status": "ok"}, headers=_FRESH)

    async def readiness(self, request: Request) -> Response:
        """Whether a job would be taken on now: the model is loaded, the store can be written, the service stays."""
        request.state.quiet = True
        problem = await self._service.look(self._service.not_ready)
        if problem is None:
            return JSONResponse({"status": "ready"}, headers=_FRESH)
        request.state.kind = problem.kind
        return problem_response(problem)

    async def capabilities(self, request: Request) -> Response:
        """What is served, its limits, and the load now."""
        return JSONResponse(await self._service.look(self._service.capabilities), headers=_FRESH)

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document of this very table of routes."""
        return JSONResponse(self._openapi, headers=_FRESH)

    async def prometheus(self, request: Request) -> Response:
        """The metrics."""
        request.state.quiet = True
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8", **_FRESH}
        return Response(await self._service.look(self._service.metrics_text), headers=headers)
