"""Errors of the cloud service, below the wire format's own tree.

LatentRelayError
└── ServiceError             |- ModelLoadError       the pipeline cannot be read                       (1: failed)
                             |- ModelRefusedError    it can be read, but is not one this service runs  (3: refused)
                             |- PlaintextRefusedError plain HTTP was asked for off loopback            (3: refused)
                             |- ReplicaError         the replicas of a service did not start            (1: failed)
                             |- RunCancelled         a run was cancelled between two steps
                             |- DeadlinePassedError  a run did not end by its deadline
                             |- RunFailedError       a run ended for a reason that is the service's own
                             |- RefusedError         not now: the load is too high; says when to ask again
                             |  |- QueueFullError        as many runs wait as may wait
                             |  |- MemoryRefusedError    the run's activations do not fit the memory there is
                             |  |- DeadlineRefusedError  what is queued leaves no time to meet the deadline
                             |  |- DrainingError         the service ends and takes nothing new
                             |- ProblemError         a request is answered with an error document
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

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


class ReplicaError(ServiceError):
    """The replicas of a service did not start."""


class RunCancelled(ServiceError):
    """The run was cancelled; no handoff was made."""


class DeadlinePassedError(ServiceError):
    """A run's deadline came before its split, or any smaller split it would accept; no handoff was made."""


class RunFailedError(ServiceError):
    """The network could not be run for a reason that a client can do nothing about and is told nothing of."""


class RefusedError(ServiceError):
    """The service does not take this request on now; `.kind` says why in a word, `.retry_after_s` when to ask again."""

    kind: ClassVar[str] = "refused"

    def __init__(self, what: str, *, retry_after_s: float, got: object = None, expected: object = None) -> None:
        self.retry_after_s = min(3600, max(1, math.ceil(retry_after_s)))
        super().__init__(what, got=got, expected=expected, do=f"Ask again in {self.retry_after_s} s.")


class QueueFullError(RefusedError):
    """Too many runs are waiting already."""

    kind = "queue-full"

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__("the queue is full", got=f"{waiting} runs", retry_after_s=retry_after_s)


class MemoryRefusedError(RefusedError):
    """One run of this size needs more memory for its activations than there is."""

    kind = "memory"


class DeadlineRefusedError(RefusedError):
    """What is queued and the measured step times leave no time to reach even the smallest split that is accepted."""

    kind = "deadline-unreachable"


class DrainingError(RefusedError):
    """The service is ending; what it has accepted is finished or left to the next process."""

    kind = "draining"


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
