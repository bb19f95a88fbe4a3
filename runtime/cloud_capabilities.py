"""What a cloud says it serves, and whether a request fits it: asked before a job is paid for.

In: the JSON of `GET /v1/capabilities` and a `HandoffRequest`. Out: the body to send, with what this cloud understands
and no more, or a `CloudRefusedError` that names the differing field, as the cloud itself would answer. What a cloud
does not say is not checked; a value of a wrong type is a CloudProtocolError.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrelay.runtime.cloud_answers import PROBLEM_PREFIX
from latentrelay.runtime.errors import CloudProtocolError, CloudRefusedError
from latentrelay.runtime.handoff import WIRE_VERSIONS
from latentrelay.runtime.handoff_request import HandoffRequest

MAX_DEADLINE_MS = 3_600_000


@dataclass(frozen=True)
class Capabilities:
    """A capabilities document, read. `features` is None of a cloud from before there were any: it knows only
    `Prefer: wait` and the fields of version 1.0. Durations are milliseconds."""

    document: Mapping[str, Any] = field(default_factory=dict)
    features: frozenset[str] | None = None
    wire_versions: tuple[str, ...] = ("1.0",)
    step_ms: float | None = None
    estimate_ms: float | None = None

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Capabilities:
        """Read the document. Raises CloudProtocolError naming the field of a wrong type."""
        features = _strings(document, "features")
        return cls(
            document=document,
            features=None if features is None else frozenset(features),
            wire_versions=_strings(document, "wire_versions") or ("1.0",),
            step_ms=_number(document, "step_ms"),
            estimate_ms=_number(document, "estimate_ms"),
        )

    def has(self, feature: str) -> bool:
        """Whether the cloud names a feature."""
        return self.features is not None and feature in self.features

    def steps_ms(self, steps: int) -> float | None:
        """The least that `steps` steps take there, without any waiting; None where the cloud has not measured."""
        return None if self.step_ms is None else steps * self.step_ms


class CapabilitiesCache:
    """The capabilities that a client read last, good for `ttl_s` seconds."""

    def __init__(self, ttl_s: float = 30.0) -> None:
        self._ttl_s = ttl_s
        self._read: tuple[float, Capabilities] | None = None

    def get(self) -> Capabilities | None:
        """What was read, None once it is too old."""
        read = self._read
        return read[1] if read is not None and time.monotonic() - read[0] < self._ttl_s else None

    def put(self, capabilities: Capabilities) -> None:
        """Keep what was read now."""
        self._read = (time.monotonic(), capabilities)

    def forget(self) -> None:
        """Read anew next time."""
        self._read = None


def body_for(request: HandoffRequest, cloud: Capabilities, *, deadline_s: float, preview: bool) -> bytes:
    """The JSON body for this cloud, the request checked first. Raises CloudRefusedError, CloudProtocolError.

    The client's wire versions, its deadline and its wish for previews are filled in where the cloud knows them; fields
    that a cloud of version 1.0 would refuse are left out of what it gets, unless the caller set them.
    """
    known: dict[str, Any] = {}
    if cloud.features is not None:
        known["wire_versions"] = request.wire_versions or WIRE_VERSIONS
    if cloud.has("deadline") and request.deadline_ms is None:
        known["deadline_ms"] = max(1, min(MAX_DEADLINE_MS, int(1000 * deadline_s)))
    if cloud.has("preview") and preview:
        known["preview"] = True
    if request.accept_splits and not cloud.has("accept_splits"):
        known["accept_splits"] = None
    sent = dataclasses.replace(request, **known)
    body = json.dumps(sent.to_dict(), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    check(sent, cloud, len(body))
    return body


def check(request: HandoffRequest, cloud: Capabilities, body_bytes: int = 0) -> None:
    """Raise CloudRefusedError (413, 422, 406 or 409 with a problem document) where the cloud would refuse."""
    document = cloud.document
    limits = _mapping(document, "limits")
    ceilings: tuple[tuple[str, float, float | None], ...] = (
        ("prompt", len(request.prompt), _number(limits, "prompt_chars")),
        ("negative_prompt", len(request.negative_prompt), _number(limits, "prompt_chars")),
        ("guidance", request.guidance, _number(limits, "guidance")),
        ("height", request.height, _number(limits, "side")),
        ("width", request.width, _number(limits, "side")),
        ("num_steps", request.num_steps, _number(document, "max_steps")),
    )
    most = _number(limits, "body_bytes")
    if most is not None and body_bytes > most:
        raise _refused(413, "body-too-large", "body", body_bytes, f"at most {most:g} bytes")
    for name, value, ceiling in ceilings:
        if ceiling is not None and value > ceiling:
            raise _refused(422, "invalid-request", name, value, f"at most {ceiling:g}")
    multiple = _number(document, "size_multiple")
    for name in ("height", "width"):
        if multiple and getattr(request, name) % multiple:
            raise _refused(422, "invalid-request", name, getattr(request, name), f"a multiple of {multiple:g}")
    dtypes = _strings(document, "dtypes")
    if dtypes is not None and request.dtype not in dtypes:
        raise _refused(422, "invalid-request", "dtype", request.dtype, " | ".join(dtypes))
    wanted = request.wire_versions or WIRE_VERSIONS
    if not set(wanted) & set(cloud.wire_versions):
        raise _refused(406, "wire-version", "wire_versions", ", ".join(cloud.wire_versions), ", ".join(wanted))
    _check_model(request, document)


def _check_model(request: HandoffRequest, document: Mapping[str, Any]) -> None:
    """The digests and the sampler, which say whether the steps here continue the steps there."""
    digest = _mapping(document, "model").get("digest")
    if digest is not None and request.model_digest not in (None, digest):
        raise _mismatch("model_digest", digest, request.model_digest)
    samplers = _mapping(document, "samplers")
    if not samplers:
        return
    sampler = request.sampler or str(document.get("default_sampler", ""))
    if sampler and sampler not in samplers:
        raise _mismatch("sampler", ", ".join(map(str, samplers)), sampler)
    there = _mapping(samplers, sampler).get("scheduler_digest")
    if there is not None and request.scheduler_digest not in (None, there):
        raise _mismatch("scheduler_digest", there, request.scheduler_digest)
    if _number(_mapping(samplers, sampler), "branches") == 1:
        if request.guidance != 1.0:
            raise _refused(422, "invalid-request", "guidance", request.guidance, "1")
        if request.negative_prompt:
            raise _refused(422, "invalid-request", "negative_prompt", "str", "an empty one")


def _mismatch(name: str, there: object, here: object) -> CloudRefusedError:
    return _refused(409, "handoff-mismatch", name, there, here)


def _refused(status: int, kind: str, name: str, got: object, expected: object) -> CloudRefusedError:
    """The refusal that the cloud would give; nothing was asked of it but its capabilities."""
    detail = f"{name} does not fit what this cloud serves; no job was started."
    problem = {"type": PROBLEM_PREFIX + kind, "title": kind, "status": status, "detail": detail}
    return CloudRefusedError(status, {**problem, "field": name, "got": got, "expected": expected})


def _mapping(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name, {})
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def _number(document: Mapping[str, Any], name: str) -> float | None:
    value = document.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        raise _wrong(name, value, "a number >= 0")
    return value


def _strings(document: Mapping[str, Any], name: str) -> tuple[str, ...] | None:
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(name, value, "a list of strings")
    return tuple(value)


def _wrong(name: str, value: object, expected: str) -> CloudProtocolError:
    return CloudProtocolError(f"the capabilities' {name} has a wrong type", got=value, expected=expected)
