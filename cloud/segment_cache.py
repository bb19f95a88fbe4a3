"""The cloud's own step cache: which steps of a run call the network, and what stands in for it on the others.

A schedule is a JSON file made for one sampler and number of steps. On a step that it leaves out, the guided prediction
of the last computed step is used again (order 0), or the last two are extended in a straight line over the step number
(order 1). It is used only for requests that allow it. It is not the device's token prediction (compress/prediction.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.strict_json import check_schema_version, parse_record, read_json


@dataclass(frozen=True)
class SegmentCache:
    """computed: the steps that call the network, ascending, 0 first; order: 0 or 1; evidence: how it was measured.

    model_digest: the only model it is for, or None for any.
    """

    schema_version: str
    sampler: str
    num_steps: int
    computed: tuple[int, ...]
    order: int = 0
    model_digest: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_schema_version(self.schema_version)
        ascending = all(a < b for a, b in zip(self.computed, self.computed[1:], strict=False))
        if not self.computed or self.computed[0] != 0 or not ascending or self.computed[-1] >= self.num_steps:
            raise ValueError("computed: expected step 0 first, ascending, all below num_steps")
        if self.order not in (0, 1):
            raise ValueError(f"order: got {self.order}, expected 0 or 1")

    def fits(self, sampler: str, num_steps: int) -> bool:
        """Whether a run with this sampler and number of steps may use it."""
        return (self.sampler, self.num_steps) == (sampler, num_steps)

    def predicted(self, step: int, held: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
        """The stand-in for step `step` from the predictions computed last, (step, (1, C, h, w)) each, newest last."""
        last, newest = held[-1]
        if self.order == 0 or len(held) < 2:
            return newest
        before, older = held[-2]
        return newest + (step - last) / (last - before) * (newest - older)


def read_segment_cache(path: Path) -> SegmentCache:
    """The schedule in a JSON file. Raises RequestError naming what is wrong with it."""
    try:
        return parse_record(SegmentCache, read_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the step cache schedule {path.name!r} cannot be used: {error}",
            expected="a JSON object with schema_version, sampler, num_steps, computed",
            do="Make it again, or run without it.",
        ) from error
