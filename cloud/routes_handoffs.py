"""The routes of a handoff: POST makes a job of a request, GET shows it three ways, DELETE ends and forgets it.

The store's and the engine's work is done on threads; this file only decides what is answered. A client that goes away
while it waits ends its job only where it gave no Idempotency-Key: with one it can come back for the result.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from typing import Any

from latentrelay.cloud import events, logs
from latentrelay.cloud.blob_response import blob_response, whole_blob
from latentrelay.cloud.errors import ProblemError, RefusedError
from latentrelay.cloud.http import (
    EVENTS,
    KEY_ADDED,
    STATUS,
    Preference,
    accepted,
    document_response,
    idempotency_key,
    preference,
    read_body,
    require_json,
    retry_after,
)
from latentrelay.cloud.job_record import job_id
from latentrelay.cloud.jobs import Accepted, JobStatus
from latentrelay.cloud.requests import RunRequest, parse_request
from latentrelay.cloud.service import Service, not_ready
from latentrelay.cloud.tokens import Caller
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

_log = logging.getLogger("latentrelay.cloud")
_UNFINISHED = ("queued", "running")
_GONE = {
    "cancelled": "The job was cancelled; there is no result.",
    "expired": "The result was kept for its time to live and is gone.",
    "deleted": "The result was deleted.",
}


class _Held(StreamingResponse):
    """A stream that holds its caller's place from when it is made to its end, however it ends."""

    def __init__(self, give_back: Callable[[], None], content: AsyncIterator[bytes], **options: Any) -> None:
        super().__init__(content, **options)
        self._give_back = give_back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._give_back()


