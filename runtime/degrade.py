"""The degrade ladder: what a run gives up, in which order, when the cloud is slow or gone or the device is hot.

Cloud too slow for its deadline -> it may hand over early, at a smaller split. Cloud gone, refusing for load or too late
-> all steps on the device. Device hot or short of memory -> more predicted steps. Every rung that was taken is a
`Degradation` in the result. Not here: whether an error is one that may be survived; that is the error tree's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

THERMAL = ("nominal", "fair", "serious", "critical")


@dataclass(frozen=True)
class Degradation:
    """One thing given up: `what` and `why` are short codes for machines, `detail` is a sentence for people."""

    what: str
    why: str
    detail: str


@dataclass(frozen=True)
class DeviceState:
    """How the device is: `thermal` one of THERMAL, `free_mib` the memory that an application may still take."""

    thermal: str = "nominal"
    free_mib: float | None = None


ReadDeviceState = Callable[[], DeviceState]
