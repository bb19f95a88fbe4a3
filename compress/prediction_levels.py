"""The hot level of predicted steps: for each split a second mask with fewer computed steps, for a device that is hot.

In: the bench at the hot level's speedup and what ships at the normal level. Out: a `Level`. Target, order and choice
per token are the normal level's, since one graph holds both; mask policy and rectifier are searched anew at each split:
what is worth nothing at half of the time may be worth decibels at a quarter. A part ships only where held-out runs
gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from latentrelay.compress.plan import Evidence
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.prediction_candidates import Bench, Candidate, all_computed
from latentrelay.compress.prediction_evidence import parts_of
from latentrelay.compress.prediction_search import Progress, Search, decibels

if TYPE_CHECKING:
    from latentrelay.compress.plan_prediction import MaskKey


@dataclass(frozen=True, eq=False)
class Level:
    """`predictions` by (split, "hot"); `report`: by split what ships and what was tried, or why there is none; the
    plan's `evidence`; `words` in a sentence."""

    predictions: Mapping[MaskKey, Prediction]
    report: Mapping[str, Any]
    evidence: tuple[Evidence, ...]
    words: str


def hot_level(
    bench: Bench,
    best: Candidate,
    splits: Sequence[int],
    normal: Mapping[MaskKey, Prediction],
    probe: str | None,
    say: Progress,
) -> Level:
    """Every split's hot mask at `bench`'s speedup, with the settings of `best`. A split whose mask would compute as
    many steps as its normal run has none."""
    found: dict[MaskKey, Prediction] = {}
    report: dict[str, Any] = {"speedup": bench.speedup, "splits": {}, "left_out": {}}
    evidence: list[Evidence] = []
    for split in sorted(set(splits)):
        say(f"prediction: hot level, split {split}")
        search = level_search(bench, best, split, probe, say)
        shipped = None if search is None else bench.prediction(search.best, split)
        usual = normal.get((split, "normal"))
        most = len(bench.table.rows) - split if usual is None else usual.mask.count("full")
        if search is None or shipped is None:
            report["left_out"][str(split)] = "the time leaves fewer than 2 computed steps, or no time for the others"
        elif shipped.mask.count("full") >= most:
            report["left_out"][str(split)] = f"computes {shipped.mask.count('full')} steps, and the normal run {most}"
        else:
            found[split, "hot"] = replace(shipped, level="hot")
            report["splits"][str(split)] = _line(bench, search, shipped)
            evidence += parts_of(search, search.best, f"hot from split {split}, ")
    return Level(found, report, tuple(evidence), _words(report))


def level_search(bench: Bench, best: Candidate, split: int, probe: str | None, say: Progress) -> Search | None:
    """From even steps without correction: mask policy, rectifier, mask policy again; an adjusted grid, which excludes
    the rectifier, where `best` has one. None where the time has no room."""
    search = Search(bench, split, probe, replace(best, policy="uniform", rectify=None, grid=None), say)
    plain = search.score(search.best)
    if plain is None:
        return None
    search.rows.append(search.row(search.best, plain, None, None))
    search.try_part("mask policy", _policies)
    masked = search.best
    search.try_part("rectifier", lambda now: [replace(now, rectify="predicted"), replace(now, rectify="all")])
    if search.best.rectify is not None:
        search.try_part("mask policy", _policies)
    if best.grid is not None:
        search.try_part("adjusted grid", lambda now: [replace(masked, grid=best.grid)])
    return search


def _policies(now: Candidate) -> list[Candidate]:
    return [replace(now, policy=policy) for policy in ("uniform", "threshold", "dp")]


def _line(bench: Bench, search: Search, shipped: Prediction) -> dict[str, Any]:
    """The report's of one split: what ships, how it does, and everything that was tried."""
    split = search.split
    current, plain = bench.score(search.best, split), bench.score(_plain(search.best), split)
    if current is None or plain is None:  # both were scored
        return {}
    return {
        "chosen": search.best.name(search.probe),
        "computed_steps": shipped.mask.count("full"),
        "psnr_db": decibels(current.mean),
        "all_computed_psnr_db": decibels(bench.measured(all_computed(bench, split)).mean),
        "uniform_psnr_db": decibels(plain.mean),
        "gain_db": [decibels(value) for value in current.over(plain)],
        "candidates": search.rows,
    }


def _plain(candidate: Candidate) -> Candidate:
    return replace(candidate, policy="uniform", rectify=None, grid=None)


def _words(report: Mapping[str, Any]) -> str:
    shipped = [
        f"{line['computed_steps']} computed from split {split}, {line['psnr_db']:.2f} dB"
        for split, line in report["splits"].items()
    ]
    left_out = [f"none from split {split} ({why})" for split, why in report["left_out"].items()]
    return f"hot, {report['speedup']:g} times faster: {', '.join(shipped + left_out)}"
