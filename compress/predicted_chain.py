"""The edge segment with predicted steps, in NumPy: what the two step graphs do, in their precision and order.

In: a `StagedDenoiser` (the network with its cut points), the solver's rows, where the run starts and one split's
`Prediction` (mask, ladder and candidate rows, rectifier). Out: one `PredictedStep` a step. Computed steps run the
network and push a stream on the ladder: the corrected output ("whole_output"), or the hidden state that enters the last
up block's last resnet ("deep_feature"). Predicted steps extrapolate that stream, and for the latter run the shallow
rest. float32; samplers that add noise are not for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from latentrelay.compress.denoising_chain import ChainStep, Correction, Denoiser, Floats, Start, guided, solver_step
from latentrelay.compress.errors import PredictionError, TrajectoryError
from latentrelay.compress.ladders import push
from latentrelay.compress.prediction import Doubles, Prediction
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.token_selection import combine, select
from numpy.typing import NDArray

__all__ = [
    "Output",
    "PredictedStep",
    "Prediction",
    "RunState",
    "Staged",
    "StagedDenoiser",
    "WholeOutput",
    "predicted_chain",
    "rectified",
    "regressor",
    "step_output",
]

FIXED_REGRESSORS = 3  # the other branch, the latents, the solver's memory; then two a rung from 1 on


@dataclass(frozen=True, eq=False)
class Staged:
    """One whole call: noise_pred (2, C, h, w), the predicted stream `feature` (2, Cf, hf, wf), `probe` (2, Cp, hp, wp)
    or None where nothing is selected. float32."""

    noise_pred: Floats
    feature: Floats
    probe: Floats | None


class StagedDenoiser(Protocol):
    """The network with its cut points. It scales its input by the row's `s` and looks the timestep up itself."""

    def full(self, latents: Floats, step: int, prompt_embeds: Floats) -> Staged:
        """latents (1, C, h, w), prompt_embeds (2, T, D) -> the whole network's output and its inner values."""
        ...

    def probe(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """The probe (2, Cp, hp, wp) alone."""
        ...

    def shallow(self, latents: Floats, step: int, prompt_embeds: Floats, feature: Floats) -> Floats:
        """noise_pred (2, C, h, w) from a given deep feature: the first and the last layers only."""
        ...


@dataclass(frozen=True, eq=False)
class WholeOutput:
    """Any `Denoiser` as a staged one whose predicted stream is its output; it has no probe and no shallow path."""

    denoiser: Denoiser

    def full(self, latents: Floats, step: int, prompt_embeds: Floats) -> Staged:
        """See `StagedDenoiser`."""
        noise_pred = self.denoiser(latents, step, prompt_embeds)
        return Staged(noise_pred, noise_pred, None)

    def probe(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """Raises PredictionError."""
        raise PredictionError("the whole output has no probe", expected="one candidate row a step")

    def shallow(self, latents: Floats, step: int, prompt_embeds: Floats, feature: Floats) -> Floats:
        """Raises PredictionError."""
        raise PredictionError("the whole output has no shallow path", expected='target "whole_output"')


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run stands before a step: latents and memory (1, C, h, w), ladders (M1, ...) once a step was computed."""

    latents: Floats
    x0_prev: Floats | None
    feature_ladder: NDArray[np.floating] | None = None
    probe_ladder: NDArray[np.floating] | None = None


@dataclass(frozen=True, eq=False)
class Output:
    """A step before its rectifier. `noise_pred` (2, C, h, w): what the network gave, or the prediction of the whole
    output; `q` the same corrected. `state` holds the ladders after the step. `choices` (P,) and `probe_error` where
    tokens chose; `fell_back`: a step of the mask's predictions that was computed after all."""

    noise_pred: Floats
    q: Floats
    state: RunState
    choices: NDArray[np.int64] | None = None
    probe_error: np.float32 | None = None
    fell_back: bool = False


@dataclass(frozen=True, eq=False)
class PredictedStep(ChainStep):
    """`ChainStep` (`noise_pred` as in `Output`), what kind of step it was, and how tokens chose."""

    kind: str
    choices: NDArray[np.int64] | None
    probe_error: np.float32 | None


def predicted_chain(
    denoiser: StagedDenoiser,
    table: SolverTable,
    start: Start,
    guidance: float,
    prediction: Prediction,
    correction: Correction | None = None,
    guidance_multiplier: Sequence[float] | Doubles | None = None,
) -> Iterator[PredictedStep]:
    """Steps `prediction.split` .. N-1 from a start at that split. With an adjusted grid its rows are the solver's; the
    `denoiser` must then have been opened with the same grid. Raises TrajectoryError as `chain` does, and
    PredictionError for a start at another split or a table of another length."""
    rows = (prediction.grid or table).rows
    if table.needs_noise:
        raise TrajectoryError("a chain in NumPy adds no noise", got="a sampler that does", expected="n = 0")
    if start.split != prediction.split or len(prediction.update) != len(table.rows):
        got, expected = (start.split, len(table.rows)), (prediction.split, len(prediction.update))
        raise PredictionError("the prediction is for another run: (split, steps)", got=got, expected=expected)
    state = RunState(start.latents, start.x0_prev)
    for step in range(start.split, len(rows)):
        out = step_output(denoiser, prediction, state, step, start.prompt_embeds, correction)
        q = out.q if out.fell_back else rectified(prediction, out.q, step, state)
        scale = guidance * (1.0 if guidance_multiplier is None else float(guidance_multiplier[step]))
        e = guided(q, scale)
        next_latents, x0 = solver_step(rows[step], state.latents, e, state.x0_prev)
        kind = "full" if out.fell_back else prediction.kind(step)
        yield PredictedStep(
            step,
            state.latents,
            state.x0_prev,
            out.noise_pred,
            e,
            next_latents,
            x0,
            kind,
            out.choices,
            out.probe_error,
        )
        state = replace(out.state, latents=next_latents, x0_prev=x0)


def step_output(
    denoiser: StagedDenoiser,
    prediction: Prediction,
    state: RunState,
    step: int,
    prompt_embeds: Floats,
    correction: Correction | None = None,
) -> Output:
    """Network or prediction, and the compensation: everything of a step before rectifier, guidance and solver. A
    fallback's step is computed without touching the ladders. Raises TrajectoryError where a network's output is not
    finite."""
    if prediction.kind(step) == "full":
        return _computed(denoiser, prediction, state, step, prompt_embeds, correction)
    index, choices, probe_error = _choice(denoiser, prediction, state, step, prompt_embeds)
    threshold = prediction.fallback_threshold
    if threshold is not None and probe_error is not None and probe_error > threshold:
        noise_pred = _finite(denoiser.full(state.latents, step, prompt_embeds).noise_pred, step)
        q = _corrected(noise_pred, correction, step, state)
        return Output(noise_pred, q, state, choices, probe_error, True)
    ladder = _ladder(state.feature_ladder, step)
    feature = combine(prediction.candidates[step], ladder, index)
    if prediction.target == "whole_output":
        return Output(feature, feature, state, choices, probe_error)
    noise_pred = _finite(denoiser.shallow(state.latents, step, prompt_embeds, feature), step)
    return Output(noise_pred, _corrected(noise_pred, correction, step, state), state, choices, probe_error)


def rectified(prediction: Prediction, q: Floats, step: int, state: RunState) -> Floats:
    """`(1 - gain) q - offset - mixing . regressors` in float32; a row of zeros returns q itself. `state`: what the step
    read (a predicted step's ladders are the last computed step's). A regressor whose coefficients are 0 is not read."""
    if prediction.gain is None or prediction.offset is None or prediction.mixing is None:
        return q
    gain, offset, mixing = (each[step] for each in (prediction.gain, prediction.offset, prediction.mixing))
    if not (gain.any() or offset.any() or mixing.any()):
        return q
    found: Floats = q * (1.0 - gain).astype(np.float32)[..., None, None] - offset.astype(np.float32)[..., None, None]
    row = mixing.astype(np.float32)[..., None, None]  # (2, 3 + 2 M, C, 1, 1)
    for j in range(row.shape[1]):
        if row[:, j].any():
            found = found - row[:, j] * regressor(j, q, state)
    return found


def regressor(index: int, q: Floats, state: RunState) -> Floats:
    """A rectifier's regressor as both branches read it, (2, C, h, w): the other branch, the latents, the memory (zeros
    where there is none), then per rung the branch's own and the other's."""
    if index == 0:
        other: Floats = q[::-1]
        return other
    if index < FIXED_REGRESSORS:
        value = state.latents if index == 1 else state.x0_prev
        return np.zeros_like(q) if value is None else np.concatenate([value, value])
    rung, others = divmod(index - FIXED_REGRESSORS, 2)
    if state.feature_ladder is None:
        return np.zeros_like(q)
    rungs: Floats = state.feature_ladder[1 + rung].astype(np.float32)
    return rungs[::-1] if others else rungs


def _computed(
    denoiser: StagedDenoiser,
    prediction: Prediction,
    state: RunState,
    step: int,
    prompt_embeds: Floats,
    correction: Correction | None,
) -> Output:
    staged = denoiser.full(state.latents, step, prompt_embeds)
    noise_pred = _finite(staged.noise_pred, step)
    q = _corrected(noise_pred, correction, step, state)
    stream = q if prediction.target == "whole_output" else staged.feature
    features = _pushed(prediction, state.feature_ladder, stream, step)
    probes = state.probe_ladder
    if prediction.selects:
        if staged.probe is None:
            raise PredictionError("tokens choose by a probe", got="a network without one", expected="its probe")
        probes = _pushed(prediction, probes, staged.probe, step)
    return Output(noise_pred, q, replace(state, feature_ladder=features, probe_ladder=probes))


def _pushed(prediction: Prediction, ladder: NDArray[np.floating] | None, y: Floats, step: int) -> NDArray[np.floating]:
    if ladder is None:
        ladder = np.zeros((prediction.rungs, *y.shape), dtype=prediction.ladder_dtype)
    return push(ladder, y, prediction.update[step])


def _choice(
    denoiser: StagedDenoiser, prediction: Prediction, state: RunState, step: int, prompt_embeds: Floats
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None, np.float32 | None]:
    """(each token's row, how often each row was chosen, the probe's error), all None with one row."""
    if not prediction.selects or prediction.metric is None:
        return None, None, None
    rows, ladder = prediction.candidates[step], _ladder(state.probe_ladder, step)
    if prediction.metric == "random":
        index = np.random.default_rng(step).integers(len(rows), size=(ladder.shape[1], *ladder.shape[3:]))
        return index, np.bincount(index.ravel(), minlength=len(rows)), None
    probe = denoiser.probe(state.latents, step, prompt_embeds)
    index, probe_error = select(rows, ladder, probe, prediction.metric)
    return index, np.bincount(index.ravel(), minlength=len(rows)), probe_error


def _corrected(noise_pred: Floats, correction: Correction | None, step: int, state: RunState) -> Floats:
    return noise_pred if correction is None else correction.apply(noise_pred, step, state.latents, state.x0_prev)


def _ladder(ladder: NDArray[np.floating] | None, step: int) -> NDArray[np.floating]:
    if ladder is None:
        raise PredictionError(f"step {step} is predicted", got="nothing computed yet", expected="a computed step first")
    return ladder


def _finite(noise_pred: Floats, step: int) -> Floats:
    bad = int(noise_pred.size - np.isfinite(noise_pred).sum())
    if bad:
        raise TrajectoryError(f"step {step}: the network gave {bad} values that are NaN or Inf", expected="numbers")
    return noise_pred
