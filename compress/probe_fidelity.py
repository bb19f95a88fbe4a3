"""How well a cheap probe tells which predictor a token should take, before any sampler is built on it.

In: recorded runs with the target feature and one or more probes of every step, (n, 2, C, h, w) on one grid of tokens,
and a mask's ladder and candidate rows. Out: a `Fidelity` a probe and metric: the rank correlation (Spearman) between a
candidate's error on the probe and its true error on the feature, over tokens and over candidates, and what choosing by
the probe leaves of the error beside the best fixed candidate, a random choice and the choice that knows the feature.
Measured on the undisturbed run: a sampler's own latents differ a little. In the spirit of TAP (arXiv 2603.03792), a
reconstruction; nothing here is deployed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.ladders import push
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
METRICS = ("l2", "cosine")
_TINY = 1e-20
_FEW = 32  # values that are ranked by comparing all pairs


@dataclass(frozen=True, eq=False)
class ProfiledRun:
    """One undisturbed run from `first_step` on: `feature` (n, 2, Cf, h, w), `probes` by name (n, 2, Cp, h, w)."""

    first_step: int
    feature: NDArray[np.float32]
    probes: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and the ends of its 95 % interval (normal, over runs; infinite for one run)."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of a number a run; runs that have none (NaN) are left out."""
        kept = np.array([value for value in values if not math.isnan(value)])
        if not kept.size:
            return cls(math.nan, math.nan, math.nan)
        half = 1.96 * float(kept.std(ddof=1)) / math.sqrt(kept.size) if kept.size > 1 else math.inf
        return cls(float(kept.mean()), float(kept.mean()) - half, float(kept.mean()) + half)


@dataclass(frozen=True)
class Fidelity:
    """One probe and metric, over runs, guidance branches and predicted steps.

    `across_tokens`: Spearman over tokens, a candidate at a time: does the probe know where prediction is hard?
    `across_candidates`: Spearman over candidates, a token at a time: does it know which candidate to take? Where all
    tokens agree on that, a fixed candidate does as well, hence `preferences`: Spearman over tokens of a candidate's
    error beside the others' (log error less its mean over candidates): does it know which tokens differ? `chosen`,
    `best_fixed`, `random`, `oracle`: squares that the prediction leaves over the feature's own, with tokens choosing by
    the probe, the one candidate row that is best over the runs at each step, a random row, and the best row of every
    token. `found_best`: share of tokens whose choice is the best row; 1 / candidates is chance.
    """

    probe: str
    metric: str
    candidates: int
    across_tokens: Estimate
    across_candidates: Estimate
    preferences: Estimate
    found_best: Estimate
    chosen: Estimate
    best_fixed: Estimate
    random: Estimate
    oracle: Estimate

    def to_json(self) -> dict[str, Any]:
        """A plain mapping; numbers that there are not are null."""
        return {
            name: {key: _finite(number) for key, number in value.items()} if isinstance(value, dict) else value
            for name, value in asdict(self).items()
        }


def probe_fidelity(
    runs: Iterable[ProfiledRun],
    mask: Sequence[str],
    split: int,
    update: Doubles,
    candidates: Doubles,
    probes: Sequence[str],
    metrics: Sequence[str] = METRICS,
) -> list[Fidelity]:
    """Every probe with every metric. `mask` of the steps split..N-1; `update` (N, M1, 1 + M1) and `candidates` (N, P,
    M1) as ladders.py makes them. Runs that begin after the split are left out. Raises ScheduleError for no runs, a
    probe that a run lacks, and a probe on another grid than the feature's.
    """
    rows = [_Rows(probe, metric) for probe in probes for metric in metrics]
    count = 0
    for run in runs:
        if run.first_step > split:
            continue
        count += 1
        predicted = dict(_errors(run, "", mask, split, update, candidates))
        for name in probes:
            if name not in run.probes or run.probes[name].shape[3:] != run.feature.shape[3:]:
                got = run.probes[name].shape[3:] if name in run.probes else sorted(run.probes)
                raise ScheduleError(f"probe {name}", got=got, expected=f"a map of {run.feature.shape[3:]} tokens")
            guessed = dict(_errors(run, name, mask, split, update, candidates))
            for row in rows:
                if row.probe == name:
                    row.add({step: (guessed[step][row.metric], predicted[step]["l2"]) for step in predicted}, run)
    if not count:
        raise ScheduleError("there is nothing to profile", got="no runs", expected=f"runs from step {split} or before")
    return [row.result() for row in rows]


_BY_RUN = ("across_tokens", "across_candidates", "preferences", "found_best", "chosen", "random", "oracle")


