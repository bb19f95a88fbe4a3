"""Which steps of the device's part are predicted and how: decided on held-out runs, at equal device time.

In: recorded float runs to fit on and others held out, the deployed network with its cut points, the measured times of a
step of each kind and how many times faster the run shall be. Out: a `PredictionOutcome`. For each target the search
starts from the plainest rule, even steps and the last value held, and takes a part in (order, mask policy, adjusted
grid, choice per token, rectifier) only where held-out final latents come nearer to the float run's with 95 %
confidence; then the better target ships. Other splits get the same target, order and choice, and a mask and a
correction of their own where those gain there too; the hot level's are prediction_levels.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from latentrelay.compress.compensation_gate import Score
from latentrelay.compress.denoising_chain import Correction, Floats
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.predicted_chain import Prediction, StagedDenoiser
from latentrelay.compress.prediction import TARGETS, Target
from latentrelay.compress.prediction_candidates import Bench, Candidate, Grid, StepCosts, all_computed
from latentrelay.compress.prediction_evidence import parts_of
from latentrelay.compress.prediction_grid import adjusted_grid
from latentrelay.compress.prediction_levels import hot_level
from latentrelay.compress.prediction_masks import mask_policies
from latentrelay.compress.prediction_outcome import PredictionOutcome
from latentrelay.compress.prediction_search import Progress, Search, decibels, searched
from latentrelay.compress.run_segments import Segment, segments
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Trajectories

if TYPE_CHECKING:
    from latentrelay.compress.plan_prediction import MaskKey

__all__ = ["PredictionOutcome", "StepCosts", "plan_prediction"]


def plan_prediction(
    fit_runs: Trajectories,
    held_out: Trajectories,
    staged: StagedDenoiser,
    table: SolverTable,
    correction: Correction | None,
    costs: StepCosts,
    splits: Sequence[int],
    speedup: float,
    prediction_type: str,
    *,
    targets: Sequence[Target] | None = None,
    probe: str | None = "P1",
    scheduler: Any | None = None,
    ladder_dtype: Literal["float32", "float16"] = "float32",
    fallback_threshold: float | None = None,
    progress: Progress | None = None,
    hot_speedup: float | None = None,
) -> PredictionOutcome:
    """Search on the largest of `splits` that has room, then every split with the settings found, and again at
    `hot_speedup` where one is given.

    `staged` computes what ships; its probe is called `probe` (None: it has none, and no choice per token is tried).
    `scheduler` is the sampler's diffusers scheduler, for adjusted grids, which also need `staged.on_grid`; None tries
    none. `correction` is the compensation of computed and shallow steps. Raises PredictionError for recordings of
    different models, no splits and no runs, and a hot speedup not above `speedup`; where the speedup leaves no room the
    outcome predicts nothing and says so.
    """
    held_out.identity.require(fit_runs.identity.to_json(), "the held-out recording")
    if not splits or not all(0 <= split < len(table.rows) for split in splits):
        raise PredictionError("splits to predict for", got=list(splits), expected=f"some of 0..{len(table.rows) - 1}")
    if hot_speedup is not None and not hot_speedup > speedup:
        raise PredictionError("the hot level's speedup", got=hot_speedup, expected=f"above the normal one's {speedup}")
    guidance, say = fit_runs.identity.guidance, progress or (lambda words: None)
    on_grid = getattr(staged, "on_grid", None) if scheduler is not None else None

    def grid(prediction: Prediction, timesteps: Grid) -> SolverTable:
        runs = _with_outputs(fit_runs, prediction.split, table, guidance)
        return adjusted_grid(
            prediction, runs, staged, scheduler, table, timesteps, prediction_type, guidance, correction
        )

    bench = Bench(
        staged,
        table,
        guidance,
        costs,
        speedup,
        prediction_type,
        _by_split(fit_runs, table),
        _by_split(held_out, table),
        mask_policies(fit_runs, staged, table),
        correction,
        ladder_dtype,
        grid if on_grid is not None else None,
        on_grid,
    )
    at = _deciding(bench, splits, targets or TARGETS)
    found = [searched(bench, at, target, probe, say) for target in (targets or TARGETS)]
    return _outcome(
        bench, [each for each in found if each is not None], splits, at, probe, fallback_threshold, hot_speedup, say
    )


def _deciding(bench: Bench, splits: Sequence[int], targets: Sequence[Target]) -> int:
    """The largest split with room for a prediction, which most users will run from; the smallest where none has."""
    with_room = (
        split
        for split in sorted(splits, reverse=True)
        if any(bench.score(Candidate(target), split) is not None for target in targets)
    )
    return next(with_room, min(splits))


def _outcome(
    bench: Bench,
    searches: Sequence[Search],
    splits: Sequence[int],
    at: int,
    probe: str | None,
    fallback_threshold: float | None,
    hot_speedup: float | None,
    say: Progress,
) -> PredictionOutcome:
    report: dict[str, Any] = {"speedup": bench.speedup, "decided_at_split": at, "costs_ms": vars(bench.costs).copy()}
    ranked = _ranked(bench, searches, at)
    rows = [row for search in searches for row in search.rows]
    report |= {"held_out_runs": len(bench.held_out(at)), "candidates": rows, "splits": {}}
    if not ranked:
        why = f"nothing is predicted: {bench.speedup:g} times faster leaves fewer than 2 of {_left(bench, at)} steps"
        return PredictionOutcome({}, None, None, bench.table, (), report | {"why": why}, why)
    computed = bench.measured(all_computed(bench, at))
    report |= {"all_computed_psnr_db": decibels(computed.mean)}
    best = ranked[0].best
    predictions: dict[MaskKey, Prediction] = {}
    for split in sorted(set(splits)):
        shipped, line = _for_split(bench, best, split, say)
        if shipped is not None:
            predictions[split, "normal"] = shipped
            report["splits"][str(split)] = line
    winner = bench.score(best, at)
    why = f"{best.name(probe)}: {_mean(winner):.2f} dB to the float run over {report['held_out_runs']} held-out runs"
    for other in ranked[1:]:
        why += f", against {_mean(bench.score(other.best, at)):.2f} dB of {other.best.name(probe)} in the same time"
    why += f"; every step computed: {computed.mean:.2f} dB"
    left_out = sorted(set(splits) - {split for split, _ in predictions})
    hot = None
    if hot_speedup is not None:
        hot = hot_level(bench.at(hot_speedup), best, splits, predictions, probe, say)
        predictions |= hot.predictions
        report["hot"] = hot.report
        why += f"; {hot.words}"
    predictions = {key: replace(each, fallback_threshold=fallback_threshold) for key, each in predictions.items()}
    if left_out:
        why += f"; no room for predicted steps from split {', '.join(str(split) for split in left_out)}"
    report |= {"chosen": best.name(probe), "why": why}
    evidence = tuple(each for search in ranked for each in parts_of(search, best)) + (hot.evidence if hot else ())
    return PredictionOutcome(predictions, best, probe, bench.table, evidence, report, why)


def _ranked(bench: Bench, searches: Sequence[Search], at: int) -> list[Search]:
    """The better target first; the whole output, which keeps no feature and runs no layer, also where it is level."""
    ranked = sorted(searches, key=lambda search: -_mean(bench.score(search.best, at)))
    if len(ranked) > 1 and ranked[0].best.target != "whole_output":
        ahead, whole = bench.score(ranked[0].best, at), bench.score(ranked[1].best, at)
        if ahead is not None and whole is not None and not ahead.over(whole)[1] > 0.0:
            ranked.reverse()
    return ranked


def _for_split(bench: Bench, best: Candidate, split: int, say: Progress) -> tuple[Prediction | None, dict[str, Any]]:
    """The settings at one split: from even steps without correction, mask policy and correction are taken in again
    where they gain there. Target, order and choice per token are the same for all splits, since one graph holds them.
    """
    say(f"prediction: split {split}")
    chosen = replace(best, policy="uniform", rectify=None, grid=None)
    current = bench.score(chosen, split)
    if current is None:
        return None, {}
    line: dict[str, Any] = {"uniform_psnr_db": decibels(current.mean)}
    for part, wanted in (
        ("policy", replace(chosen, policy=best.policy)),
        ("corrected", replace(chosen, policy=best.policy, rectify=best.rectify, grid=best.grid)),
        ("corrected", replace(chosen, rectify=best.rectify, grid=best.grid)),
    ):
        found = bench.score(wanted, split)
        if wanted == chosen or found is None:
            continue
        gain = found.over(current)
        line[part] = line.get(part, False) or gain[1] > 0.0
        if gain[1] > 0.0:
            chosen, current = wanted, found
            line["gain_db"] = [decibels(value) for value in gain]
    prediction = bench.prediction(chosen, split)
    computed = bench.measured(all_computed(bench, split))
    mask = () if prediction is None else prediction.mask
    figures = {"psnr_db": decibels(current.mean), "all_computed_psnr_db": decibels(computed.mean)}
    return prediction, {"computed_steps": mask.count("full"), **figures, **line}


def _by_split(runs: Trajectories, table: SolverTable) -> Callable[[int], tuple[Segment, ...]]:
    """The segments of a split, read once."""
    kept: dict[int, tuple[Segment, ...]] = {}

    def at(split: int) -> tuple[Segment, ...]:
        if split not in kept:
            kept[split] = segments(runs, split, table, runs.identity.guidance)
        return kept[split]

    return at


def _with_outputs(
    runs: Trajectories, split: int, table: SolverTable, guidance: float
) -> Iterable[tuple[Segment, Floats]]:
    for run in runs:
        if run.split <= split:
            yield segments((run,), split, table, guidance)[0], run.noise_pred[split - run.split :]


def _left(bench: Bench, split: int) -> int:
    return len(bench.table.rows) - split


def _mean(score: Score | None) -> float:
    return float("-inf") if score is None else score.mean
