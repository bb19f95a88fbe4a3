"""Errors of the cloud service, below the wire format's own tree.

LatentRelayError
└── ServiceError             |- ModelLoadError       the pipeline cannot be read                       (1: failed)
                             |- ModelRefusedError    it can be read, but is not one this service runs  (3: refused)
                             |- PlaintextRefusedError plain HTTP was asked for off loopback            (3: refused)
                             |- RunCancelled         a run was cancelled between two steps
                             |- QueueFullError       as many runs wait as may wait
                             |- ProblemError         a request is answered with an error document
"""

from __future__ import annotations

from typing import Any

from latentrelay.runtime.errors import REFUSED, LatentRelayError


class ServiceError(LatentRelayError):
    """The cloud service cannot do what it was asked to."""


class ModelLoadError(ServiceError):
    """A pipeline cannot be found or read."""


class ModelRefusedError(ServiceError):
    """A pipeline was found, but it is of a kind or in a form that this service does not run."""

    exit_status = REFUSED


class PlaintextRefusedError(ServiceError):
    """Plain HTTP was asked for on an address that other machines reach."""

    exit_status = REFUSED


class RunCancelled(ServiceError):
    """The run was cancelled; no handoff was made."""


class QueueFullError(ServiceError):
    """Too many runs are waiting already; `.retry_after_s` is when to ask again."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__("the queue is full", got=f"{waiting} runs", do=f"Ask again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class ProblemError(ServiceError):
    """A request is refused with an RFC 9457 document: status, a short kind, and the field that is wrong, if one is.

    `wanted` is what was expected; neither it nor `received` may hold any part of a prompt.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        field: str | None = None,
        received: object = None,
        wanted: object = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.field, self.received, self.wanted = field, received, wanted
        self.headers = headers or {}

    def document(self) -> dict[str, Any]:
        """The JSON object: type, title, status, detail and, where they are known, field, got and expected."""
        document: dict[str, Any] = {
            "type": f"urn:latentrelay:problem:{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
        }
        facts = {"field": self.field, "got": self.received, "expected": self.wanted}
        return document | {key: value for key, value in facts.items() if value is not None}
