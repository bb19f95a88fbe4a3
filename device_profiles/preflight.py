"""Will it fit? A prediction about a bundle against what a device profile allows, limit by limit.

In: a `DeviceProfile` and a `Predicted` (compress/footprint.py makes one from shapes; anything else may). Out: a
`Preflight` with every check and the one that limits: the check that is exceeded most, or, where all hold, the one that
is nearest to its limit. Of what a run needs it predicts the ladders of predicted steps alone, which follow from their
shapes; it reads nothing and refuses nothing: the caller does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from latentrelay.device_profiles.schema import DeviceProfile

LadderDtype = Literal["float32", "float16"]
MIB = 2**20
LADDER_ARRAYS = 2  # of each stream: one is read while the other is written
_LADDER_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2}
_STEPS = "steps"
_NEEDS = {"fp16": "fp16", "w8a16": "int8", "w8a8": "int8", "w4a16": "int4", "w4a8": "int4"}


@dataclass(frozen=True)
class Predicted:
    """What is expected of a bundle. `parameters` are the U-Net's; memory is the whole process's, by stage in
    `memory_by_stage`, and `ladder_mib` of it are ladders; `operators` are ONNX operators by component; `step_ms`
    is one guided step there."""

    precision: str
    parameters: int
    bytes: int
    largest_file: str
    largest_file_mib: float
    peak_memory_mib: float
    limiting_stage: str
    memory_by_stage: Mapping[str, float] = field(default_factory=dict)
    operators: Mapping[str, frozenset[str]] = field(default_factory=dict)
    step_ms: float | None = None
    ladder_mib: float = 0.0


@dataclass(frozen=True)
class Check:
    """One limit: what is predicted, what is allowed, which part of the bundle it is about, and why in words."""

    name: str
    fits: bool
    predicted: float
    allowed: float
    part: str
    words: str

    @property
    def load(self) -> float:
        """Predicted over allowed; above 1 it does not fit."""
        if self.allowed > 0:
            return self.predicted / self.allowed
        return 0.0 if self.predicted == 0 else float("inf")


@dataclass(frozen=True)
class Preflight:
    """The verdict. `limiting` names the check that decides, whether it holds or not."""

    fits: bool
    limiting: Check
    checks: tuple[Check, ...]


def ladder_mib(shapes: Sequence[Sequence[int]], dtype: str) -> float:
    """MiB that the ladders of a run take; `shapes` (rungs, 2, channels, rows, columns), one a stream.

    Two arrays a stream in `dtype`, which ONNX Runtime reads and writes where they lie, and the stream's value in the
    step at hand, (2, channels, rows, columns) float32, which it holds while the network runs on. Raises KeyError for a
    dtype that is neither float32 nor float16.
    """
    rungs = LADDER_ARRAYS * _LADDER_BYTES[dtype]
    return sum((rungs * shape[0] + 4) * math.prod(shape[1:]) for shape in shapes) / MIB


def with_ladders(
    predicted: Predicted, shapes: Sequence[Sequence[int]], dtype: str, *, graph_mib: float = 0.0
) -> Predicted:
    """The prediction for a bundle with predicted steps: ladders, and `graph_mib` of the second step graph's session, on
    top of the stage "steps" (of the peak, where no stages are told). Nothing of it outlives that stage."""
    ladders = ladder_mib(shapes, dtype)
    if _STEPS not in predicted.memory_by_stage:
        peak = predicted.peak_memory_mib + ladders + graph_mib
        return replace(predicted, peak_memory_mib=peak, ladder_mib=predicted.ladder_mib + ladders)
    stages = dict(predicted.memory_by_stage)
    stages[_STEPS] += ladders + graph_mib
    limiting = max(stages, key=lambda name: stages[name])
    return replace(
        predicted,
        peak_memory_mib=stages[limiting],
        limiting_stage=limiting,
        memory_by_stage=stages,
        ladder_mib=predicted.ladder_mib + ladders,
    )


def ladder_dtype(
    profile: DeviceProfile, predicted: Predicted, shapes: Sequence[Sequence[int]], *, graph_mib: float = 0.0
) -> LadderDtype:
    """What the ladders are kept in: float32 where the application may hold that much, else float16."""
    wide = with_ladders(predicted, shapes, "float32", graph_mib=graph_mib)
    return "float32" if wide.peak_memory_mib <= profile.memory.application_ceiling_mib else "float16"


def preflight(profile: DeviceProfile, predicted: Predicted, *, max_step_ms: float | None = None) -> Preflight:
    """Hold a prediction against a profile; `max_step_ms` is a limit of the caller's own."""
    checks = tuple(_checks(profile, predicted, max_step_ms))
    refused = [check for check in checks if not check.fits]
    limiting = max(refused or checks, key=lambda check: check.load)
    return Preflight(not refused, limiting, checks)


def _checks(profile: DeviceProfile, predicted: Predicted, max_step_ms: float | None) -> list[Check]:
    memory, target = profile.memory, profile.target_unet_parameters
    ladders = f", {predicted.ladder_mib:.1f} of them ladders of predicted steps" if predicted.ladder_mib else ""
    found = [
        Check(
            "peak_memory",
            predicted.peak_memory_mib <= memory.application_ceiling_mib,
            predicted.peak_memory_mib,
            memory.application_ceiling_mib,
            predicted.limiting_stage,
            f"MiB{ladders}; an application may hold {memory.application_ceiling_mib} ({memory.ceiling_label})",
        ),
        Check(
            "largest_file",
            predicted.largest_file_mib <= memory.largest_file_mib,
            predicted.largest_file_mib,
            memory.largest_file_mib,
            predicted.largest_file,
            f"MiB; {memory.largest_file_reason}",
        ),
        Check(
            "parameters",
            predicted.parameters <= target.parameters,
            predicted.parameters,
            target.parameters,
            "unet",
            f"the profile's target for its U-Net, limited by {target.limited_by}",
        ),
        _operators(profile, predicted),
        _precision(profile, predicted),
    ]
    if max_step_ms is not None and predicted.step_ms is not None:
        fits = predicted.step_ms <= max_step_ms
        found.append(Check("step_latency", fits, predicted.step_ms, max_step_ms, "unet", "ms a step, as asked for"))
    return found


def _operators(profile: DeviceProfile, predicted: Predicted) -> Check:
    denied = set(profile.support.denied_ops)
    found = {part: sorted(names & denied) for part, names in predicted.operators.items() if names & denied}
    words = "; ".join(f"{part}: {', '.join(names)}" for part, names in found.items())
    count = sum(len(names) for names in found.values())
    part = ", ".join(found) or "none"
    return Check("operators", not found, count, 0, part, words or "operators that the device denies: none are used")


def _precision(profile: DeviceProfile, predicted: Predicted) -> Check:
    need = _NEEDS.get(predicted.precision)
    missing = need is not None and not getattr(profile.support, need)
    words = f"{predicted.precision} needs {need}, which the device lacks" if missing else f"{predicted.precision}: yes"
    return Check("precision", not missing, float(missing), 0, "unet", words)
