"""The degrade ladder: what a run gives up, in which order, when the cloud is slow or gone or the device is hot.

Cloud too slow for its deadline -> it may hand over early, at a smaller split. Cloud gone, refusing for load or too late
-> all steps on the device. Device hot or short of memory -> more predicted steps. Every rung that was taken is a
`Degradation` in the result; docs/embedding.md lists the codes. Not here: what an error means; that is the error tree's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from latentrelay.runtime.errors import CloudUnavailableError, RequestError
from latentrelay.runtime.prediction_check import PREDICTED, STEP_FULL

if TYPE_CHECKING:
    from latentrelay.runtime.cloud_capabilities import Capabilities
    from latentrelay.runtime.manifest import Manifest, StepMask

THERMAL = ("nominal", "fair", "serious", "critical")
HOT = THERMAL[2:]
SPLIT_LOWERED, ON_DEVICE = "split-lowered", "all-steps-on-device"
MAX_SPLITS = 64  # a cloud reads no more
MORE_PREDICTED, NOTHING_MORE = "more-predicted-steps", "nothing-more-to-predict"


@dataclass(frozen=True)
class Degradation:
    """One thing given up: `what` and `why` are short codes for machines, `detail` is a sentence for people."""

    what: str
    why: str
    detail: str


@dataclass(frozen=True)
class DeviceState:
    """How the device is: `thermal` one of THERMAL, `free_mib` the memory that the application may still take (None:
    not known). Raises RequestError for another thermal state."""

    thermal: str = "nominal"
    free_mib: float | None = None

    def __post_init__(self) -> None:
        if self.thermal not in THERMAL:
            raise RequestError("unknown thermal state", got=self.thermal, expected=" | ".join(THERMAL))


class FailureMemory:
    """A short memory of a cloud's failures, so that not every next picture waits for one that is gone.

    After a failure the cloud rests for `first_s` seconds, twice as long after each further one in a row, `most_s` at
    most, and never less than it asked for itself. A success ends the row.
    """

    def __init__(self, first_s: float = 5.0, most_s: float = 120.0) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._until = 0.0
        self.failures = 0

    def failed(self, retry_after_s: float | None = None) -> None:
        """The cloud did not hand over."""
        rest_s = min(self._most_s, self._first_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        self._until = time.monotonic() + max(rest_s, min(retry_after_s or 0.0, self._most_s))

    def worked(self) -> None:
        """It did."""
        self.failures, self._until = 0, 0.0

    def rest_s(self) -> float:
        """Seconds for which the cloud is better not asked; 0: ask."""
        return max(0.0, self._until - time.monotonic()) if self.failures else 0.0


def smaller_splits(manifest: Manifest, split: int) -> tuple[int, ...]:
    """The splits at which a cloud may hand over early: those below `split` from which the bundle predicts steps, and
    of a bundle that predicts none every one (MAX_SPLITS at most, evenly spread); without 0, which needs no cloud.
    Descending."""
    masks = manifest.prediction.masks if manifest.prediction is not None else ()
    choice = {mask.split for mask in masks if mask.level == "normal"} if masks else range(split)
    found = sorted((each for each in choice if 0 < each < split), reverse=True)
    return tuple(found[:: 1 + (len(found) - 1) // MAX_SPLITS] if found else ())


def affordable_split(cloud: Capabilities, splits: Sequence[int], num_steps: int, deadline_s: float) -> int:
    """The first of `splits` (descending) that the cloud's own estimate puts within the deadline; the first where it
    gives none. Raises CloudUnavailableError of kind "slow" where even the last takes too long.

    The estimate is for half of a run at the cloud's default size, so what is over its steps' time is waiting.
    """
    if cloud.step_ms is None:
        return splits[0]
    waiting_ms = max(0.0, (cloud.estimate_ms or 0.0) - num_steps // 2 * cloud.step_ms)
    for split in splits:
        if waiting_ms + split * cloud.step_ms <= 1000 * deadline_s:
            return split
    raise CloudUnavailableError(
        "the cloud is too slow for the deadline",
        kind="slow",
        got=f"{waiting_ms + splits[-1] * cloud.step_ms:.0f} ms for {splits[-1]} steps",
        expected=f"at most {1000 * deadline_s:.0f} ms",
    )


def without_cloud(error: CloudUnavailableError) -> Degradation:
    """All steps run here, because the cloud did not hand over."""
    said = str(error).removesuffix(f". {error.do}").rstrip(".")
    return Degradation(ON_DEVICE, f"cloud-{error.kind}", f"All steps ran here: {said}.")


def lowered(asked: int, got: int) -> Degradation:
    """The cloud did fewer steps than it was asked for, in order to be in time."""
    return Degradation(
        SPLIT_LOWERED, "cloud-slow", f"The cloud did {got} steps instead of {asked} to be in time; the rest ran here."
    )


@dataclass(frozen=True)
class DevicePart:
    """How the device runs its steps: whether it predicts, at which level of prediction, and what that gives up."""

    predict: bool
    level: str = "normal"
    degraded: tuple[Degradation, ...] = ()


def device_part(
    manifest: Manifest,
    state: DeviceState,
    mask_at: Callable[[bool, str], StepMask | None],
    *,
    predict: bool,
) -> DevicePart:
    """How a device in that state runs its part. `mask_at(predict, level)` is the mask it would follow.

    Hot: the mask of level "hot" where the split has one, else the normal one also where none was asked for. Short of
    memory (less free than the step graphs' files take): the hot mask in the place of a normal one; prediction is not
    begun for it, because its ladders take memory too.
    """
    hot, why = state.thermal in HOT, f"the device's thermal state is {state.thermal}"
    code = "device-hot"
    needed = step_graph_mib(manifest)
    if not hot:
        if state.free_mib is None or state.free_mib >= needed:
            return DevicePart(predict)
        code, why = "device-memory-low", f"{state.free_mib:.0f} MiB are free and the step graphs take {needed:.0f}"
    now = mask_at(predict, "normal")
    best = mask_at(predict or hot, "hot")
    if best is not None and _predicted(best) > _predicted(now):
        detail = f"{_predicted(best)} steps are predicted instead of {_predicted(now)}: {why}."
        return DevicePart(True, best.level, (Degradation(MORE_PREDICTED, code, detail),))
    detail = f"No more than {_predicted(now)} steps can be predicted here, although {why}."
    return DevicePart(predict, "normal", (Degradation(NOTHING_MORE, code, detail),))


def step_graph_mib(manifest: Manifest) -> float:
    """What the files of the step graphs take, their weights among them."""
    folder = manifest.components[STEP_FULL].path.rpartition("/")[0] + "/"
    return sum(entry.bytes for entry in manifest.files if entry.path.startswith(folder)) / 2**20


def _predicted(mask: StepMask | None) -> int:
    return 0 if mask is None else mask.mask.count(PREDICTED)
