"""The body of `POST /v1/handoffs`: JSON bytes in, a frozen `RunRequest` out, or a problem that names the field.

Fields that only the loaded model can judge (sampler, digests, whether a size fits) are checked by the engine. What a
problem says about a prompt is its length, never its text.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.limits import Limits
from latentrelay.runtime.handoff import WIRE_VERSIONS
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

SCHEMA_VERSION = "1.0"  # of this document; a newer minor version may hold keys that this one does not know
MAX_DEADLINE_MS = 3_600_000
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
Version = Annotated[str, StringConstraints(pattern=r"^1\.(0|[1-9][0-9]{0,3})$")]
WireVersion = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
_PROMPTS = ("prompt", "negative_prompt")
# What says how a result is wanted, not which: requests that differ in these alone have one result.
_NOT_CONTENT = {"schema_version", "wire_versions", "deadline_ms", "preview"}


class RunRequest(BaseModel):
    """Run steps 0 .. split-1 of `num_steps` for one picture of height x width pixels and hand over the latents.

    seed: 0 .. 2**64 - 1, noise of torch's CPU generator. dtype: of the latents on the wire. sampler and the digests:
    None takes the service's own; a value that differs from it is refused with 409. wire_versions: the handoff schema
    versions the client reads. accept_splits: smaller splits at which the service may hand over early rather than miss
    the deadline. deadline_ms: from when the request is read; None is the service's own limit. deterministic: run in
    calls of its own, bit for bit as alone. preview: progress carries small pictures. step_cache: the service may skip
    the network on the steps its schedule says.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: str
    negative_prompt: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    guidance: Annotated[float, Field(ge=1)] = 7.5  # diffusers switches guidance off at 1 and below
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    num_steps: Annotated[int, Field(ge=1)]
    split: Annotated[int, Field(ge=0)]
    dtype: Literal["float16", "float32"] = "float16"
    sampler: Annotated[str, StringConstraints(max_length=64)] | None = None
    model_digest: Digest | None = None
    scheduler_digest: Digest | None = None
    schema_version: Version = SCHEMA_VERSION
    wire_versions: Annotated[tuple[WireVersion, ...], Field(min_length=1, max_length=16)] = ("1.0",)
    accept_splits: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=64)] = ()
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS)] | None = None
    deterministic: bool = False
    preview: bool = False
    step_cache: bool = False

    def content(self) -> dict[str, Any]:
        """What decides the result, as JSON: every field but those that say how and when it is wanted."""
        return self.model_dump(mode="json", exclude=_NOT_CONTENT)

    def splits(self) -> tuple[int, ...]:
        """Every split at which the run may be handed over, in ascending order; the last is `split`."""
        return (*sorted(set(self.accept_splits)), self.split)


def parse_request(body: bytes, limits: Limits) -> RunRequest:
    """The request in a JSON body. Raises ProblemError: 400 for what is not JSON, 422 for a field out of range."""
    try:
        request = _validated(body)
        json.loads(body, object_pairs_hook=_unique)  # after the other reader, which bounds depth and length of numbers
        f"{request.prompt}{request.negative_prompt}".encode()
    except UnicodeEncodeError:
        raise ProblemError(400, "malformed-json", "The prompt holds half of a surrogate pair; send UTF-8.") from None
    except ValidationError as error:
        raise _problem(error.errors(include_url=False, include_context=False)) from None
    check_limits(request, limits)
    return request


def _unique(pairs: list[tuple[str, Any]]) -> None:
    """Raise 422 for a key that stands twice in one object: readers differ in which of the two they take."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise invalid_field(key[:64], "A key stands twice in one object.", "twice", "once")
        seen.add(key)


def _validated(body: bytes) -> RunRequest:
    """Unknown keys are refused, unless the document says that it follows a newer minor version: then left out."""
    try:
        return RunRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        unknown = {each["loc"][0] for each in error.errors() if each["type"] == "extra_forbidden"}
        if not unknown:
            raise
        document = json.loads(body)
        version = document.get("schema_version")
        if not isinstance(version, str) or version == SCHEMA_VERSION or not version.startswith("1."):
            raise
        known = {key: value for key, value in document.items() if key not in unknown}
        return RunRequest.model_validate_json(json.dumps(known), strict=True)


def check_limits(request: RunRequest, limits: Limits) -> None:
    """Raise ProblemError 422 for the first field over the service's limits."""
    ceilings: tuple[tuple[str, float, float], ...] = (
        ("prompt", len(request.prompt), limits.max_prompt_chars),
        ("negative_prompt", len(request.negative_prompt), limits.max_prompt_chars),
        ("guidance", request.guidance, limits.max_guidance),
        ("height", request.height, limits.max_side),
        ("width", request.width, limits.max_side),
        ("num_steps", request.num_steps, limits.max_steps),
        ("split", request.split, request.num_steps),
    )
    for field, value, ceiling in ceilings:
        if value > ceiling:
            what = f"{field} is {value}{' characters long' if field in _PROMPTS else ''}, at most {ceiling} is allowed."
            raise invalid_field(field, what, value, f"at most {ceiling}")
    late = [each for each in request.accept_splits if each >= request.split]
    if late:
        what = f"accept_splits holds {late[0]}, expected splits smaller than {request.split}."
        raise invalid_field("accept_splits", what, late[0], f"1 .. {request.split - 1}")


def wire_version(request: RunRequest) -> str:
    """The newest handoff schema version that the client reads and this service writes. Raises ProblemError 406."""
    for version in WIRE_VERSIONS:
        if version in request.wire_versions:
            return version
    raise ProblemError(
        406,
        "wire-version",
        "This service writes none of the handoff schema versions the client reads.",
        field="wire_versions",
        received=", ".join(request.wire_versions),
        wanted=", ".join(WIRE_VERSIONS),
    )


def invalid_field(field: str, detail: str, received: object, wanted: object) -> ProblemError:
    """The 422 problem for one field."""
    return ProblemError(422, "invalid-request", detail, field=field, received=received, wanted=wanted)


def _problem(errors: list[ErrorDetails]) -> ProblemError:
    unknown = [_name(each) for each in errors if each["type"] == "extra_forbidden"]
    if unknown:
        allowed = ", ".join(RunRequest.model_fields)
        return invalid_field(unknown[0], f"Unknown keys: {', '.join(unknown)}.", ", ".join(unknown), allowed)
    first = errors[0]
    if first["type"] == "json_invalid":
        return ProblemError(400, "malformed-json", f"The body is not JSON: {first['msg']}.")
    field, message = _name(first), first["msg"]
    if first["type"] == "missing":
        return invalid_field(field, f"{field} is missing.", None, "a value")
    return invalid_field(field, f"{field}: {message}.", _shown(field, first["input"]), message)


def _name(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])[:64] or "body"


def _shown(field: str, value: object) -> str:
    """A value as a problem may repeat it: nothing of prompts, and no long or nested input."""
    if field in _PROMPTS or isinstance(value, (dict, list)):
        return type(value).__name__
    return repr(value)[:80]
