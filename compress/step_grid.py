"""An adjusted grid of noise levels around predicted steps, and the solver's rows on it: one factor a predicted step.

In: outputs v of recorded runs and a mask. Out: phi (N,), the share of its nominal length that a predicted step should
go; tau (N+1,), the grid that follows, which keeps the segment's first and last level; and a `SolverTable` read off
diffusers' scheduler on that grid. The step-size part of ERTACache (arXiv 2508.21091), a reconstruction: where a
reused output is far from the true one the step is cut short and the computed steps after it take over what is left.
Levels are sigma = sqrt((1 - alpha_cumprod) / alpha_cumprod), in which DDIM is Euler's method. With phi = 1 everywhere
the table is the nominal one, bit for bit. Whether any of it helps is for a gate to find out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from latentrelay.compress.errors import ScheduleError, UnsupportedSchedulerError
from latentrelay.compress.solver_tables import SolverTable, prepared, read_rows, solver_table
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Floats = NDArray[Any]
Computed = Sequence[tuple[int, Floats]]  # (step, its output (B, C, h, w)) of the computed steps so far, the last first
PHI_MIN = 0.7
_BY_SIGMAS = ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler")


def reused(computed: Computed, step: int) -> Floats:
    """The plainest forecast: the output of the last computed step."""
    return computed[0][1]


def step_factors(
    runs: Iterable[tuple[int, Floats]],
    mask: Sequence[str],
    split: int,
    num_steps: int,
    forecast: Callable[[Computed, int], Floats] = reused,
    denominator: Literal["norm", "change"] = "norm",
    phi_min: float = PHI_MIN,
) -> Doubles:
    """phi (N,): clip(1 - mean ||v~_i - v_i||_1 / max(mean DEN_i, 1e-6), phi_min, 1) at predicted steps, 1 elsewhere.

    `runs` as in `error_matrix`: (first step, true outputs (n, B, C, h, w) to the end), of a v prediction or of the v
    that an epsilon prediction amounts to; those that begin after the split are left out. `mask` is the split's.
    `denominator` "norm" takes ||v_i||_1. "change" is what is printed in the sources, ||v_i - v_{i-1}||_1, and kept to
    show why not: the first reused step after a computed one has v~_i = v_{i-1}, so that its factor is 0 whatever v is,
    which is "do not move". Raises ScheduleError for no runs and a mask that is not the split's.
    """
    if split + len(mask) != num_steps or not mask or mask[0] != "full":
        expected = f"{num_steps - split} entries, the first full"
        raise ScheduleError("mask", got=f"{len(mask)} entries", expected=expected)
    wrong, size, count = np.zeros(num_steps), np.zeros(num_steps), 0
    for first, outputs in runs:
        if first > split:
            continue
        if first + len(outputs) != num_steps:
            raise ScheduleError("a run's steps", got=f"{first}..{first + len(outputs)}", expected=f"to {num_steps}")
        count += 1
        computed: list[tuple[int, Floats]] = []
        for step in range(split, num_steps):
            true = outputs[step - first].astype(np.float64)
            if mask[step - split] == "full":
                computed.insert(0, (step, true))
                continue
            before = outputs[step - first - 1].astype(np.float64)
            wrong[step] += np.abs(forecast(computed, step) - true).sum()
            size[step] += np.abs(true if denominator == "norm" else true - before).sum()
    if not count:
        raise ScheduleError("there is nothing to fit on", got="no runs", expected=f"runs from step {split} or before")
    quotient = (wrong / count) / np.maximum(size / count, 1e-6)
    factors: Doubles = np.where(_predicted(mask, split, num_steps), np.clip(1.0 - quotient, phi_min, 1.0), 1.0)
    return factors


def adjusted_sigmas(sigmas: Doubles, factors: Doubles, first: int, last_excl: int) -> Doubles:
    """tau (N+1,) from nominal levels (N+1,) and phi (N,) of the segment `first` .. `last_excl` - 1.

    rho_i = (tau_i - s_end) / (sigma_i - s_end), tau_{i+1} = tau_i - rho_i (sigma_i - sigma_{i+1}) phi_i, with s_end =
    sigmas[last_excl]: 0 on the device, the handoff's level in the cloud. Levels outside the segment and both of its
    ends stay as they are; where every factor is 1 so does the rest, bit for bit. Raises ScheduleError for levels or a
    result that do not fall strictly, and for a last step with a factor (it has to reach s_end).
    """
    if sigmas.shape != (len(factors) + 1,) or not 0 <= first < last_excl <= len(factors):
        raise ScheduleError("segment", got=f"{first}..{last_excl}, {sigmas.shape}", expected=f"({len(factors)} + 1,)")
    if not np.isfinite(sigmas[first : last_excl + 1]).all():
        do = "Let the segment begin at a step whose alpha_cumprod is not 0."
        raise ScheduleError("the segment's levels", got=sigmas[first], expected="finite numbers", do=do)
    if factors[last_excl - 1] != 1.0:
        raise ScheduleError("the segment's last step", got=factors[last_excl - 1], expected="1: it is computed")
    tau, end = sigmas.copy(), sigmas[last_excl]
    for i in range(first, last_excl - 1):
        if tau[i] == sigmas[i] and factors[i] == 1.0:
            continue  # what rounding would make of the nominal level
        rho = (tau[i] - end) / (sigmas[i] - end)
        tau[i + 1] = tau[i] - rho * (sigmas[i] - sigmas[i + 1]) * factors[i]
    within = tau[first : last_excl + 1]
    if not (np.diff(within) < 0).all():
        raise ScheduleError("the adjusted grid does not fall strictly", got=[float(f"{x:.4g}") for x in within])
    return tau


def nominal_sigmas(scheduler: Any, num_steps: int) -> Doubles:
    """(N+1,) the levels of a diffusers scheduler's own run, in double; inf where alpha_cumprod is 0."""
    return _levels(prepared(scheduler, num_steps))