class HandoffRoutes:
    """One method an operation of the route table, by its name."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Take on a job; answer with its blob if the client waits and it is done in time, else with its status."""
        service = self._service
        if service.draining:
            raise not_ready("draining", "The service is ending and takes on nothing new.")
        key = idempotency_key(request)
        wanted_wait = preference(request, service.options.max_wait_s)
        require_json(request)
        body = await read_body(request, service.engine.limits.max_body_bytes, service.options.body_s)
        wanted = parse_request(body, service.engine.limits)
        service.engine.check(wanted)
        with service.streams.place(request.state.caller) if wanted_wait.wait_s else nullcontext():
            return await self._made(request, wanted, body, key, wanted_wait)

    async def _made(
        self, request: Request, wanted: RunRequest, body: bytes, key: str | None, wanted_wait: Preference
    ) -> Response:
        """Take on the job and wait for it as long as the client does."""
        service = self._service
        job = await asyncio.shield(asyncio.ensure_future(self._in_turn(request, wanted, body, key)))
        request.state.job = job.id
        headers = {"Location": f"/v1/handoffs/{job.id}", "Latentrelay-Job": job.id}
        if job.replayed:
            headers["Idempotency-Replayed"] = "true"
        if service.options.log_prompts:
            logs.event(_log, "prompt", job=job.id, prompt=wanted.prompt, negative_prompt=wanted.negative_prompt)
        try:
            status = await self._awaited(request, job.id, wanted_wait)
            headers |= _applied(wanted_wait)
            if wanted_wait.wait_s is None:
                return _status_response(status, 202, headers)
            return await self._as_blob(request, job.id, status, headers)
        except ClientDisconnect:
            if key is None or KEY_ADDED in request.scope:  # nobody can come back for it
                await service.look(service.board.cancel, job.id, request.state.caller.name)
            raise
        except ProblemError as problem:  # whatever went wrong, the client learns which job it was about
            problem.headers = {**headers, **problem.headers}
            raise

    async def show(self, request: Request) -> Response:
        """The job as events, as its status or as its blob, by Accept."""
        job = self._job(request)
        wanted = accepted(request)
        status = await self._service.look(self._service.board.status, job, request.state.caller.name)
        if wanted == EVENTS:
            return self._events(request, job, status)
        asked = preference(request, self._service.options.max_wait_s)
        if asked.wait_s and status.state in _UNFINISHED:
            with self._service.streams.place(request.state.caller):
                status = await self._awaited(request, job, asked)
        if wanted == STATUS:
            return _status_response(status, 200, {"Vary": "Accept", **_applied(asked)})
        return await self._as_blob(request, job, status, _applied(asked))

    async def remove(self, request: Request) -> Response:
        """Cancel the job, or forget its result; the same again has no further effect."""
        job = self._job(request)
        status = await self._service.look(self._service.board.cancel, job, request.state.caller.name)
        return _status_response(status, 200, {})

    async def _in_turn(self, request: Request, wanted: RunRequest, body: bytes, key: str | None) -> Accepted:
        """Count the request and take the job on, in the caller's turn; a task of its own keeps the turn to its end."""
        service, caller = self._service, request.state.caller
        service.usage.request(caller)
        async with service.usage.turn(caller):
            return await service.accept(self._accept, request, wanted, body, key)

    def _accept(self, request: Request, wanted: RunRequest, body: bytes, key: str | None) -> Accepted:
        """Count its steps and take it on; what is refused afterwards, or was there before, is not counted."""
        service, caller = self._service, request.state.caller
        trace = request.state.trace.header()
        counted = key is None or not self._known(caller, key)
        if counted:  # what is asked for again is answered, whatever was used since
            held = service.board.open_jobs(caller.name) if service.usage.most_jobs(caller) is not None else 0
            service.usage.take(caller, wanted.split, open_jobs=held)
        try:
            job = service.board.accept(wanted, body, owner=caller.name, key=key, trace=trace)
        except (ProblemError, RefusedError):
            if counted:
                service.usage.refund(caller, wanted.split)
            raise
        if counted and job.replayed:
            service.usage.refund(caller, wanted.split)
        return job

    def _known(self, caller: Caller, key: str) -> bool:
        """Whether this caller has sent this key before; looked up only where it makes a difference."""
        usage = self._service.usage
        if caller.limits.steps_per_day is None and usage.most_jobs(caller) is None:
            return False
        try:
            self._service.board.status(job_id(caller.name, key), caller.name)
        except ProblemError:
            return False
        return True

    async def _awaited(self, request: Request, job: str, asked: Preference) -> JobStatus:
        """The job's status, when it has ended or the client's wait has. Raises ClientDisconnect if it goes away."""
        board, owner = self._service.board, request.state.caller.name
        if not asked.wait_s:
            return await self._service.look(board.status, job, owner)
        ended = asyncio.ensure_future(board.wait(job, owner, seen=None, timeout_s=asked.wait_s))
        gone = asyncio.ensure_future(_disconnected(request))
        dismissed = asyncio.ensure_future(self._service.dismissal())
        racing: set[asyncio.Future[Any]] = {ended, gone, dismissed}
        try:
            await asyncio.wait(racing, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                return ended.result()
            if gone.done():
                raise ClientDisconnect
        finally:
            for each in racing:
                each.cancel()
        if not self._service.keeps_jobs:
            raise not_ready("draining", "The service ends and does not keep jobs; ask again elsewhere or later.")
        return await self._service.look(board.status, job, owner)

    async def _as_blob(self, request: Request, job: str, status: JobStatus, headers: dict[str, str]) -> Response:
        """The blob of a job that is done; 202 for one that is not; the problem of one that failed; 410."""
        if status.state in _UNFINISHED:
            return _status_response(status, 202, headers)
        if status.problem is not None:
            request.state.kind = str(status.problem.get("type", "")).rpartition(":")[2]
            return document_response(status.problem, headers)
        _raise_gone(status, headers)
        digest, blob = await self._service.look(self._service.board.blob, job, request.state.caller.name)
        if status.cloud_ms is not None:
            headers = {**headers, "Latentrelay-Cloud-Ms": f"{status.cloud_ms:.1f}"}
        response = (
            whole_blob(blob, digest, headers)
            if request.method == "POST"
            else blob_response(request, blob, digest, headers)
        )
        if request.method != "HEAD":
            self._service.metrics.sent(len(response.body))
        return response

    def _events(self, request: Request, job: str, status: JobStatus) -> Response:
        """The stream; 410 where there is nothing left to tell."""
        if status.state in ("expired", "deleted"):
            _raise_gone(status, {})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
        if request.method == "HEAD":
            return Response(headers=headers, media_type=EVENTS)
        board, owner, options = self._service.board, request.state.caller.name, self._service.options
        return _Held(
            self._service.streams.take(request.state.caller),
            events.stream(
                status,
                lambda seen, seconds: board.wait(job, owner, seen=seen, timeout_s=seconds),
                self._service.dismissal,
                heartbeat_s=options.heartbeat_s,
                longest_s=options.stream_s,
            ),
            headers=headers,
            media_type=EVENTS,
        )

    def _job(self, request: Request) -> str:
        job: str = request.path_params["id"]
        if len(job) == 32 and all(each in "0123456789abcdef" for each in job):
            request.state.job = job
            return job
        raise ProblemError(404, "unknown-handoff", "There is no such handoff here.")


def _status_response(status: JobStatus, code: int, headers: dict[str, str]) -> Response:
    more = retry_after(1) if code == 202 else {}
    return JSONResponse(status.to_dict(), code, headers={"Cache-Control": "no-store", **more, **headers})


def _raise_gone(status: JobStatus, headers: dict[str, str]) -> None:
    """The problem of a job whose result is gone, or was never there."""
    if status.state in _GONE:
        raise ProblemError(410, status.state, _GONE[status.state], headers=headers)


def _applied(asked: Preference) -> dict[str, str]:
    return {"Preference-Applied": asked.applied} if asked.applied else {}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
