"""The search for one target's predicted steps on one split: part after part, each only where held-out runs gain.

In: a `Bench`, which scores candidates at equal device time. Out: a `Search` with the best candidate found, a line for
every candidate tried and each part's best score beside the one that it was added to. The order is that of the methods:
order of the ladder, mask policy, choice per token, adjusted grid, rectifier; then order and mask again, rectified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from latentrelay.compress.compensation_gate import Score
from latentrelay.compress.ladders import LadderSpec
from latentrelay.compress.prediction import Target
from latentrelay.compress.prediction_candidates import Bench, Candidate

Progress = Callable[[str], None]
Variants = Callable[[Candidate], list[Candidate]]
_SINGLE = (
    LadderSpec((1,)),
    LadderSpec((1,), abscissa="logsnr"),
    LadderSpec((2,)),
    LadderSpec((2,), abscissa="logsnr", kind="newton"),
)
_CHOICES = (LadderSpec((0, 1)), LadderSpec((0, 1, 2), horizon=4))


@dataclass(eq=False)
class Search:
    """One target's, on one split: the best candidate so far, and what every part tried was worth."""

    bench: Bench
    split: int
    probe: str | None
    best: Candidate
    say: Progress
    rows: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, tuple[Score, Score, Candidate]] = field(default_factory=dict)

    def score(self, candidate: Candidate) -> Score | None:
        """Said aloud, since it may take a while."""
        self.say(f"prediction: split {self.split}, {candidate.name(self.probe)}")
        return self.bench.score(candidate, self.split)

    def try_part(self, part: str, variants: Variants) -> None:
        """Score every variant of the best; one that gains with confidence becomes the best, the first of equals."""
        base, current = self.best, self.bench.score(self.best, self.split)
        if current is None:
            return
        tried = [(each, found) for each in variants(base) if each != base and (found := self.score(each)) is not None]
        for each, found in tried:
            self.rows.append(self.row(each, found, base, current))
        fair = [(each, found) for each, found in tried if each.metric != "random"]
        if not fair:
            return
        sound = [(each, found) for each, found in fair if found.over(current)[1] > 0.0]
        chosen, found = max(sound or fair, key=lambda pair: pair[1].mean)
        if part not in self.parts or sound:
            self.parts[part] = (current, found, chosen)
        if sound:
            self.best = chosen

    def try_without(self, part: str, simpler: Candidate) -> None:
        """Take a part out again where, among all that came after it, it no longer gains with confidence."""
        current, without = self.bench.score(self.best, self.split), self.score(simpler)
        if current is None or without is None:
            return
        self.rows.append(self.row(simpler, without, None, None))
        self.parts[part] = (without, current, self.best)
        if not current.over(without)[1] > 0.0:
            self.best = simpler

    def row(self, candidate: Candidate, found: Score, base: Candidate | None, over: Score | None) -> dict[str, Any]:
        """A line of the report."""
        prediction = self.bench.prediction(candidate, self.split)
        mask = () if prediction is None else prediction.mask
        gain = None if over is None else [decibels(value) for value in found.over(over)]
        return {
            "name": candidate.name(self.probe),
            "psnr_db": decibels(found.mean),
            "extends": None if base is None else base.name(self.probe),
            "gain_db": gain,
            "computed_steps": mask.count("full"),
            "device_ms": round(self.bench.costs.run_ms(mask, candidate.target, candidate.metric is not None), 3),
            "mask": "".join("F" if kind == "full" else "p" for kind in mask),
        }


def searched(bench: Bench, split: int, target: Target, probe: str | None, say: Progress) -> Search | None:
    """One target's search; None where the time has no room for it."""
    search = Search(bench, split, probe, Candidate(target), say)
    plain = search.score(search.best)
    if plain is None:
        return None
    search.rows.append(search.row(search.best, plain, None, None))
    search.try_part("order above 0", lambda best: [replace(best, spec=spec) for spec in _SINGLE])
    search.try_part("mask policy", lambda best: [replace(best, policy=policy) for policy in ("threshold", "dp")])
    search.try_part("order above 0", lambda best: [replace(best, spec=spec) for spec in _others(best)])  # on that mask
    one_order = search.best.spec
    if probe is not None:
        search.try_part("choice per token", _choices)
    before_grid = search.best
    search.try_part("adjusted grid", lambda best: [replace(best, grid="nominal"), replace(best, grid="actual")])
    adjusted, search.best = search.best, before_grid
    search.try_part("rectifier", lambda best: [replace(best, rectify="predicted"), replace(best, rectify="all")])
    if search.best.rectify is not None:
        search.try_part("order above 0", lambda best: [replace(best, spec=s) for s in _others(best)])
        search.try_part("mask policy", lambda best: [replace(best, policy=p) for p in bench.policies])
        if search.best.metric is not None:
            search.try_without("choice per token", replace(search.best, spec=one_order, metric=None))
    if adjusted.grid is not None:  # grid and rectifier exclude each other: its aims are at the nominal noise levels
        search.try_part("adjusted grid over the rectifier", lambda best: [adjusted])
    return search


def _choices(best: Candidate) -> list[Candidate]:
    """Per token out of several orders, by both metrics; and any row, as a control."""
    found = [replace(best, spec=spec, metric=metric) for spec in _CHOICES for metric in ("l2", "cosine")]
    return [*found, replace(best, spec=_CHOICES[0], metric="random")]


def _others(best: Candidate) -> list[LadderSpec]:
    return [spec for spec in _SINGLE if spec != best.spec] if best.metric is None else []


def decibels(value: float) -> float:
    """For JSON: two digits, and a run that stopped being numbers as -999."""
    return round(min(max(value, -999.0), 999.0), 2)
