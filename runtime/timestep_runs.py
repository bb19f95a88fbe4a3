"""Timesteps written short: a list whose items are a number or a run [start, step, count].

A run stands for start, start + step, ... (count of them). The writer makes runs of whole numbers only, so that reading
them is exact, and takes at every place what makes the text shortest; the reader takes any mixture. Not a general codec:
sampler grids are nearly even, and that is all it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAX_TIMESTEPS = 10_000
_SHORTEST_RUN = 3


def whole(number: float) -> int | float:
    """An integer where the number is integral and a double holds it exactly, else the number as it is."""
    return int(number) if float(number).is_integer() and abs(number) < 2**53 else number


def to_runs(timesteps: Sequence[float]) -> list[Any]:
    """The items for `timesteps`: at each place the number or the longest run from there, by the length of the text."""
    numbers = [whole(each) for each in timesteps]
    lengths = _run_lengths(numbers)
    cost, take = [0] * (len(numbers) + 1), [1] * len(numbers)
    for place in reversed(range(len(numbers))):
        cost[place] = len(_text(numbers[place])) + 1 + cost[place + 1]
        count = lengths[place]
        if count >= _SHORTEST_RUN:
            run = [numbers[place], numbers[place + 1] - numbers[place], count]
            as_run = sum(len(_text(each)) + 1 for each in run) + 2 + cost[place + count]
            if as_run < cost[place]:
                cost[place], take[place] = as_run, count
    items: list[Any] = []
    place = 0
    while place < len(numbers):
        count = take[place]
        run = [numbers[place], numbers[place + 1] - numbers[place], count] if count > 1 else []
        items.append(run or numbers[place])
        place += count
    return items


def from_runs(items: Any) -> list[float]:
    """The numbers behind `items`. Raises ValueError on another form, and before making more than MAX_TIMESTEPS."""
    if not isinstance(items, list):
        raise ValueError("timesteps: got no list")
    numbers: list[float] = []
    for item in items:
        run = item if isinstance(item, list) else [item, 0, 1]
        if len(run) != 3 or not all(_number(each) for each in run) or not isinstance(run[2], int):
            raise ValueError(f"timesteps: got the item {item!r:.60}, expected a number or [start, step, count]")
        if not 1 <= run[2] <= MAX_TIMESTEPS - len(numbers):
            raise ValueError(f"timesteps: got a run of {run[2]!r:.20}, expected at most {MAX_TIMESTEPS} in all")
        numbers += [run[0] + run[1] * index for index in range(run[2])]
    return numbers


def _run_lengths(numbers: Sequence[int | float]) -> list[int]:
    """For every place, how many numbers from there on are whole and evenly spaced."""
    lengths = [1] * len(numbers)
    for place in range(len(numbers) - 2, -1, -1):
        here, after = numbers[place], numbers[place + 1]
        if not (isinstance(here, int) and isinstance(after, int)):
            continue
        even = place + 2 < len(numbers) and numbers[place + 2] - after == after - here
        lengths[place] = lengths[place + 1] + 1 if even and lengths[place + 1] > 1 else 2
    return lengths


def _number(value: Any) -> bool:
    """Not NaN or Inf either; compared first, since an integer of 400 digits is no float at all."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _text(number: int | float) -> str:
    return repr(number)
