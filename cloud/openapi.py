"""The OpenAPI 3.1 document: made from the table of routes and the request's model, so that it says what is served.

In: the service's limits. Out: a JSON-ready dict. Bounds that only two fields together decide (split and num_steps) and
those of the model (which sizes, which samplers) are words in it, not schema.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from latentrelay.cloud.http import EVENTS, PROBLEM_MEDIA_TYPE, STATUS
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.openapi_schemas import HEADERS, PARAMETERS, SCHEMAS
from latentrelay.cloud.requests import SCHEMA_VERSION, RunRequest
from latentrelay.cloud.route_table import EVERYWHERE, OPERATIONS, Answer, Operation

_PROBLEM_HEADERS = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
_PROBLEM_REQUIRED = ("WWW-Authenticate", "Retry-After")


def document(limits: Limits, *, size_multiple: int = 1) -> dict[str, Any]:
    """The whole document. `size_multiple`: heights and widths are multiples of it, in pixels."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        item = paths.setdefault(operation.path, {})
        item[operation.method.lower()] = _operation(operation)
        if operation.head:
            item["head"] = _operation(operation, head=True)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "latentrelay",
            "summary": "The first steps of a Stable Diffusion run, made for a device that finishes it.",
            "version": importlib.metadata.version("latentrelay"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": {**SCHEMAS, "RunRequest": _request_schema(limits, size_multiple)},
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(operation: Operation, *, head: bool = False) -> dict[str, Any]:
    responses = {str(status): _answer(answer, head) for status, answer in sorted(operation.answers.items())}
    for status in sorted(EVERYWHERE.keys() | operation.problems.keys()):
        kinds = dict.fromkeys((*operation.problems.get(status, ()), *EVERYWHERE.get(status, ())))
        responses[str(status)] = _problem(status, tuple(kinds), head)
    described: dict[str, Any] = {
        "operationId": f"{operation.name}-head" if head else operation.name,
        "summary": operation.summary,
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in operation.parameters],
        "responses": responses,
    }
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body}"}
        described["requestBody"] = {"required": True, "content": {STATUS: {"schema": schema}}}
    if operation.public:
        described["security"] = []
    return described


def _answer(answer: Answer, head: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.what}
    if answer.headers:
        described["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in answer.headers}
    if answer.media_types and not head:
        described["content"] = {each: {"schema": _body(each, answer.schema)} for each in answer.media_types}
    return described


def _body(media_type: str, schema: str | None) -> dict[str, Any]:
    if media_type == STATUS:
        return {"$ref": f"#/components/schemas/{schema}"}
    if media_type == EVENTS:
        data = {"type": "string", "contentMediaType": STATUS, "description": "The status, as JSON."}
        names = {"type": "string", "enum": ["progress", "done", "failed", "cancelled"]}
        return {
            "description": "One event of the stream.",
            "type": "object",
            "properties": {"event": names, "id": {"type": "string"}, "data": data},
        }
    if media_type.startswith("text/"):
        return {"type": "string"}
    return {"type": "string", "contentMediaType": media_type}


def _problem(status: int, kinds: tuple[str, ...], head: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"description": f"Problem: {', '.join(kinds)}."}
    names = _PROBLEM_HEADERS.get(status, ())
    if names:
        described["headers"] = {name: {**HEADERS[name], "required": True} for name in names}
    if not head:
        described["content"] = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return described


def _request_schema(limits: Limits, size_multiple: int) -> dict[str, Any]:
    """The model's own schema with this service's limits; unknown keys only beside a newer schema_version."""
    schema = RunRequest.model_json_schema()
    properties = schema["properties"]
    for name in ("prompt", "negative_prompt"):
        properties[name]["maxLength"] = limits.max_prompt_chars
    properties["guidance"]["maximum"] = limits.max_guidance
    properties["num_steps"]["maximum"] = limits.max_steps
    properties["split"] |= {"maximum": limits.max_steps, "description": "At most num_steps."}
    properties["accept_splits"]["description"] = "Each smaller than split."
    for name in ("height", "width"):
        properties[name] |= {"maximum": limits.max_side, "multipleOf": size_multiple}
    schema.pop("additionalProperties", None)
    schema["if"] = {"properties": {"schema_version": {"const": SCHEMA_VERSION}}}
    schema["then"] = {"propertyNames": {"enum": list(properties)}}
    return schema
