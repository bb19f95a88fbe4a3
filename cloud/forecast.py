"""How long network calls take, and from that how long a request would: the measured times behind admission.

In: (latent size, requests in the call, seconds) after every call. Out: estimates in seconds, None before anything was
measured. Times are medians of the last calls, so one slow call changes little; between measured batch sizes lines are
drawn, beyond them time grows with the batch, and a size never run is scaled by its number of latents.
"""

from __future__ import annotations

import heapq
import statistics
from collections import deque
from collections.abc import Sequence

Size = tuple[int, int]
_KEPT = 9


class StepTimes:
    """The measured seconds of network calls, by latent size and number of requests. One caller at a time."""

    def __init__(self) -> None:
        self._times: dict[Size, dict[int, deque[float]]] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=64)  # seconds, share of the places used

    def record(self, size: Size, requests: int, seconds: float, capacity: int) -> None:
        """One call of the network."""
        if len(self._times) >= 256 and size not in self._times:
            self._times.pop(next(iter(self._times)))
        row = self._times.setdefault(size, {}).setdefault(requests, deque(maxlen=_KEPT))
        row.append(seconds)
        self._recent.append((seconds, requests / capacity))

    def known(self, size: Size) -> bool:
        """Whether calls of this very size were measured. Another size's figures, scaled, are no more than a guess: a
        small size's calls are mostly overhead, which does not grow."""
        return size in self._times

    def seconds(self, size: Size, requests: int) -> float | None:
        """Expected seconds of a call for so many requests of this size."""
        if size in self._times:
            return _between({count: statistics.median(row) for count, row in self._times[size].items()}, requests)
        if not self._times:
            return None
        near = min(self._times, key=lambda each: abs(_area(each) - _area(size)))
        known = self.seconds(near, requests)
        return None if known is None else known * _area(size) / _area(near)

    @property
    def median_s(self) -> float | None:
        """Of the last 64 calls, of any size."""
        return statistics.median(each for each, _ in self._recent) if self._recent else None

    @property
    def occupancy(self) -> float | None:
        """The mean share of places used in the last 64 calls."""
        return statistics.fmean(share for _, share in self._recent) if self._recent else None


def steps_until_done(running: Sequence[int], before: Sequence[int], places: int, steps: int) -> int:
    """After how many calls a new run of `steps` has ended: `running` holds the steps left of those that have a place,
    `before` those of the runs that get one first, in their order."""
    ends = list(running[:places])
    heapq.heapify(ends)
    for each in (*running[places:], *before):
        start = heapq.heappop(ends) if len(ends) >= places else 0
        heapq.heappush(ends, start + each)
    start = ends[0] if len(ends) >= places else 0
    return start + steps


def _between(known: dict[int, float], requests: int) -> float:
    if requests in known:
        return known[requests]
    below = max((each for each in known if each < requests), default=None)
    above = min((each for each in known if each > requests), default=None)
    if below is None:
        return known[above] if above is not None else 0.0
    if above is None:
        return known[below] * requests / below
    share = (requests - below) / (above - below)
    return known[below] + share * (known[above] - known[below])


def _area(size: Size) -> int:
    return size[0] * size[1]
