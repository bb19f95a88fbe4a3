"""From rounds of load to the figures of the service benchmark: medians, ratios by round, what was lost or doubled.

In: `Round`s, each side's `Load` right after the other's. Out: the JSON object's figures. Ratios are taken within a
round, where both sides met the same machine, and their median is quoted with the lowest and the highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentrelay.tools.service_load import Load


@dataclass(frozen=True)
class Side:
    """One side of a round: its load, and the server's processor seconds and resident MiB (None where unknown)."""

    load: Load
    cpu_s: float | None
    rss_mib: float | None


@dataclass(frozen=True)
class Round:
    """Both sides in turn, and the bare loop's pictures a second at its best batch size."""

    ours: Side
    baseline: Side
    static_per_second: float | None = None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def latencies(loads: Sequence[Load]) -> list[float]:
    """Every answer's milliseconds."""
    return [answer.latency_ms for load in loads for answer in load.answers]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {
        "median": round(statistics.median(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
    }


def figures(rounds: Sequence[Round], threads: int) -> dict[str, Any]:
    """The figures of all rounds; the caller adds memory, overhead and the configuration."""
    ours, theirs = [each.ours.load for each in rounds], [each.baseline.load for each in rounds]
    ratios = [each.ours.load.per_second / each.baseline.load.per_second for each in rounds]
    tails = [_tail(each.ours.load) / _tail(each.baseline.load) for each in rounds]
    static = [each.ours.load.per_second / each.static_per_second for each in rounds if each.static_per_second]
    mine = latencies(ours)
    return {
        "throughput_ratio": round(statistics.median(ratios), 4),
        "throughput_ratio_spread": spread(ratios),
        "per_second": round(statistics.median(load.per_second for load in ours), 4),
        "baseline_per_second": round(statistics.median(load.per_second for load in theirs), 4),
        "p50_ms": round(percentile(mine, 0.5), 2),
        "p95_ms": round(percentile(mine, 0.95), 2),
        "baseline_p50_ms": round(percentile(latencies(theirs), 0.5), 2),
        "baseline_p95_ms": round(percentile(latencies(theirs), 0.95), 2),
        "p95_ratio": round(statistics.median(tails), 4),
        "p95_ratio_spread": spread(tails),
        "static_batch_ratio": round(statistics.median(static), 4) if static else None,
        "static_batch_ratio_spread": spread(static) if static else None,
        "answers": sum(len(load.answers) for load in ours),
        "baseline_answers": sum(len(load.answers) for load in theirs),
        "lost": sum(len(load.lost) for load in ours),
        "lost_reasons": sorted({reason for load in ours for reason in load.lost.values()})[:5],
        "baseline_lost": sum(len(load.lost) for load in theirs),
        "duplicated": duplicates(ours),
        "damaged": sum(load.damaged for load in ours),
        "refused": sum(load.refused for load in ours),
        "cpu_share": {
            "ours": _share([each.ours for each in rounds], threads),
            "baseline": _share([each.baseline for each in rounds], threads),
            "clients": round(_own([*ours, *theirs]) / (threads * sum(load.elapsed_s for load in [*ours, *theirs])), 5),
        },
    }


def duplicates(loads: Sequence[Load]) -> int:
    """Jobs and blobs that answered two different requests, over all rounds together."""
    whole = Load(0, answers=[answer for load in loads for answer in load.answers])
    return whole.duplicated


def _tail(load: Load) -> float:
    return percentile([answer.latency_ms for answer in load.answers], 0.95)


def _share(sides: Sequence[Side], threads: int) -> float | None:
    """Processor time over wall time x threads: far below 1 the server did not have the cores."""
    known = [(side.cpu_s, side.load.elapsed_s) for side in sides if side.cpu_s is not None]
    return round(sum(cpu for cpu, _ in known) / (threads * sum(wall for _, wall in known)), 4) if known else None


def _own(loads: Sequence[Load]) -> float:
    return sum(load.cpu_s for load in loads)
