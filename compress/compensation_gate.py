"""What of a compensation ships: only what brings held-out final latents nearer to the float run's.

In: candidates fitted on other prompts, and held-out float runs. Each is run through the deployed network from the same
starts; the measure is PSNR of the final latents (peak max |float|), paired by run. `compensate` is the whole procedure:
rivals and open-loop rows, row gate, closed-loop rows at the end, and the candidate that is best on held-out runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from latentrelay.compress.compensate import Compensation, advance, fit, fit_closed_loop, measure, none
from latentrelay.compress.compensation_rows import Method, branch_corrections
from latentrelay.compress.denoising_chain import Correction, Denoiser, Floats, Start, chain, final_latents
from latentrelay.compress.error_moments import Doubles, Moments, guided_squares
from latentrelay.compress.errors import CompensationError
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Trajectories

Progress = Callable[[str], None]
TAIL_STEPS = (1, 2, 4)  # how many last steps are tried in closed loop
RIVALS = ("ptqd", "gain")  # scored, never shipped
LEAST_GAIN_DB = 0.1  # what a larger form must gain over a smaller one


@dataclass(frozen=True, eq=False)
class Score:
    """PSNR in dB of the final latents to the float run's, a number a run."""

    psnr_db: Doubles

    @property
    def mean(self) -> float:
        """Over the runs."""
        return float(self.psnr_db.mean())

    def over(self, other: Score) -> tuple[float, float, float]:
        """Mean paired gain in dB over `other`, and the ends of its 95 % interval (normal, over runs)."""
        gains = self.psnr_db - other.psnr_db
        half = 1.96 * float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
        return float(gains.mean()), float(gains.mean()) - half, float(gains.mean()) + half


@dataclass(frozen=True, eq=False)
class Outcome:
    """The compensation that ships (method "none" where no candidate paid), every candidate and its held-out score."""

    kept: Compensation
    name: str
    scores: Mapping[str, Score]
    candidates: Mapping[str, Compensation]

    @property
    def gain_db(self) -> tuple[float, float, float]:
        """What the kept one gains over no compensation, with its interval."""
        return self.scores[self.name].over(self.scores["none"])


def psnr_db(reference: Floats, got: Floats) -> float:
    """10 log10(max |reference|^2 / mean squared error), 200 at most, -inf where `got` is not finite."""
    if not np.isfinite(got).all():
        return -math.inf
    error = float(np.mean(np.square(got.astype(np.float64) - reference)))
    peak = float(np.abs(reference).max())
    return min(200.0, 10.0 * math.log10(peak * peak / error)) if error > 0.0 else 200.0


def score(
    runs: Trajectories,
    denoiser: Denoiser,
    table: SolverTable,
    correction: Correction | None,
    starts: Sequence[Start] | None = None,
) -> Score:
    """Run every start to its end. `starts`: where each run stands already, by default where it was recorded from."""
    found = []
    for i, run in enumerate(runs):
        start = run.start if starts is None else starts[i]
        steps = chain(denoiser, table, start, runs.identity.guidance, correction)
        found.append(psnr_db(run.latents[-1], final_latents(steps, start)))
    return Score(np.array(found))


def gate_rows(compensation: Compensation, held_out: Moments, guidance: float) -> Compensation:
    """Rows that do not lower the held-out guided error become 0, as do rows without held-out samples."""
    kept = []
    for step in compensation.rows:
        correction = branch_corrections(
            compensation.gain[step], compensation.offset[step], compensation.mixing_row(step)
        )
        left = guided_squares(held_out.sums[step], guidance, correction).sum()
        without = guided_squares(held_out.sums[step], guidance, np.zeros_like(correction)).sum()
        if held_out.runs[step] and left < without:
            kept.append(step)
    return compensation.only(kept)


def compensate(
    fit_runs: Trajectories,
    held_out: Trajectories,
    denoiser: Denoiser,
    table: SolverTable,
    progress: Progress | None = None,
) -> Outcome:
    """Fit on `fit_runs`, decide on `held_out`. Raises CompensationError where their identities differ."""
    say = progress or (lambda words: None)
    held_out.identity.require(fit_runs.identity.to_json(), "the held-out recording", CompensationError)
    identity = fit_runs.identity
    say(f"compensation: the deployed network on {len(fit_runs)} float runs")
    moments = measure(fit_runs, denoiser, table)
    say(f"compensation: the same on {len(held_out)} held-out runs")
    held = measure(held_out, denoiser, table)
    plain = none(identity, table.timesteps, moments.sums.shape[1])
    candidates: dict[str, Compensation] = {"none": plain}
    for method in ("ptqd", "gain", "affine"):
        candidates[method] = gate_rows(fit(moments, method, identity, table), held, identity.guidance)
    scores: dict[str, Score] = {}
    for name, candidate in candidates.items():
        say(f"compensation: held-out runs with {name}")
        scores[name] = score(held_out, denoiser, table, candidate if candidate.rows else None)
    bases = ["none", *(["affine"] if scores["affine"].mean > scores["none"].mean else [])]
    for base in bases:
        for name, candidate in _tails(candidates[base], base, fit_runs, held_out, denoiser, table, scores, say).items():
            candidates[name] = candidate
    best = _choice(scores, candidates)
    return Outcome(candidates[best], best, scores, candidates)


def _tails(
    base: Compensation,
    name: str,
    fit_runs: Trajectories,
    held_out: Trajectories,
    denoiser: Denoiser,
    table: SolverTable,
    scores: dict[str, Score],
    say: Progress,
) -> dict[str, Compensation]:
    """Closed-loop rows over `base`, for every number of last steps; their scores go into `scores`."""
    found: dict[str, Compensation] = {}
    guidance, last = fit_runs.identity.guidance, len(table.rows)
    counts = [count for count in TAIL_STEPS if count <= last]
    earliest = last - max(counts)
    starts = [advance(run, earliest, denoiser, table, guidance, base) for run in held_out]
    forms: tuple[Method, ...] = ("affine", "joint")
    for form in forms:
        for count in counts if form == "joint" else counts[:1]:
            label = f"{name} + closed {form} {count}"
            say(f"compensation: closed loop, {form}, the last {count} over {name}")
            found[label] = fit_closed_loop(base, fit_runs, denoiser, table, last - count, form)
            scores[label] = score(held_out, denoiser, table, found[label], starts)
    return found


def _choice(scores: Mapping[str, Score], candidates: Mapping[str, Compensation]) -> str:
    """The best whose gain is above 0 with 95 % confidence, or one of fewer rows within LEAST_GAIN_DB of it; else none.

    A run that lands on another picture moves the mean by decibels, so a mean alone would let chance ship. The rivals
    are there to be compared with.
    """
    sound = [name for name in scores if name not in RIVALS and scores[name].over(scores["none"])[1] > 0.0]
    if not sound:
        return "none"
    best = max(scores[name].mean for name in sound)
    near = [name for name in sound if best - scores[name].mean < LEAST_GAIN_DB]
    return min(near, key=lambda name: (len(candidates[name].rows), -scores[name].mean))