class _Rows:
    """What one probe and metric gathers of each run."""

    def __init__(self, probe: str, metric: str) -> None:
        self.probe, self.metric = probe, metric
        self._numbers: dict[str, list[float]] = {}
        self._fixed: list[dict[int, tuple[Doubles, float]]] = []  # a run: step -> squares (P,), the feature's own
        self._width = 1

    def add(self, errors: Mapping[int, tuple[Doubles, Doubles]], run: ProfiledRun) -> None:
        """`errors`: step -> the candidates' errors (P, 2, tokens) on the probe and on the feature."""
        found: dict[str, list[float]] = {}
        fixed, left = {}, np.zeros(3)
        for step, (guess, true) in errors.items():
            feature = run.feature[step - run.first_step].astype(np.float64)
            fixed[step] = (true.sum(axis=(1, 2)), float(np.square(feature).sum()))
            choice = guess.argmin(axis=0)
            chosen = np.take_along_axis(true, choice[None], axis=0)[0]
            left += (chosen.sum(), true.mean(axis=0).sum(), true.min(axis=0).sum())
            found.setdefault("across_tokens", []).append(float(_spearman(guess, true, axis=2).mean()))
            if len(true) > 1:
                found.setdefault("across_candidates", []).append(float(_spearman(guess, true, axis=0).mean()))
                found.setdefault("found_best", []).append(float((choice == true.argmin(axis=0)).mean()))
                sides = (_beside_others(guess), _beside_others(true))
                found.setdefault("preferences", []).append(float(_spearman(*sides, axis=2).mean()))
            self._width = max(self._width, len(true))
        total = max(sum(own for _, own in fixed.values()), _TINY)
        for name, value in zip(("chosen", "random", "oracle"), left / total, strict=True):
            found[name] = [float(value)]
        for name in _BY_RUN:
            values = found.get(name, [])
            self._numbers.setdefault(name, []).append(float(np.mean(values)) if values else math.nan)
        self._fixed.append(fixed)

    def result(self) -> Fidelity:
        """Over all runs."""
        every = {name: Estimate.of(values) for name, values in self._numbers.items()}
        best = {step: int(sum(run[step][0] for run in self._fixed).argmin()) for step in self._fixed[0]}  # type: ignore[union-attr]
        fixed = [
            sum(run[step][0][row] for step, row in best.items()) / max(sum(own for _, own in run.values()), _TINY)
            for run in self._fixed
        ]
        return Fidelity(
            self.probe, self.metric, self._width, best_fixed=Estimate.of([float(each) for each in fixed]), **every
        )


def _errors(
    run: ProfiledRun, probe: str, mask: Sequence[str], split: int, update: Doubles, candidates: Doubles
) -> Iterable[tuple[int, dict[str, Doubles]]]:
    """(step, by metric the errors (P, 2, tokens) of its distinct candidates) of every predicted step; probe "" is the
    feature itself."""
    stream = run.probes[probe] if probe else run.feature
    ladder: NDArray[Any] = np.zeros((update.shape[1], *stream.shape[1:]), np.float32)
    for step, kind in enumerate(mask, start=split):
        now = stream[step - run.first_step].astype(np.float32)
        if kind == "full":
            ladder = push(ladder, now, update[step])
            continue
        squares, angles, own = [], [], now.astype(np.float64)
        for row in np.unique(candidates[step], axis=0):
            guess = np.einsum("o,o...->...", row, ladder.astype(np.float64))
            squares.append(np.square(guess - own).sum(axis=1))
            norms = np.square(guess).sum(axis=1) * np.square(own).sum(axis=1)
            angles.append(1.0 - (guess * own).sum(axis=1) / np.sqrt(np.maximum(norms, _TINY)))
        shape = (len(squares), len(now), -1)
        yield step, {"l2": np.stack(squares).reshape(shape), "cosine": np.stack(angles).reshape(shape)}


def _beside_others(errors: Doubles) -> Doubles:
    logs = np.log(np.maximum(errors, _TINY))
    result: Doubles = logs - logs.mean(axis=0)
    return result


def _spearman(left: Doubles, right: Doubles, axis: int) -> Doubles:
    """Rank correlation along an axis; equal values share their mean rank. NaN where one side is constant: 0 then."""
    a, b = (_ranks(np.moveaxis(each, axis, -1)) for each in (left, right))
    a, b = (each - each.mean(axis=-1, keepdims=True) for each in (a, b))
    below = np.sqrt(np.square(a).sum(axis=-1) * np.square(b).sum(axis=-1))
    found: Doubles = np.where(below > 0, (a * b).sum(axis=-1) / np.where(below > 0, below, 1.0), 0.0)
    return found


def _ranks(values: Doubles) -> Doubles:
    """Along the last axis; equal values share their mean rank."""
    if values.shape[-1] <= _FEW:
        one, other = values[..., :, None], values[..., None, :]
        few: Doubles = ((other < one).sum(axis=-1) + (other <= one).sum(axis=-1)) / 2.0
        return few
    flat = values.reshape(-1, values.shape[-1])
    ranks = np.empty_like(flat)
    for i, (row, known) in enumerate(zip(flat, np.sort(flat, axis=-1), strict=True)):
        ranks[i] = (np.searchsorted(known, row, "left") + np.searchsorted(known, row, "right")) / 2.0
    return ranks.reshape(values.shape)


def _finite(number: Any) -> Any:
    return None if isinstance(number, float) and not math.isfinite(number) else number
