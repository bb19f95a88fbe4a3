"""The parts of the OpenAPI document that are the same for every service: schemas, parameters, headers.

Plain JSON Schema 2020-12 and OpenAPI 3.1 objects by name. The request's schema is not here: it comes from the model.
"""

from __future__ import annotations

from typing import Any

from latentrelay.cloud.http import EVENTS, MAX_KEY, STATUS
from latentrelay.runtime.handoff import MEDIA_TYPE

_COUNT = {"type": "integer", "minimum": 0}
_MAYBE_COUNT = {"type": ["integer", "null"], "minimum": 0}
_MAYBE_NUMBER = {"type": ["number", "null"], "minimum": 0}
_TEXT = {"type": "string"}
JOB_ID = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
STATES = ("queued", "running", "done", "failed", "cancelled", "expired", "deleted")


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = (), closed: bool = False) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {**schema, "additionalProperties": False} if closed else schema


PROBLEM = _object(
    {
        "type": {"type": "string", "pattern": "^urn:latentrelay:problem:[a-z0-9-]+$"},
        "title": _TEXT,
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": _TEXT,
        "field": {"type": "string", "description": "The field or header that is wrong."},
        "got": {"description": "What it was; never any part of a prompt."},
        "expected": {"description": "What it should have been."},
    },
    optional=("field", "got", "expected"),
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "Problem": {**PROBLEM, "description": "RFC 9457. The type's last part is the kind."},
    "Status": _object(
        {
            "id": JOB_ID,
            "state": {"enum": list(STATES)},
            "step": {**_COUNT, "description": "Steps finished."},
            "split": {**_COUNT, "description": "Steps asked for."},
            "num_steps": {"type": "integer", "minimum": 1},
            "next_step": {**_MAYBE_COUNT, "description": "The split really reached, of a job that is done."},
            "queue_position": _MAYBE_COUNT,
            "attempts": _COUNT,
            "etag": {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"},
            "bytes": _MAYBE_COUNT,
            "cloud_ms": _MAYBE_NUMBER,
            "expires_in_s": _MAYBE_NUMBER,
            "problem": {"anyOf": [{"$ref": "#/components/schemas/Problem"}, {"type": "null"}]},
        }
    ),
    "Capabilities": _object(
        {
            "wire_versions": {"type": "array", "items": _TEXT, "minItems": 1},
            "version": _TEXT,
            "model": _object({"name": _TEXT, "family": _TEXT, "digest": _TEXT, "prediction_type": _TEXT}),
            "samplers": {
                "type": "object",
                "additionalProperties": _object(
                    {
                        "scheduler_class": _TEXT,
                        "scheduler_digest": _TEXT,
                        "needs_x0_prev": {"type": "boolean"},
                        "branches": {"enum": [1, 2]},
                    }
                ),
            },
            "default_sampler": _TEXT,
            "dtypes": {"type": "array", "items": _TEXT},
            "default_height": _COUNT,
            "default_width": _COUNT,
            "size_multiple": _COUNT,
            "max_steps": _COUNT,
            "max_batch": _MAYBE_COUNT,
            "limits": {"type": "object", "additionalProperties": {"type": "number"}},
            "queue": _object({"waiting": _COUNT, "running": _COUNT, "limit": _COUNT}),
            "step_ms": _MAYBE_NUMBER,
            "estimate_ms": _MAYBE_NUMBER,
            "features": {"type": "array", "items": _TEXT},
            "ttl_s": {"type": "number"},
            "max_wait_s": {"type": "number"},
        }
    ),
    "Health": _object({"status": _TEXT}),
    "Object": {"type": "object"},
}


def _header(name: str, what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": what, "schema": schema}


PARAMETERS: dict[str, dict[str, Any]] = {
    "id": {"name": "id", "in": "path", "required": True, "description": "The job's id.", "schema": JOB_ID},
    "Idempotency-Key": _header(
        "Idempotency-Key",
        "The same key with the same body is the same job. Without one the job ends when a waiting client goes away.",
        {"type": "string", "minLength": 1, "maxLength": MAX_KEY, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    ),
    "Prefer": _header("Prefer", "RFC 7240: wait, wait=seconds, respond-async.", _TEXT),
    "Accept": _header("Accept", f"One of {MEDIA_TYPE} (the default), {STATUS}, {EVENTS}.", _TEXT),
    "Range": _header("Range", "One range of bytes; several, or another unit, get the whole.", _TEXT),
    "If-Range": _header("If-Range", "The range is of the blob with this strong ETag, else the whole is sent.", _TEXT),
    "If-Match": _header("If-Match", "412 unless the blob has one of these ETags.", _TEXT),
    "If-None-Match": _header("If-None-Match", "304 if the blob has one of these ETags.", _TEXT),
    "traceparent": _header("traceparent", "W3C trace context; answered with traceresponse.", _TEXT),
}

HEADERS: dict[str, dict[str, Any]] = {
    name: {"description": what, "schema": schema}
    for name, what, schema in (
        ("Location", "The job.", _TEXT),
        ("Latentrelay-Job", "The job's id.", JOB_ID),
        ("Idempotency-Replayed", "The key was known: no new job was made.", {"const": "true"}),
        ("ETag", "Strong: the sha256 of the whole blob in hex.", {"type": "string", "pattern": '^"[0-9a-f]{64}"$'}),
        ("Repr-Digest", "RFC 9530: sha-256 of the whole blob.", _TEXT),
        ("Accept-Ranges", "Single ranges are served.", {"const": "bytes"}),
        ("Content-Range", "Which bytes these are.", _TEXT),
        ("Latentrelay-Cloud-Ms", "From accepting the job to its result, in milliseconds.", _TEXT),
        ("Preference-Applied", "Which preference was followed.", _TEXT),
        ("Retry-After", "Seconds after which to ask again.", {"type": "string", "pattern": "^[0-9]+$"}),
        ("WWW-Authenticate", "Bearer.", {"const": "Bearer"}),
        ("Vary", "Accept.", _TEXT),
    )
}
