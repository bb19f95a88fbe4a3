"""Fewer steps of the same solver: its rows on some of a run's timesteps, or on a shorter grid from the split on.

In: a diffusers scheduler, N, the split, and the steps that are kept or how many there shall be. Out: a `SolverTable` of
the device's part alone; its first row reads the memory that crossed the wire, as the whole run's row does. What every
way of predicting steps has to beat.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from latentrelay.compress.solver_tables import SolverTable, _plain_number, _read_row, _use_double, check_supported
from latentrelay.runtime.errors import RequestError


def evenly(split: int, num_steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps `split` .. N-1, first and last among them, as evenly as whole numbers allow."""
    if not 2 <= count <= num_steps - split:
        raise RequestError("that many steps cannot be kept", got=count, expected=f"2..{num_steps - split}")
    return tuple(int(step) for step in np.unique(np.round(np.linspace(split, num_steps - 1, count)).astype(int)))


def kept_steps(scheduler: Any, num_steps: int, split: int, kept: Sequence[int]) -> SolverTable:
    """The solver on the timesteps of the steps `kept` (ascending, the first one `split`)."""
    probe = _set(scheduler, num_steps)
    chosen = [*range(split), *kept]
    return _rows(probe, probe.timesteps[chosen], probe.sigmas[chosen], split)


def natural_steps(scheduler: Any, num_steps: int, split: int, count: int) -> SolverTable:
    """`count` steps from the split's timestep down, evenly spaced in it: what a schedule of fewer steps looks like."""
    probe = _set(scheduler, num_steps)
    first, training = int(probe.timesteps[split]), scheduler.config.num_train_timesteps
    told = np.round(first * (1.0 - np.arange(count) / count)).astype(int).clip(0, training - 1)
    alphas = probe.alphas_cumprod[torch.from_numpy(told)]
    timesteps = torch.cat([probe.timesteps[:split], torch.from_numpy(told).to(probe.timesteps.dtype)])
    levels = torch.cat([probe.sigmas[:split], ((1 - alphas) / alphas).sqrt().to(probe.sigmas.dtype)])
    return _rows(probe, timesteps, levels, split)


def _set(scheduler: Any, num_steps: int) -> Any:
    check_supported(scheduler)
    if not hasattr(scheduler, "lambda_t"):
        raise RequestError(
            "fewer steps are made on DPM-Solver++'s grids",
            got=type(scheduler).__name__,
            expected="DPMSolverMultistepScheduler",
        )
    probe = copy.deepcopy(scheduler)
    probe.set_timesteps(num_steps)
    _use_double(probe)
    return probe


def _rows(probe: Any, timesteps: torch.Tensor, levels: torch.Tensor, split: int) -> SolverTable:
    probe.timesteps, probe.sigmas = timesteps, torch.cat([levels, probe.sigmas[-1:]])
    probe.num_inference_steps = len(timesteps)
    rows = tuple(_read_row(probe, step, at) for step, at in enumerate(timesteps))
    return SolverTable(rows[split:], tuple(_plain_number(at) for at in timesteps[split:]), 1.0)
