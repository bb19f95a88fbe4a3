"""Why a job failed, as the RFC 9457 document its clients get. No message of a foreign error is repeated."""

from __future__ import annotations

from typing import Any

from latentrelay.cloud.errors import DeadlinePassedError, ProblemError, RefusedError
from latentrelay.runtime.errors import NonFiniteError


def problem_of(error: BaseException) -> dict[str, Any]:
    """The document of the error that a run ended with."""
    if isinstance(error, ProblemError):
        return error.document()
    if isinstance(error, DeadlinePassedError):
        return deadline_passed().document()
    if isinstance(error, RefusedError):
        return ProblemError(503, error.kind, str(error)).document()
    if isinstance(error, NonFiniteError):
        where = error.stage if error.step is None else f"{error.stage}, step {error.step}"
        return ProblemError(500, "run-failed", f"Values that are not finite came out of {where}.").document()
    return ProblemError(500, "run-failed", "The run failed.").document()


def deadline_passed() -> ProblemError:
    """The time that the request, or the service, gave the job is over."""
    return ProblemError(504, "deadline-passed", "The job's deadline passed before its steps were made.")


def interrupted() -> ProblemError:
    """The service died as often as it begins a job."""
    detail = "The service ended while it ran this job, as often as a job is begun. Send it again with a new key."
    return ProblemError(503, "run-interrupted", detail)


def result_lost() -> ProblemError:
    """The blob does not have its sha256 any more."""
    return ProblemError(410, "result-lost", "The stored result is damaged or gone. Send it again with a new key.")


def other_model() -> ProblemError:
    """The key's job belongs to a service that shares the store and serves another model."""
    return ProblemError(
        409,
        "other-model",
        "This Idempotency-Key names a job of a service with another model, or another default sampler or precision. "
        "Send the request with a new key to have it made here.",
        field="idempotency-key",
        received="the key of a job of another model",
        wanted="a new key",
    )


def unreadable() -> ProblemError:
    """The request was recorded by a version that knew more, or less."""
    detail = "This version of the service cannot read the recorded request. Send it again with a new key."
    return ProblemError(409, "request-unreadable", detail)
