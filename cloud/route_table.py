"""Every route of the service in one table: the application is made from it, and so is the OpenAPI document.

An operation names its handler, who may call it, what it reads and every status it answers with. What the connection
itself refuses before any route is looked at (a head that is malformed, too long or too slow) is in `EVERYWHERE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentrelay.cloud.http import EVENTS, STATUS
from latentrelay.runtime.handoff import MEDIA_TYPE

TEXT = "text/plain"


@dataclass(frozen=True)
class Answer:
    """An answer that is not a problem: what it is, its media types (none: no body), the headers it always or at times
    has, by their names in openapi_schemas.HEADERS."""

    what: str
    media_types: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    schema: str | None = None  # of a JSON body, by its name in openapi_schemas.SCHEMAS


@dataclass(frozen=True)
class Operation:
    """One method of one path. `problems`: status -> the kinds of problem it is answered with."""

    method: str
    path: str
    name: str
    summary: str
    answers: Mapping[int, Answer]
    problems: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    body: str | None = None
    public: bool = False
    head: bool = False


EVERYWHERE: dict[int, tuple[str, ...]] = {
    400: ("malformed-request",),
    408: ("head-timeout",),
    431: ("headers-too-large",),
    500: ("internal-error",),
    503: ("too-many-connections",),
}
_CALLER = {401: ("unauthorised",)}
_JOB = {404: ("unknown-handoff",), 503: ("store-unavailable", "starting")}
_ENDED = {
    409: ("request-unreadable",),
    410: ("cancelled", "expired", "deleted", "result-lost"),
    500: ("run-failed",),
    503: ("draining", "run-interrupted", "store-unavailable", "starting"),
    504: ("deadline-passed",),
}
_BLOB = ("ETag", "Repr-Digest", "Accept-Ranges", "Latentrelay-Cloud-Ms", "Preference-Applied")
_JOB_HEADERS = ("Location", "Latentrelay-Job", "Idempotency-Replayed")

OPERATIONS: tuple[Operation, ...] = (
    Operation(
        "POST",
        "/v1/handoffs",
        "create",
        "Have the first steps of a run made: a job, and its result at once where the client waits for it.",
        {
            200: Answer("The handoff: it was done in time.", (MEDIA_TYPE,), (*_JOB_HEADERS, *_BLOB)),
            202: Answer(
                "The job was taken on; its status.",
                (STATUS,),
                (*_JOB_HEADERS, "Retry-After", "Preference-Applied"),
                "Status",
            ),
        },
        {
            **_CALLER,
            400: ("malformed-json", "incomplete-body", "bad-idempotency-key"),
            406: ("wire-version",),
            408: ("body-timeout",),
            409: ("handoff-mismatch", "request-unreadable", "other-model"),
            410: _ENDED[410],
            413: ("body-too-large",),
            415: ("unsupported-media-type",),
            422: ("invalid-request", "idempotency-key-reused"),
            429: ("rate-limited", "quota-used", "too-many-jobs", "too-many-streams"),
            500: _ENDED[500],
            503: ("queue-full", "deadline-unreachable", "memory", "store-full", *_ENDED[503]),
            504: _ENDED[504],
        },
        parameters=("Idempotency-Key", "Prefer", "traceparent"),
        body="RunRequest",
    ),
    Operation(
        "GET",
        "/v1/handoffs/{id}",
        "show",
        "A job: its blob, its status or its progress as events, by Accept.",
        {
            200: Answer(
                "The whole blob, the status, or the stream of events.",
                (MEDIA_TYPE, STATUS, EVENTS),
                (*_BLOB, "Vary"),
                "Status",
            ),
            202: Answer("Not done yet; the status.", (STATUS,), ("Retry-After", "Preference-Applied"), "Status"),
            206: Answer("The range asked for.", (MEDIA_TYPE,), (*_BLOB, "Content-Range")),
            304: Answer("The client has this blob (If-None-Match).", (), ("ETag",)),
        },
        {
            **_CALLER,
            404: _JOB[404],
            406: ("not-acceptable",),
            412: ("precondition-failed",),
            416: ("range-not-satisfiable",),
            429: ("too-many-streams",),
            **_ENDED,
        },
        parameters=(
            "id",
            "Accept",
            "Prefer",
            "Range",
            "If-Range",
            "If-Match",
            "If-None-Match",
            "traceparent",
        ),
        head=True,
    ),
    Operation(
        "DELETE",
        "/v1/handoffs/{id}",
        "remove",
        "Cancel the job, or forget its result. Once more has no further effect.",
        {200: Answer("What became of it.", (STATUS,), (), "Status")},
        {**_CALLER, **_JOB},
        parameters=("id", "traceparent"),
    ),
    Operation(
        "GET",
        "/v1/capabilities",
        "capabilities",
        "What is served, within which limits, and the load now.",
        {200: Answer("The capabilities.", (STATUS,), (), "Capabilities")},
        _CALLER,
        parameters=("traceparent",),
    ),
    Operation(
        "GET",
        "/v1/openapi.json",
        "openapi",
        "This document.",
        {200: Answer("An OpenAPI 3.1 document.", (STATUS,), (), "Object")},
        _CALLER,
    ),
    Operation(
        "GET",
        "/healthz",
        "health",
        "The process answers.",
        {200: Answer("It does.", (STATUS,), (), "Health")},
        public=True,
    ),
    Operation(
        "GET",
        "/readyz",
        "readiness",
        "Whether a job would be taken on now.",
        {200: Answer("It would.", (STATUS,), (), "Health")},
        {503: ("starting", "draining", "store-unavailable")},
        public=True,
    ),
    Operation(
        "GET",
        "/metrics",
        "prometheus",
        "Prometheus metrics.",
        {200: Answer("The exposition format, version 0.0.4.", (TEXT,))},
        _CALLER,
    ),
)
