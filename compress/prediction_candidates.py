"""What a planner of predicted steps chooses among, at equal device time: candidates, and a bench that scores them.

In: measured times of a step of each kind, recorded segments to fit on and others held out, the deployed network. A
`Candidate` says target, mask policy, ladder, token choice, rectifier and grid; the `Bench` gives it as many computed
steps as the time allows, fits what is to be fitted and scores the held-out runs' final latents. It decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from latentrelay.compress.compensation_gate import Score, psnr_db
from latentrelay.compress.denoising_chain import Correction, final_latents
from latentrelay.compress.errors import PredictionError, ScheduleError, TrajectoryError
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.predicted_chain import Prediction, StagedDenoiser, predicted_chain
from latentrelay.compress.prediction import Target
from latentrelay.compress.rectifier import Steps, fit_rectifier
from latentrelay.compress.run_segments import Segment
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.step_schedule import uniform_mask
from latentrelay.compress.token_selection import Choice

Grid = Literal["nominal", "actual"]
_RAN_AWAY_DB = -999.0


class Policy(Protocol):
    """How a number of computed steps is spread over the steps `first` .. `last_excl` - 1."""

    def __call__(self, target: Target, first: int, last_excl: int, computed: int) -> tuple[str, ...]:
        """The mask, "full" | "predicted" a step, the first "full". ScheduleError where it has none."""
        ...


def uniform(target: Target, first: int, last_excl: int, computed: int) -> tuple[str, ...]:
    """Evenly, whatever the target."""
    return uniform_mask(first, last_excl, computed)


@dataclass(frozen=True)
class StepCosts:
    """Measured times of one step on the device, in ms: computed; predicted with the deep feature and the shallow path;
    predicted as a whole; and what a token's choice adds to either (probe and Gram form)."""

    full_ms: float
    deep_ms: float
    whole_ms: float
    choice_ms: float = 0.0

    def predicted_ms(self, target: Target, selects: bool = False) -> float:
        """Of one predicted step."""
        return (self.deep_ms if target == "deep_feature" else self.whole_ms) + (self.choice_ms if selects else 0.0)

    def computed_steps(self, target: Target, steps: int, speedup: float, selects: bool = False) -> int | None:
        """The most computed steps, 2 at least, with which `steps` steps take 1 / `speedup` of their computed time; None
        where there is no such number, or nothing would be left to predict."""
        predicted = self.predicted_ms(target, selects)
        if predicted >= self.full_ms:
            return None
        most = steps * (self.full_ms / speedup - predicted) / (self.full_ms - predicted)
        found = math.floor(most + 1e-9)
        return found if 2 <= found < steps else None

    def run_ms(self, mask: Sequence[str], target: Target, selects: bool = False) -> float:
        """Of a whole mask."""
        computed = sum(kind == "full" for kind in mask)
        return computed * self.full_ms + (len(mask) - computed) * self.predicted_ms(target, selects)


@dataclass(frozen=True)
class Candidate:
    """One way to predict: `metric` None takes the spec's one order for every token."""

    target: Target
    spec: LadderSpec = field(default_factory=lambda: LadderSpec((0,)))
    policy: str = "uniform"
    metric: Choice | None = None
    rectify: Steps | None = None
    grid: Grid | None = None

    def name(self, probe: str | None) -> str:
        """ "deep_feature dp tokens P1 l2 orders 0-1 + rectifier", say."""
        orders = "-".join(str(order) for order in self.spec.orders)
        choice = f"tokens {probe} {self.metric} orders {orders}" if self.metric else f"order {orders}"
        words = [self.target, self.policy, choice]
        words += [self.spec.abscissa] if self.spec.abscissa != "step" else []
        words += [self.spec.kind] if self.spec.kind != "backward" else []
        words += [f"horizon {self.spec.horizon}"] if self.spec.horizon else []
        words += [f"+ adjusted grid ({self.grid} timesteps)"] if self.grid else []
        words += ["+ rectifier"] if self.rectify else []
        words += ["on computed steps"] if self.rectify == "all" else []
        return " ".join(words)


