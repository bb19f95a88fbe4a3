"""How far each step's error moves the final latents: the recursion, its closed form, and what they predict.

A step `x' = a x + b e + c m`, `x0 = p x + q e` (m the memory, the x0 of the step before) whose e is off by `eps`, and
whose network answers a displacement d of its latents with `J d`, hands on the displacements
    d' = (a + b J) d + c m + b eps,    m' = (p + q J) d + q eps,
so the final one is the sum over steps of `gain_k eps_k`, gain_k = (1 0) T_{N-1} ... T_{k+1} (b_k, q_k)'. DDIM, Euler
and DPM-Solver++ of both orders are rows of this, of the second order with both past errors. J is a scalar a step,
measured through the network: a model of the true matrix, as good as `Prediction` shows. The setting is that of arXiv
2508.12094, of which this is no reproduction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Denoiser, Floats, chain, final_latents, guided
from latentrelay.compress.errors import CompensationError
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Trajectories
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Runs of one deployed network: mean squared final error as predicted from its errors on the float runs' own
    latents, and as measured, a number a run; `step_power` (N,) is the mean square of each step's guided error,
    `gains` (N,) what it is multiplied by (not squared)."""

    predicted: Doubles
    measured: Doubles
    step_power: Doubles
    gains: Doubles

    @property
    def step_shares(self) -> Doubles:
        """(N,) each step's share of the final error's power if steps' errors were independent; sums to 1."""
        power = np.square(self.gains) * self.step_power
        shares: Doubles = power / power.sum()
        return shares

    @property
    def bias_db(self) -> float:
        """How many dB of final error the prediction has too much (below 0: too little), mean over runs."""
        return float(np.mean(10.0 * np.log10(self.predicted / self.measured)))


def final_gains(table: SolverTable, jacobian: Sequence[float] | Doubles) -> Doubles:
    """Closed form: (N,) what a unit error of step k's e does to the final latents; jacobian (N,)."""
    _check(table, jacobian)
    gains, later = np.zeros(len(table.rows)), np.array([1.0, 0.0])  # `later`: a row vector, T_{N-1} ... T_{k+1}
    for step in reversed(range(len(table.rows))):
        row, j = table.rows[step], float(jacobian[step])
        gains[step] = later @ np.array([row.b, row.q])
        later = later @ np.array([[row.a + row.b * j, row.c], [row.p + row.q * j, 0.0]])
    return gains


def propagate(table: SolverTable, errors: NDArray[Any], jacobian: Sequence[float] | Doubles) -> Doubles:
    """The recursion: errors (N, ...) of e -> (N+1, ...), how far the latents are off before each step and last."""
    _check(table, jacobian)
    displaced, memory = np.zeros((len(table.rows) + 1, *errors.shape[1:])), np.zeros(errors.shape[1:])
    for step, row in enumerate(table.rows):
        d = displaced[step]
        answer = float(jacobian[step]) * d + errors[step]
        displaced[step + 1] = row.a * d + row.b * answer + row.c * memory
        memory = row.p * d + row.q * answer
    return displaced


def fit_jacobian(runs: Trajectories, network: Denoiser, deployed: Denoiser, table: SolverTable) -> Doubles:
    """(N,) per step the scalar that best says how guided e answers a displacement of the latents.

    `network` is the float one whose runs these are; the displacements are those that `deployed` really brings about,
    because a network answers noise and what quantisation leaves behind differently. Least squares over runs, two calls
    a step and run; steps without a displacement take the next step's value.
    """
    top, bottom = np.zeros(len(table.rows)), np.zeros(len(table.rows))
    for run in runs:
        steps = chain(deployed, table, run.start, runs.identity.guidance)
        for (step, latents, noise_pred), done in zip(run, steps, strict=True):
            moved: Floats = done.latents - latents
            if not moved.any():
                continue
            answer: Floats = network(done.latents, step, run.prompt_embeds) - noise_pred
            top[step] += float(np.sum(moved * guided(answer, runs.identity.guidance), dtype=np.float64))
            bottom[step] += float(np.sum(moved * moved, dtype=np.float64))
    if not bottom.any():
        raise CompensationError("there is nothing to measure on", got="no runs", expected="recorded runs")
    found = np.where(bottom > 0.0, top / np.where(bottom > 0.0, bottom, 1.0), np.nan)
    for step in reversed(range(len(found) - 1)):
        found[step] = found[step + 1] if np.isnan(found[step]) else found[step]
    return found


def predict(runs: Trajectories, deployed: Denoiser, table: SolverTable, jacobian: Doubles) -> Prediction:
    """Predicted and measured final error of a deployed network on float runs: two calls a step and run."""
    gains = final_gains(table, jacobian)
    power, seen = np.zeros(len(table.rows)), np.zeros(len(table.rows))
    predicted, measured = [], []
    for run in runs:
        moved = np.zeros(run.latents.shape[1:])
        for step, latents, noise_pred in run:
            error = guided(deployed(latents, step, run.prompt_embeds) - noise_pred, runs.identity.guidance)
            power[step] += float(np.mean(np.square(error, dtype=np.float64)))
            seen[step] += 1
            moved += gains[step] * error
        result = final_latents(chain(deployed, table, run.start, runs.identity.guidance), run.start)
        predicted.append(float(np.mean(np.square(moved))))
        measured.append(float(np.mean(np.square(result.astype(np.float64) - run.latents[-1]))))
    return Prediction(np.array(predicted), np.array(measured), power / np.maximum(seen, 1.0), gains)


def rank_steps(prediction: Prediction) -> tuple[int, ...]:
    """Steps by their share of the final error, the worst first."""
    return tuple(int(step) for step in np.argsort(-prediction.step_shares, kind="stable"))


def rank_layers(power: Mapping[str, Doubles], gains: Doubles) -> dict[str, float]:
    """Per layer the mean square of final error that its quantisation alone is predicted to add, the worst layer first.

    `power`: per layer (N,), the mean square of the guided error at each step with that layer alone quantised.
    """
    found = {name: float(np.sum(np.square(gains) * of_step)) for name, of_step in power.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _check(table: SolverTable, jacobian: Iterable[float] | Doubles) -> None:
    got = len(list(jacobian))
    if got != len(table.rows):
        raise CompensationError("one J a step", got=got, expected=len(table.rows), field="num_steps")
