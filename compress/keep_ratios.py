"""Which widths to keep: the ones that lose least by the scores while a cost comes down to what is allowed.

In: units, a score each (sensitivity.py, at keep-ratio 0.5) and a ceiling on parameters. Out: `{unit path: width}`. A
unit's expected loss grows with the square of what it loses and passes through its score, so the marginal loss rises
and the greedy choice (cheapest loss per parameter next, one granule at a time) is the best one up to the size of a
granule. `uniform_widths` is the rival: one keep-ratio for every unit.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from latentrelay.compress.errors import CompressError
from latentrelay.compress.prunable_units import PrunableUnit
from latentrelay.compress.sensitivity import KEEP_RATIO


class BudgetError(CompressError):
    """A budget that cannot be met; `.closest` is the smallest parameter count that can."""

    exit_status = 3

    def __init__(self, what: str, *, got: int, closest: int) -> None:
        super().__init__(what, got=f"{got:,}", expected=f"at least {closest:,}", do="Raise the budget.")
        self.closest = closest


def expected_loss(unit: PrunableUnit, score: float, width: int) -> float:
    """The loss that a unit is expected to cost at a width; its score at keep-ratio 0.5, 0 at its full width."""
    if width == unit.width:
        return 0.0
    return score * ((1 - width / unit.width) / (1 - KEEP_RATIO)) ** 2


def saved_parameters(units: Sequence[PrunableUnit], widths: Mapping[str, int]) -> int:
    """How many parameters these widths save."""
    return sum((unit.width - widths.get(unit.path, unit.width)) * unit.parameters_per_width for unit in units)


def sensitive_widths(
    units: Sequence[PrunableUnit], scores: Mapping[str, float], parameters: int, ceiling: int
) -> dict[str, int]:
    """The widths of least expected loss for a network of `parameters` to come down to at most `ceiling`.

    Raises BudgetError, with the closest that can be met, when the narrowest widths are still too many.
    """
    _check(units, parameters, ceiling)
    widths = {unit.path: unit.width for unit in units}
    queue = [(_marginal(unit, scores[unit.path], unit.width), index) for index, unit in enumerate(units)]
    heapq.heapify(queue)
    left = parameters
    while left > ceiling and queue:
        _loss, index = heapq.heappop(queue)
        unit = units[index]
        narrower = _narrower(unit, widths[unit.path])
        if narrower is None:
            continue
        left -= (widths[unit.path] - narrower) * unit.parameters_per_width
        widths[unit.path] = narrower
        heapq.heappush(queue, (_marginal(unit, scores[unit.path], narrower), index))
    return _filled(units, scores, widths, ceiling - left)


def uniform_widths(units: Sequence[PrunableUnit], parameters: int, ceiling: int) -> dict[str, int]:
    """One keep-ratio for every unit, the largest that comes down to at most `ceiling`, by bisection; then filled up."""
    _check(units, parameters, ceiling)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        widths = {unit.path: unit.kept(max(middle, 1e-9)) for unit in units}
        if parameters - saved_parameters(units, widths) <= ceiling:
            low = middle
        else:
            high = middle
    widths = {unit.path: unit.kept(max(low, 1e-9)) for unit in units}
    alike = {unit.path: 1.0 for unit in units}
    return _filled(units, alike, widths, ceiling - parameters + saved_parameters(units, widths))


def _check(units: Sequence[PrunableUnit], parameters: int, ceiling: int) -> None:
    closest = parameters - saved_parameters(units, {unit.path: unit.minimum for unit in units})
    if ceiling < closest:
        raise BudgetError("the U-Net cannot be made this small", got=ceiling, closest=closest)


def _narrower(unit: PrunableUnit, width: int) -> int | None:
    """The next width down, or None at the minimum. Widths that are no multiple of the granularity come down to one."""
    below = (width - 1) // unit.granularity * unit.granularity
    return below if below >= unit.minimum else None


def _marginal(unit: PrunableUnit, score: float, width: int) -> float:
    narrower = _narrower(unit, width)
    if narrower is None:
        return float("inf")
    gained = (width - narrower) * unit.parameters_per_width
    return (expected_loss(unit, score, narrower) - expected_loss(unit, score, width)) / gained


def _filled(
    units: Sequence[PrunableUnit], scores: Mapping[str, float], widths: dict[str, int], spare: int
) -> dict[str, int]:
    """Widen again what fits into the spare parameters, what gains most per parameter first."""
    while True:
        fits = []
        for unit in units:
            wider = min(unit.width, (widths[unit.path] // unit.granularity + 1) * unit.granularity)
            cost = (wider - widths[unit.path]) * unit.parameters_per_width
            if 0 < cost <= spare:
                was, now = (expected_loss(unit, scores[unit.path], width) for width in (widths[unit.path], wider))
                fits.append(((was - now) / cost, unit.path, wider, cost))
        if not fits:
            return widths
        _gain, path, wider, cost = max(fits)
        widths[path] = wider
        spare -= cost