@dataclass(eq=False)
class Bench:
    """What all candidates share. `held_out` and `fit` give the segments of a split; `grids` makes an adjusted table
    from a prediction, `on_grid` opens the network on it (both None: no adjusted grids). Scores are kept."""

    staged: StagedDenoiser
    table: SolverTable
    guidance: float
    costs: StepCosts
    speedup: float
    prediction_type: str
    fit: Callable[[int], tuple[Segment, ...]]
    held_out: Callable[[int], tuple[Segment, ...]]
    policies: Mapping[str, Policy]
    correction: Correction | None = None
    ladder_dtype: Literal["float32", "float16"] = "float32"
    grids: Callable[[Prediction, Grid], SolverTable] | None = None
    on_grid: Callable[[SolverTable], StagedDenoiser] | None = None
    _made: dict[tuple[Candidate, int], Prediction | None] = field(default_factory=dict)
    _scores: dict[tuple[Candidate, int], Score] = field(default_factory=dict)

    def at(self, speedup: float) -> Bench:
        """The same runs, network and policies for another time; nothing scored yet."""
        return replace(self, speedup=speedup, _made={}, _scores={})

    def prediction(self, candidate: Candidate, split: int) -> Prediction | None:
        """The candidate's for a split, fitted; None where the time leaves no room for it or a policy has no mask."""
        key = (candidate, split)
        if key not in self._made:
            self._made[key] = self._make(candidate, split)
        return self._made[key]

    def score(self, candidate: Candidate, split: int) -> Score | None:
        """Held-out PSNR of the final latents to the recorded float run's; None where there is no such prediction."""
        prediction = self.prediction(candidate, split)
        if prediction is None:
            return None
        key = (candidate, split)
        if key not in self._scores:
            self._scores[key] = self.measured(prediction)
        return self._scores[key]

    def measured(self, prediction: Prediction) -> Score:
        """The same of any prediction."""
        denoiser = self.staged
        if prediction.grid is not None and self.on_grid is not None:
            denoiser = self.on_grid(prediction.grid)
        found = []
        for run in self.held_out(prediction.split):
            steps = predicted_chain(denoiser, self.table, run.start, self.guidance, prediction, self.correction)
            try:
                found.append(psnr_db(run.latents[-1], final_latents(steps, run.start)))
            except TrajectoryError:  # it ran away to NaN: no candidate, and no reason to stop
                found.append(_RAN_AWAY_DB)
        return Score(np.array(found))

    def _make(self, candidate: Candidate, split: int) -> Prediction | None:
        num_steps, spec = len(self.table.rows), candidate.spec
        selects = candidate.metric is not None
        computed = self.costs.computed_steps(candidate.target, num_steps - split, self.speedup, selects)
        if computed is None or (candidate.grid is not None and (self.grids is None or self.on_grid is None)):
            return None
        try:
            mask = tuple(self.policies[candidate.policy](candidate.target, split, num_steps, computed))
            axis = spec.axis(self.table, self.prediction_type)
        except (ScheduleError, PredictionError):
            return None
        update, candidates = ladder_rows(mask, split, num_steps, spec, axis)
        if not selects and candidates.shape[1] > 1:
            raise PredictionError("one order for all tokens", got=spec, expected="one order and no horizon")
        prediction = Prediction(
            split, mask, candidate.target, update, candidates, candidate.metric, ladder_dtype=self.ladder_dtype
        )
        try:
            if candidate.grid is not None and self.grids is not None:
                return replace(prediction, grid=self.grids(prediction, candidate.grid))
            if candidate.rectify is None:
                return prediction
            return fit_rectifier(
                prediction, self.fit(split), self.staged, self.table, self.guidance, self.correction, candidate.rectify
            ).prediction
        except (ScheduleError, TrajectoryError):
            return None


def all_computed(bench: Bench, split: int) -> Prediction:
    """What every candidate is compared with in the end: no step predicted."""
    num_steps, mask = len(bench.table.rows), ("full",) * (len(bench.table.rows) - split)
    update, candidates = ladder_rows(mask, split, num_steps, LadderSpec((0,)), np.arange(num_steps, dtype=np.float64))
    return Prediction(split, mask, "whole_output", update, candidates)
