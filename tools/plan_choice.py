"""The choice: the Pareto frontier of rows, the goals, and the row with the least loss of quality that meets them.

In: rows and goals. Out: `Choice`, with the reason in words, the rows that cannot be told apart from it, or, where
nothing meets the goals, the nearest miss. A row without a measured quality is never on the frontier and is chosen only
where that was allowed and no measured row meets the goals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from latentrelay.tools.plan_rows import Row


@dataclass(frozen=True)
class Goals:
    """At most so many seconds and so much money a picture; None is no limit."""

    max_latency_s: float | None = None
    max_cost: float | None = None

    def excess(self, row: Row) -> float:
        """The row's worst share of a limit; at most 1 where it meets all."""
        shares = [0.0]
        if self.max_latency_s is not None:
            shares.append(_share(row.total_ms / 1e3, self.max_latency_s))
        if self.max_cost is not None and row.cost is not None:
            shares.append(_share(row.cost, self.max_cost))
        return max(shares)

    def words(self) -> str:
        """The goals for a reader."""
        said = []
        if self.max_latency_s is not None:
            said.append(f"a picture in {self.max_latency_s:g} s")
        if self.max_cost is not None:
            said.append(f"at most {self.max_cost:g} a picture")
        return " and ".join(said) or "no goal"


@dataclass(frozen=True)
class Choice:
    """What came of it. `chosen` None: nothing meets the goals, `nearest` comes nearest. `alike` are rows that meet them
    and whose accuracy cannot be told apart from the chosen one's: the fastest and the cheapest of those."""

    frontier: tuple[Row, ...]
    chosen: Row | None
    reason: str
    nearest: Row | None = None
    alike: tuple[Row, ...] = ()


def choose(rows: Sequence[Row], goals: Goals, *, unmeasured: bool = False) -> Choice:
    """Choose among the rows of one network."""
    measured = [row for row in rows if row.quality.known]
    front = frontier(measured)
    pool = [row for row in measured if goals.excess(row) <= 1]
    guessed = unmeasured and not pool
    if guessed:
        pool = [row for row in rows if goals.excess(row) <= 1]
    if not pool:
        return _missed(rows, measured, front, goals, unmeasured)
    chosen = min(pool, key=_order)
    if guessed:
        reason = f"no measured row meets {goals.words()}; of {len(pool)} unmeasured ones this is the fastest"
        return Choice(front, chosen, reason)
    alike = [row for row in pool if row is not chosen and _cannot_tell(row, chosen)]
    better = [min(alike, key=key) for key in (lambda row: row.total_ms, _money)] if alike else []
    gains = tuple(
        dict.fromkeys(row for row in better if row.total_ms < chosen.total_ms or _money(row) < _money(chosen))
    )
    return Choice(front, chosen, _reason(chosen, pool, goals), alike=gains)


def frontier(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Rows of which no other is at least as good in latency, cloud cost and loss and better in one; fastest first."""
    points = [(row, (row.total_ms, _money(row), row.quality.loss or 0.0)) for row in rows]
    kept = [row for row, mine in points if not any(_dominates(theirs, mine) for _, theirs in points)]
    return tuple(sorted(kept, key=lambda row: row.total_ms))


def _dominates(theirs: tuple[float, ...], mine: tuple[float, ...]) -> bool:
    return theirs != mine and all(left <= right for left, right in zip(theirs, mine, strict=True))


def _order(row: Row) -> tuple[float, float, float, float]:
    """Least loss first, then the cheaper, the faster; unmeasured rows by latency, the more computed first."""
    loss = math.inf if row.quality.loss is None else row.quality.loss
    return (loss, row.total_ms, 0.0, 0.0) if math.isinf(loss) else (loss, 0.0, _money(row), row.total_ms)


def _money(row: Row) -> float:
    """The cost, or the cloud's milliseconds where no price is known."""
    return row.cloud_ms if row.cost is None else row.cost


def _cannot_tell(row: Row, chosen: Row) -> bool:
    """Whether the two 95 % intervals overlap."""
    if row.quality.interval is None or chosen.quality.interval is None:
        return False
    (low, high), (other_low, other_high) = row.quality.interval, chosen.quality.interval
    return low <= other_high and other_low <= high


def _reason(chosen: Row, pool: Sequence[Row], goals: Goals) -> str:
    quality = chosen.quality
    return (
        f"of {len(pool)} measured rows that meet {goals.words()} it loses least: at most "
        f"{100 * (quality.loss or 0.0):.2f} points of attribute accuracy with 95 % confidence "
        f"({quality.label}, {quality.captions} captions)"
    )


def _missed(
    rows: Sequence[Row], measured: Sequence[Row], front: tuple[Row, ...], goals: Goals, unmeasured: bool
) -> Choice:
    nearest = min(rows if unmeasured else measured, key=goals.excess, default=None)
    hidden = sum(1 for row in rows if not row.quality.known and goals.excess(row) <= 1)
    said = f"no {'row' if unmeasured else 'measured row'} meets {goals.words()}"
    if nearest is not None:
        said += f"; the nearest takes {nearest.total_ms / 1e3:.3g} s"
        said += f" and costs {nearest.cost:.3g}" if nearest.cost is not None else ""
    elif rows:
        said += ", because none was measured"
    if hidden and not unmeasured:
        said += f"; {hidden} rows whose quality nobody measured would meet it (--unmeasured allows them)"
    return Choice(front, None, said, nearest)


def _share(value: float, limit: float) -> float:
    if limit > 0:
        return value / limit
    return 0.0 if value <= 0 else math.inf
