"""The rectifier: rows that take a run with predicted steps back to the float run's latents, fitted in closed loop.

In: segments of recorded float runs, the deployed network and a `Prediction`. All runs advance together through it; at
each step the guided output that takes the states they have there to the recorded next latents is the target, and what
the guided output is off by is regressed, a channel at a time, on what the step graph holds anyway: both branches, the
latents, the solver's memory, 1, and at predicted steps of the whole output the ladder's differences. Out: the same
prediction with `gain`, `offset` and `mixing`. The affine rectifier of ERTACache (arXiv 2508.21091) with more columns
and fitted step after step on the rectified run; a reconstruction. Whether it pays is prediction_gate.py's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from latentrelay.compress.compensate import wanted
from latentrelay.compress.compensation_rows import MAX_SHRINKAGE
from latentrelay.compress.denoising_chain import Correction, Floats, guided, solver_step
from latentrelay.compress.error_moments import Doubles, damped_least_squares
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.predicted_chain import (
    Output,
    Prediction,
    RunState,
    StagedDenoiser,
    rectified,
    step_output,
)
from latentrelay.compress.run_segments import Segment
from latentrelay.compress.solver_tables import SolverTable

Steps = Literal["predicted", "all"]
Progress = Callable[[str], None]
_LEAST_POWER = 1e-12
RIDGE = 3e-3  # predicted steps make latents and memory nearly dependent: 1e-4 can run away, 1e-3 .. 1e-2 are alike
_FIXED = 5  # unconditional, direction, latents, memory, one; then (unconditional, direction) of every rung from 1 on


@dataclass(frozen=True, eq=False)
class Fitted:
    """The rectified prediction, and per step of the whole run the mean square of what the guided output was off by
    before and after its row, relative to its own power (NaN where no row was fitted)."""

    prediction: Prediction
    error_before: Doubles
    error_after: Doubles


def fit_rectifier(
    prediction: Prediction,
    runs: Sequence[Segment],
    denoiser: StagedDenoiser,
    table: SolverTable,
    guidance: float,
    correction: Correction | None = None,
    steps: Steps = "predicted",
    guidance_multiplier: Sequence[float] | Doubles | None = None,
    ridge: float = RIDGE,
) -> Fitted:
    """Rows at predicted steps, or with "all" at computed ones too; each run counts by the inverse of what it is off by,
    because dB are averaged over runs. `ridge` is relative to each column's own power. `prediction` is not modified; a
    rectifier that it has is fitted anew. Raises PredictionError for no runs, and for an adjusted grid: its latents are
    at other noise levels than the recorded."""
    if not runs:
        raise PredictionError("there is nothing to fit a rectifier on", got="no runs", expected="recorded runs")
    if prediction.grid is not None:
        raise PredictionError("a rectifier aims at recorded latents", got="an adjusted grid", expected="the run's own")
    num_steps, channels = len(table.rows), runs[0].start.latents.shape[1]
    gain, offset = np.zeros((2, num_steps, 2, channels))
    mixing = np.zeros((num_steps, 2, 1 + 2 * prediction.rungs, channels))
    result = replace(prediction, gain=gain, offset=offset, mixing=mixing)  # filled step by step below
    before, after = np.full((2, num_steps), np.nan)
    states = [RunState(run.start.latents, run.start.x0_prev) for run in runs]
    for step in range(prediction.split, num_steps):
        embeds = (run.start.prompt_embeds for run in runs)
        outputs = [
            step_output(denoiser, result, state, step, states_of, correction)
            for state, states_of in zip(states, embeds, strict=True)
        ]
        scale = guidance * (1.0 if guidance_multiplier is None else float(guidance_multiplier[step]))
        if steps == "all" or result.kind(step) == "predicted":
            aims = [
                wanted(table.rows[step], state.latents, state.x0_prev, run.after(step))
                for state, run in zip(states, runs, strict=True)
            ]
            differences = result.target == "whole_output" and result.kind(step) == "predicted"
            columns = [
                _columns(out.q, state, table, step, result.rungs if differences else 1)
                for out, state in zip(outputs, states, strict=True)
            ]
            errors = [guided(out.q, scale) - aim for out, aim in zip(outputs, aims, strict=True)]
            coefficients = _regress(columns, errors, ridge)
            gain[step], offset[step], mixing[step] = branch_rows(coefficients, scale, result.rungs)
            left = [
                guided(rectified(result, out.q, step, state), scale) - aim
                for out, state, aim in zip(outputs, states, aims, strict=True)
            ]
            before[step], after[step] = _relative(errors, aims), _relative(left, aims)
        states = [_advanced(result, out, state, step, table, scale) for out, state in zip(outputs, states, strict=True)]
    return Fitted(result, before, after)


def branch_rows(coefficients: Doubles, guidance: float, rungs: int) -> tuple[Doubles, Doubles, Doubles]:
    """What the guided error's regression (R, C) subtracts from the two branches: gain, offset (2, C), mixing
    (2, 1 + 2 rungs, C). R: unconditional, direction, latents, memory, one, then both of every rung from 1 on.

    All goes to the unconditional branch and so through to the conditional one, but for what the guidance direction and
    its differences explain: that is taken from the direction, divided by the scale (compensation_rows.closed_row).
    """
    padded = np.zeros((_FIXED + 2 * (rungs - 1), coefficients.shape[1]))
    padded[: len(coefficients)] = coefficients
    unconditional, direction, latents, memory, one = padded[:_FIXED]
    shrinkage = np.clip(direction / guidance, -MAX_SHRINKAGE, MAX_SHRINKAGE)
    gain, offset = np.stack([unconditional, shrinkage]), np.stack([one, one])
    mixing = np.zeros((2, 1 + 2 * rungs, coefficients.shape[1]))
    mixing[1, 0] = unconditional - shrinkage  # the conditional branch is u + d, d = c - u
    mixing[:, 1], mixing[:, 2] = latents, memory
    for rung in range(rungs - 1):
        own, share = padded[_FIXED + 2 * rung], padded[_FIXED + 2 * rung + 1] / guidance
        mixing[0, 3 + 2 * rung] = own
        mixing[1, 3 + 2 * rung], mixing[1, 4 + 2 * rung] = share, own - share
    return gain, offset, mixing


def _columns(q: Floats, state: RunState, table: SolverTable, step: int, rungs: int) -> Floats:
    """(R, C, h, w), see `branch_rows`. The memory is zeros where the step graph has none: R must not depend on it."""
    u, c, x = q[0], q[1], state.latents[0]
    unread = state.x0_prev is None or not table.needs_x0_prev or step == 0
    memory = np.zeros_like(x) if unread or state.x0_prev is None else state.x0_prev[0]
    found = [u, c - u, x, memory, np.ones_like(u)]
    for rung in range(1, rungs):
        both = np.zeros_like(q) if state.feature_ladder is None else state.feature_ladder[rung].astype(np.float32)
        found += [both[0], both[1] - both[0]]
    return np.stack(found)


def _regress(columns: Sequence[Floats], errors: Sequence[Floats], ridge: float) -> Doubles:
    """(R, C): least squares of all runs' guided errors (1, C, h, w), in float64."""
    size, channels = columns[0].shape[:2]
    gram, products = np.zeros((channels, size, size)), np.zeros((channels, size))
    for each, error in zip(columns, errors, strict=True):
        weight = 1.0 / max(float(np.mean(np.square(error, dtype=np.float64))), _LEAST_POWER)
        x = each.astype(np.float64).reshape(size, channels, -1).transpose(1, 0, 2)  # (C, R, pixels)
        gram += weight * x @ x.transpose(0, 2, 1)
        products += weight * (x @ error[0].astype(np.float64).reshape(channels, -1, 1))[..., 0]
    return damped_least_squares(gram, products, ridge).T


def _advanced(
    prediction: Prediction, out: Output, state: RunState, step: int, table: SolverTable, guidance: float
) -> RunState:
    """The state after the step, its ladders those of the output."""
    e = guided(out.q if out.fell_back else rectified(prediction, out.q, step, state), guidance)
    latents, x0 = solver_step(table.rows[step], state.latents, e, state.x0_prev)
    return replace(out.state, latents=latents, x0_prev=x0)


def _relative(errors: Sequence[Floats], aims: Sequence[Floats]) -> float:
    squares = [
        float(np.mean(np.square(e)) / max(np.mean(np.square(a)), _LEAST_POWER))
        for e, a in zip(errors, aims, strict=True)
    ]
    return float(np.mean(squares))
