"""Rows in turn: every round runs each row once, in an order that moves on by one, and medians are taken over rounds.

Out: `Timed` per row. What else the machine does falls on all rows alike, so the ratio of two rows is taken within each
round and the median of those ratios is what to quote.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from latentrelay.tools.bench_worker import Lap, Worker

PAUSE_S = 0.05  # lets the thread pool of the row before go to sleep
QUIET = 0.8  # of the threads' time, as in time_graphs.py


@dataclass(frozen=True)
class Timed:
    """One row's rounds."""

    laps: tuple[Lap, ...]

    @property
    def rounds_ms(self) -> list[float]:
        """Wall ms by round."""
        return [lap.ms for lap in self.laps]

    @property
    def median_ms(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds_ms)

    @property
    def spread_ms(self) -> float:
        """Slowest less fastest."""
        return max(self.rounds_ms) - min(self.rounds_ms)

    @property
    def cpu_share(self) -> float:
        """Median over rounds of processor time / (wall time x threads): far below 1 the cores were not free."""
        return statistics.median(lap.cpu_share for lap in self.laps)


def interleave(
    workers: Sequence[Worker], rounds: int, tick: Callable[[int, str], None]
) -> tuple[dict[str, Timed], dict[str, str]]:
    """`rounds` of every worker in turn: what was timed, and why a row dropped out. `tick(round, row)` before each."""
    laps: dict[str, list[Lap]] = {worker.row.name: [] for worker in workers}
    gone: dict[str, str] = {}
    for turn in range(rounds):
        first = turn % max(1, len(workers))
        for worker in [*workers[first:], *workers[:first]]:
            name = worker.row.name
            if name in gone:
                continue
            tick(turn, name)
            time.sleep(PAUSE_S)
            lap = worker.lap()
            if isinstance(lap, Lap):
                laps[name].append(lap)
            else:
                gone[name] = lap
    return {name: Timed(tuple(each)) for name, each in laps.items() if name not in gone}, gone


def times_faster(timed: Mapping[str, Timed], row: str, against: str) -> float | None:
    """How many times faster `row` is than `against`: the median of the ratios within each round."""
    if row not in timed or against not in timed:
        return None
    pairs = zip(timed[against].rounds_ms, timed[row].rounds_ms, strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)
