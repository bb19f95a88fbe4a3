"""Verdicts of an evaluation of accelerated runs: the frontier at equal device times, and what each part contributes.

In: results by method, costs by kind of call. Out: rows, `frontier` and `ablation` as JSON. Comparisons are paired by
caption; intervals are bootstrap 95 % ones of the mean difference in dB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from latentrelay.tools.accelerate_runs import Doubles, Result
from latentrelay.tools.evaluate import bootstrap_interval
from latentrelay.tools.picture_scores import summary

Reference = Literal["uncached", "float"]
PLANNED = "planned"  # what a build ships, among results


def row(result: Result, whole: Result, costs: Mapping[str, float], renderings: Any) -> dict[str, Any]:
    """One row of the table. `whole` is the uncached run."""
    figures = summary(result.scored, whole.scored, renderings)
    milliseconds = result.device_ms(costs)
    exact = result.float_psnr_db
    return {
        "method": result.name,
        "settings": dict(result.settings),
        "label": result.label,
        "ours": result.ours,
        "device_ms": round(milliseconds, 3),
        "time_share": round(milliseconds / whole.device_ms(costs), 4),
        "computed_steps": round(result.computed, 2),
        "psnr_db": float(result.psnr_db.mean()),
        "psnr_db_95": list(bootstrap_interval(result.psnr_db.tolist())),
        "psnr_db_to_float": None if exact is None else float(exact.mean()),
        "picture_psnr_db": figures.pop("psnr_db"),
        **figures,
    }


def frontier(
    results: Sequence[Result],
    whole: Result,
    costs: Mapping[str, float],
    shares: Sequence[float],
    to: Reference = "uncached",
) -> list[dict[str, Any]]:
    """At each share of the uncached segment's time: ours, the best rival, and who is ahead, by PSNR `to` the bundle's
    own uncached run or to the float network's.

    Ours is what the planner ships for that time, decided on other captions (where its time here comes out a little
    longer, the rivals have that long too); where nothing was planned, the best of ours on these. The rival is the best
    on these captions, which favours it: the interval does not count the picking.
    """
    found, full = [], whole.device_ms(costs)
    for share in shares:
        planned = [each for each in results if each.name == PLANNED and each.settings.get("share") == share]
        limit = max([share * full, *(each.device_ms(costs) for each in planned)])
        within = [each for each in results if each.device_ms(costs) <= limit]
        ours = _best(planned or [each for each in within if each.ours], to)
        rivals = _best([each for each in within if not each.ours], to)
        picked = "by the planner, on other captions" if planned else "the best on these captions"
        entry: dict[str, Any] = {"share": share, "device_ms": round(limit, 3), "ours_picked": picked}
        for side, best in (("ours", ours), ("rival", rivals)):
            entry[side] = None if best is None else best.label
            entry[f"{side}_psnr_db"] = None if best is None else float(_psnr(best, to).mean())
            entry[f"{side}_device_ms"] = None if best is None else round(best.device_ms(costs), 3)
        entry |= _compared(ours, rivals, to)
        found.append(entry)
    return found


def _compared(ours: Result | None, rival: Result | None, to: Reference) -> dict[str, Any]:
    if ours is None or rival is None:
        return {"gain_db": None, "gain_db_95": None, "verdict": "only one side has a method within this time"}
    gain = paired(ours, rival, to)
    verdict = {"kept": "ours ahead", "dropped": "rival ahead"}.get(gain.pop("verdict"), "tied within the interval")
    return {**gain, "verdict": verdict}


def paired(with_it: Result, without_it: Result, to: Reference = "uncached") -> dict[str, Any]:
    """Mean gain in dB, its interval, and whether the part is kept (above 0), dropped (below) or makes no difference."""
    gains = (_psnr(with_it, to) - _psnr(without_it, to)).tolist()
    low, high = bootstrap_interval(gains)
    verdict = "kept" if low > 0.0 else "dropped" if high < 0.0 else "no difference"
    return {"gain_db": float(sum(gains) / len(gains)), "gain_db_95": [low, high], "verdict": verdict}


def _best(results: Sequence[Result], to: Reference) -> Result | None:
    return max(results, key=lambda each: float(_psnr(each, to).mean()), default=None)


def _psnr(result: Result, to: Reference) -> Doubles:
    """(captions,); to the float run where the bundle's network is another."""
    return result.psnr_db if to == "uncached" or result.float_psnr_db is None else result.float_psnr_db
