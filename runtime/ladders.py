"""The ladders of a run: what a computed step leaves behind for the predicted ones, in two arrays a stream that swap.

`feature_ladder` (M+1, 2, Cf, hf, wf) and, where predictors are chosen by token, `probe_ladder` (M+1, 2, Cp, hp, wp), in
float32 or float16 as the graphs declare. A computed step reads one array of each stream and writes the other; no two of
them share memory. It knows no step and no mask: the loop says when to swap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from latentrelay.runtime.errors import SessionError
from latentrelay.runtime.manifest import Port
from latentrelay.runtime.prediction_check import LADDER_ROLES
from numpy.typing import NDArray

_EXPONENT = np.uint16(0x7C00)  # float16: all set in NaN and in infinities


class Ladders:
    """Two arrays for each ladder among `ports`, a graph's inputs; `nbytes` is what they take together.

    Raises SessionError where the system has no memory for them.
    """

    def __init__(self, ports: Sequence[Port]) -> None:
        shapes = {port.role: ([int(n) for n in port.shape], port.dtype) for port in ports if port.role in LADDER_ROLES}
        try:
            self._sides = [{role: np.empty(*kind) for role, kind in shapes.items()} for _ in range(2)]
        except MemoryError as error:
            needed = sum(2 * math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values()) / 2**20
            raise SessionError(
                "there is no memory for the ladders of predicted steps",
                expected=f"{needed:.1f} MiB",
                do="Free memory, or build the bundle with ladders in float16.",
            ) from error
        self.reset()

    @property
    def current(self) -> dict[str, NDArray[Any]]:
        """By role: what the next step reads."""
        return self._sides[0]

    @property
    def spare(self) -> dict[str, NDArray[Any]]:
        """By role: what the next computed step writes."""
        return self._sides[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for side in self._sides for array in side.values())

    def swap(self) -> None:
        """What was written becomes what is read."""
        self._sides.reverse()

    def reset(self) -> None:
        """Start a run: everything NaN, so that a graph that uses what no step of the run has written shows it."""
        for side in self._sides:
            for array in side.values():
                array.fill(np.nan)


def non_finite(array: NDArray[Any]) -> int:
    """How many values are NaN or infinite; row by row of the first axis, because ladders are large."""
    return sum(_bad(row) for row in array) if array.ndim > 1 else _bad(array)


def _bad(array: NDArray[Any]) -> int:
    if array.dtype == np.float16 and array.flags.c_contiguous:  # several times faster than isfinite
        return int(np.count_nonzero((array.view(np.uint16) & _EXPONENT) == _EXPONENT))
    return int(array.size - np.count_nonzero(np.isfinite(array)))