def adjusted_table(
    scheduler: Any,
    num_steps: int,
    factors: Doubles,
    first: int,
    last_excl: int,
    timesteps: Literal["nominal", "actual"] = "nominal",
) -> SolverTable:
    """The solver's rows on the adjusted grid, for DPM-Solver++ of both orders, Euler and DDIM.

    `timesteps` says what the network is told: the nominal step's timestep, or that of the adjusted level, read off the
    training schedule (log sigma, linear, so a fraction). Rows and timesteps before `first` are the nominal ones; all
    are where every factor is 1. The scheduler is left as it was. Raises UnsupportedSchedulerError and ScheduleError.
    """
    nominal = solver_table(scheduler, num_steps)
    if np.all(factors == 1.0):
        return nominal
    name = type(scheduler).__name__
    if name not in (*_BY_SIGMAS, "DDIMScheduler"):
        expected = " | ".join((*_BY_SIGMAS, "DDIMScheduler"))
        raise UnsupportedSchedulerError("scheduler class of an adjusted grid", got=name, expected=expected)
    probe = prepared(scheduler, num_steps)
    sigmas = _levels(probe)
    tau = adjusted_sigmas(sigmas, np.asarray(factors, np.float64), first, last_excl)
    told = [
        at if timesteps == "nominal" or tau[i] == sigmas[i] else _timestep(probe, tau[i])
        for i, at in enumerate(nominal.timesteps)
    ]
    if name == "DDIMScheduler":
        _ddim_on(probe, tau, sigmas)
    else:
        probe.sigmas = torch.from_numpy(tau)
    moved = np.concatenate([[False], tau != sigmas])
    rows = tuple(  # a row reads the levels before, at and after its step
        row if moved[i : i + 3].any() else nominal.rows[i] for i, row in enumerate(read_rows(probe))
    )
    return SolverTable(rows, tuple(told), nominal.init_noise_sigma)


def _predicted(mask: Sequence[str], split: int, num_steps: int) -> NDArray[np.bool_]:
    found = np.zeros(num_steps, dtype=bool)
    found[split:] = [kind == "predicted" for kind in mask]
    return found


def _levels(probe: Any) -> Doubles:
    """(N+1,) sigma of a prepared scheduler's steps and of what the last one ends at."""
    if hasattr(probe, "sigmas"):
        levels: Doubles = probe.sigmas.double().numpy().copy()
        return levels
    last = probe.timesteps[-1] - probe.config.num_train_timesteps // probe.num_inference_steps
    end = probe.alphas_cumprod[last] if last >= 0 else probe.final_alpha_cumprod
    alphas = np.append(probe.alphas_cumprod[probe.timesteps].numpy(), float(end))
    with np.errstate(divide="ignore"):
        result: Doubles = np.sqrt((1.0 - alphas) / alphas)
    return result


def _timestep(probe: Any, sigma: float) -> float:
    """The timestep of a level: log sigma, linear between those of the training schedule."""
    alphas = probe.alphas_cumprod.double().numpy()
    with np.errstate(divide="ignore"):
        trained = 0.5 * np.log((1.0 - alphas) / alphas)
    return float(np.interp(np.log(sigma), trained, np.arange(len(trained))))


def _ddim_on(probe: Any, tau: Doubles, sigmas: Doubles) -> None:
    """DDIM looks its levels up by timestep, one spacing apart: so it gets a training schedule of the run's N levels."""
    n = len(tau) - 1
    own = probe.alphas_cumprod[probe.timesteps].numpy()
    alphas = np.where(tau[:-1] == sigmas[:-1], own, 1.0 / (1.0 + np.square(tau[:-1])))
    if tau[-1] != sigmas[-1]:
        raise ScheduleError("the grid's end", got=tau[-1], expected=sigmas[-1])
    last = probe.timesteps[-1] - probe.config.num_train_timesteps // probe.num_inference_steps
    probe.final_alpha_cumprod = probe.alphas_cumprod[last] if last >= 0 else probe.final_alpha_cumprod
    probe.alphas_cumprod = torch.from_numpy(alphas[::-1].copy())
    probe.register_to_config(num_train_timesteps=n)
    probe.num_inference_steps = n
    probe.timesteps = torch.arange(n - 1, -1, -1)
