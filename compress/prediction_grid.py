"""An adjusted grid for a prediction: how far each predicted step should go, measured on recorded latents.

In: recorded runs, the deployed network, a `Prediction` and the scheduler. Out: a `SolverTable` (step_grid.py). What the
predicted steps give is taken teacher-forced: the ladders hold what the network computes on the recorded latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Correction, Floats, guided, solver_step
from latentrelay.compress.error_matrix import velocity
from latentrelay.compress.ladders import log_snr
from latentrelay.compress.predicted_chain import Prediction, RunState, StagedDenoiser, step_output
from latentrelay.compress.prediction_candidates import Grid
from latentrelay.compress.run_segments import Segment
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.step_grid import Computed, adjusted_table, step_factors

GRID_RUNS = 16


def adjusted_grid(
    prediction: Prediction,
    runs: Iterable[tuple[Segment, Floats]],
    staged: StagedDenoiser,
    scheduler: Any,
    table: SolverTable,
    timesteps: Grid,
    prediction_type: str,
    guidance: float,
    correction: Correction | None = None,
) -> SolverTable:
    """`runs`: segments of the split with their recorded noise predictions (n, 2, C, h, w), the first GRID_RUNS are
    used. Factors are measured on v, so an epsilon network's outputs are turned into it. Raises ScheduleError where a
    grid does not fall, PredictionError as the chain does."""
    num_steps, split = len(table.rows), prediction.split
    forecasts: dict[int, Floats] = {}
    epsilon = prediction_type == "epsilon"
    alphas = 1.0 / (1.0 + np.exp(-log_snr(table, prediction_type))) if epsilon else np.ones(num_steps)

    def as_velocity(noise_pred: Floats, latents: Floats, step: int) -> Floats:
        return velocity(noise_pred, latents, float(alphas[step])) if epsilon else noise_pred

    def recorded() -> Iterator[tuple[int, Floats]]:
        for count, (run, noise_pred) in enumerate(runs):
            if count == GRID_RUNS:
                return
            state = RunState(run.start.latents, run.start.x0_prev)
            for step in range(split, num_steps):
                state = replace(state, latents=run.latents[step - split])
                out = step_output(staged, prediction, state, step, run.start.prompt_embeds, correction)
                forecasts[step] = as_velocity(out.q, state.latents, step)
                e = guided(noise_pred[step - split], guidance)
                state = replace(out.state, x0_prev=solver_step(table.rows[step], state.latents, e, state.x0_prev)[1])
            true = [as_velocity(q, run.latents[i], split + i) for i, q in enumerate(noise_pred)]
            yield split, np.stack(true)

    def forecast(computed: Computed, step: int) -> Floats:
        return forecasts[step]

    factors = step_factors(recorded(), prediction.mask, split, num_steps, forecast)
    return adjusted_table(scheduler, num_steps, factors, split, num_steps, timesteps)
