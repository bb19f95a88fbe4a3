"""Our methods as the evaluation runs them: masks, ladders, choices and rectifiers fitted on recorded runs.

In: a `Lab`, recorded float runs of calibration captions, the diffusers scheduler. Out: `Predicted` methods by
`OurSettings`, and what the planner of a build would ship within a time (`planned`). Fits are kept by content, so that a
killed evaluation goes on. The fitting itself is compress/'s; nothing is decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from latentrelay.compress.error_matrix import error_matrix
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.prediction import Prediction, Target
from latentrelay.compress.rectifier import fit_rectifier
from latentrelay.compress.run_segments import Segment, segments
from latentrelay.compress.step_grid import Computed, adjusted_table, step_factors
from latentrelay.compress.step_schedule import optimal_mask, step_weights, uniform_mask
from latentrelay.compress.trajectory import Trajectories, Trajectory
from latentrelay.tools.accelerate_calibration import Seen, seen
from latentrelay.tools.accelerate_methods import Lab, Predicted
from latentrelay.tools.array_cache import ArrayCache, Arrays
from numpy.typing import NDArray

Floats = NDArray[Any]
NAMES: Mapping[Target, str] = {"whole_output": "whole output", "deep_feature": "deep feature"}
_TABLES = ("gain", "offset", "mixing")
_MAX_RUN = None  # a budget decides how long runs of predicted steps are


@dataclass(frozen=True)
class OurSettings:
    """One of ours. `computed` steps by a `policy` of masks ("uniform", or "dp": the dynamic programme over the error
    matrix); Taylor `orders` over `abscissa` and up to `horizon` steps back: where that is more than one row, each token
    chooses by the probe's L2; `rectifier` rows at predicted steps or all; `grid`: an adjusted one, and the timesteps
    that it tells."""

    target: Target
    computed: int
    policy: Literal["uniform", "dp"] = "uniform"
    orders: tuple[int, ...] = (1,)
    abscissa: Literal["step", "logsnr"] = "step"
    horizon: int = 0
    rectifier: Literal["predicted", "all"] | None = None
    grid: Literal["nominal", "actual"] | None = None

    def to_json(self) -> dict[str, Any]:
        """What a row's settings say: what is not the plain choice."""
        found = {key: value for key, value in asdict(self).items() if value is not None and key != "target"}
        return found | {"orders": list(self.orders)}


@dataclass(frozen=True, eq=False)
class Workshop:
    """What methods are made from. `record` gives the runs; it is called when the first fit needs them."""

    lab: Lab
    record: Callable[[], Trajectories]
    scheduler: Any
    cache: ArrayCache
    _seen: list[Seen] = field(default_factory=list)

    @cached_property
    def runs(self) -> Trajectories:
        """Float runs of calibration captions."""
        return self.record()

    @cached_property
    def made_from(self) -> Mapping[str, Any]:
        """What every fit depends on, as JSON."""
        correction = getattr(self.lab.correction, "tables", {})
        return {
            "network": self.lab.networks.digest,
            "correction": {name: sha256(table.tobytes()).hexdigest() for name, table in sorted(correction.items())},
            "runs": {**self.runs.identity.to_json(), "files": list(self.runs.files)},
            "split": self.lab.split,
            "guidance": self.lab.guidance,
        }

    def method(self, asked: OurSettings) -> Predicted:
        """Fitted where it has a rectifier."""
        prediction = self._prediction(asked)
        if asked.rectifier is not None:
            key = {**self.made_from, "settings": asdict(asked), "mask": list(prediction.mask)}
            tables = self.cache.get("rectifier", key, lambda: self._rectifier(prediction, asked))
            prediction = replace(prediction, gain=tables["gain"], offset=tables["offset"], mixing=tables["mixing"])
        return Predicted(NAMES[asked.target], asked.to_json(), self.lab, prediction)

    def mask(self, asked: OurSettings) -> tuple[str, ...]:
        """One entry a device step."""
        lab = self.lab
        if asked.policy == "uniform":
            return uniform_mask(lab.split, lab.num_steps, asked.computed)
        values, norms = self._errors(asked.target)
        weights = step_weights(lab.table, norms)
        return optimal_mask(values, lab.split, lab.num_steps, asked.computed, weights, _MAX_RUN)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The runs from the split on."""
        return segments(self.runs, self.lab.split, self.lab.table, self.lab.guidance)

    def seen(self, count: int) -> list[Seen]:
        """The first runs as threshold caches see them; they are kept in memory, not on disk."""
        if not self._seen:
            self._seen.extend(seen(self.lab, itertools.islice(self._reaching(), count)))
        return self._seen

    def _reaching(self) -> Iterator[Trajectory]:
        return (run for run in self.runs if run.split <= self.lab.split)

    def _prediction(self, asked: OurSettings) -> Prediction:
        lab, mask = self.lab, self.mask(asked)
        spec = LadderSpec(asked.orders, asked.abscissa, horizon=asked.horizon)
        axis = spec.axis(lab.table, self.scheduler.config.prediction_type)
        update, candidates = ladder_rows(mask, lab.split, lab.num_steps, spec, axis)
        metric: Literal["l2"] | None = "l2" if candidates.shape[1] > 1 else None
        grid = None
        if asked.grid is not None:
            factors = step_factors(self._outputs(), mask, lab.split, lab.num_steps, _FORECASTS[max(asked.orders)])
            grid = adjusted_table(
                self.scheduler, lab.num_steps, factors, lab.split, lab.num_steps, timesteps=asked.grid
            )
        return Prediction(lab.split, mask, asked.target, update, candidates, metric, grid=grid)

    def _rectifier(self, prediction: Prediction, asked: OurSettings) -> Arrays:
        lab = self.lab
        fitted = fit_rectifier(
            prediction,
            self.segments,
            lab.on(lab.table),
            lab.table,
            lab.guidance,
            lab.correction,
            asked.rectifier or "predicted",
        )
        tables = {name: getattr(fitted.prediction, name) for name in _TABLES}
        return {name: np.asarray(table) for name, table in tables.items()}

    def _errors(self, target: Target) -> tuple[Floats, Floats]:
        """E (N, N) and the norms of the outputs (N,)."""

        def make() -> Arrays:
            outputs = error_matrix(self._outputs(), self.lab.num_steps)
            streams = outputs if target == "whole_output" else error_matrix(self._features(), self.lab.num_steps)
            return {"values": streams.values, "norms": np.nan_to_num(outputs.norms)}

        found = self.cache.get("errors", {**self.made_from, "target": target}, make)
        return found["values"], found["norms"]

    def _outputs(self) -> Iterator[tuple[int, Floats]]:
        for run in self._reaching():
            yield run.split, run.noise_pred

    def _features(self) -> Iterator[tuple[int, Floats]]:
        view = self.lab.on(self.lab.table)
        for segment in self.segments:
            embeds = segment.start.prompt_embeds
            found = [
                view.full(segment.latents[i], step, embeds).feature for i, step in enumerate(self.lab.device_steps)
            ]
            yield self.lab.split, np.stack(found)


def _linear(computed: Computed, step: int) -> Floats:
    """The line through the last two computed outputs."""
    (at, now), *older = computed
    if not older:
        return now
    before, old = older[0]
    return now + (step - at) / (at - before) * (now - old)


def _last(computed: Computed, step: int) -> Floats:
    return computed[0][1]


_FORECASTS = {0: _last, 1: _linear, 2: _linear}
