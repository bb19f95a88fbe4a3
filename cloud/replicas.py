"""How many replicas there are: the bounds an operator gives, and the number that the jobs in hand call for.

`desired_replicas` is Ray Serve's autoscaling policy. Ray itself counts requests in progress, and a job that was
accepted with 202 is none: the replicas report the jobs they hold (`jobs`), and the policy looks at nothing else.
Ray copies this module's code into its controller, so it imports only the standard library and our errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from latentrelay.runtime.errors import RequestError

METRIC = "jobs"


@dataclass(frozen=True)
class Replicas:
    """Between `minimum` and `maximum` replicas; with both equal, that many always."""

    minimum: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise RequestError(
                "the number of replicas makes no sense",
                got=f"{self.minimum}:{self.maximum}",
                expected="MIN[:MAX], 1 or more, MAX not less than MIN",
            )

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Replicas of "2" (two, always) or "1:4" (one to four). Raises RequestError."""
        low, colon, high = text.partition(":")
        if not low.isdecimal() or (colon and not high.isdecimal()):
            raise RequestError("the number of replicas is not one", got=text, expected="MIN or MIN:MAX, such as 1:4")
        return cls(int(low), int(high) if colon else int(low))

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to scale."""
        return self.minimum == self.maximum


class ScalingContext(Protocol):
    """What the policy reads of Ray's AutoscalingContext."""

    current_num_replicas: int
    target_num_replicas: int
    config: Any  # its target_ongoing_requests is the number of jobs that one replica should hold

    @property
    def raw_metrics(self) -> Mapping[str, Mapping[Any, Any]] | None: ...  # replica -> points (timestamp, value)


def desired_replicas(context: ScalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas for the jobs held now: their sum over the share of one; bounds and delays are Ray's to apply.

    A replica that has reported nothing yet counts as holding none. Without any report nothing changes.
    """
    series = (context.raw_metrics or {}).get(METRIC, {})
    latest = [points[-1].value for points in series.values() if points]
    if not latest:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(latest) / context.config.target_ongoing_requests)), {}
