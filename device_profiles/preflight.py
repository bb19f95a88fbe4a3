"""Will it fit? A prediction about a bundle against what a device profile allows, limit by limit.

In: a `DeviceProfile` and a `Predicted` (compress/footprint.py makes one from shapes; anything else may). Out: a
`Preflight` with every check and the one that limits: the check that is exceeded most, or, where all hold, the one that
is nearest to its limit. It predicts nothing itself, reads nothing and refuses nothing: the caller does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from latentrelay.device_profiles.schema import DeviceProfile

_NEEDS = {"fp16": "fp16", "w8a16": "int8", "w8a8": "int8", "w4a16": "int4", "w4a8": "int4"}


@dataclass(frozen=True)
class Predicted:
    """What is expected of a bundle. `parameters` are the U-Net's; memory is the whole process's, by stage in
    `memory_by_stage`; `operators` are the ONNX operators of each component; `step_ms` is one guided step there."""

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


def preflight(profile: DeviceProfile, predicted: Predicted, *, max_step_ms: float | None = None) -> Preflight:
    """Hold a prediction against a profile; `max_step_ms` is a limit of the caller's own."""
    checks = tuple(_checks(profile, predicted, max_step_ms))
    refused = [check for check in checks if not check.fits]
    limiting = max(refused or checks, key=lambda check: check.load)
    return Preflight(not refused, limiting, checks)


def _checks(profile: DeviceProfile, predicted: Predicted, max_step_ms: float | None) -> list[Check]:
    memory, target = profile.memory, profile.target_unet_parameters
    found = [
        Check(
            "peak_memory",
            predicted.peak_memory_mib <= memory.application_ceiling_mib,
            predicted.peak_memory_mib,
            memory.application_ceiling_mib,
            predicted.limiting_stage,
            f"MiB; an application may hold {memory.application_ceiling_mib} ({memory.ceiling_label})",
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
