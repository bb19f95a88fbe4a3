"""The body of `POST /v1/handoffs`: JSON bytes in, a frozen `RunRequest` out, or a problem that names the field.

Fields that only the loaded model can judge (sampler, digests, whether a size fits) are checked by the engine. What a
problem says about a prompt is its length, never its text.
"""

from __future__ import annotations

from typing import Annotated, Literal

from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.limits import Limits
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
_PROMPTS = ("prompt", "negative_prompt")


class RunRequest(BaseModel):
    """Run steps 0 .. split-1 of `num_steps` for one picture of height x width pixels and hand over the latents.

    seed: 0 .. 2**64 - 1, noise of torch's CPU generator. dtype: of the latents on the wire. sampler and the digests:
    None takes the service's own; a value that differs from it is refused with 409.
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


def parse_request(body: bytes, limits: Limits) -> RunRequest:
    """The request in a JSON body. Raises ProblemError: 400 for what is not JSON, 422 for a field out of range."""
    try:
        request = RunRequest.model_validate_json(body, strict=True)
        f"{request.prompt}{request.negative_prompt}".encode()
    except UnicodeEncodeError:
        raise ProblemError(400, "malformed-json", "The prompt holds half of a surrogate pair; send UTF-8.") from None
    except ValidationError as error:
        raise _problem(error.errors(include_url=False, include_context=False)) from None
    check_limits(request, limits)
    return request


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
