"""Solver tables: one row (a, b, c, n, p, q, s) per step, read off diffusers' own `scheduler.step` by unit inputs.

With the network fed `s x`, its output `e` (after guidance) and the solver's memory `x0_prev`, one step of any supported
sampler is `x' = a x + b e + c x0_prev + n noise` with `x0 = p x + q e`; `x0` becomes the next step's memory. Only
LCM's n is not 0; its x0 includes the boundary scalings c_skip and c_out (arXiv 2310.04378, section 4.1). Rows are
float64 as far as diffusers allows: its sigmas and alphas are float32 tables, and what follows from them is computed in
double here (`step` itself casts the sample to float32, which is exact for unit inputs). Not a solver of its own: what
diffusers does is the definition, and a step that is not linear in these is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import astuple, dataclass
from typing import Any

import torch
from latentrelay.compress.errors import UnsupportedSchedulerError

# Lanes of the probe: x alone, e alone, memory alone, nothing (catches noise), and a mixture (catches non-linearity).
_X = (1.0, 0.0, 0.0, 0.0, 3.0)
_E = (0.0, 1.0, 0.0, 0.0, -2.0)
_MEMORY = (0.0, 0.0, 1.0, 0.0, 5.0)

_EXPECTED: dict[str, dict[str, tuple[object, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (1, 2),
        "thresholding": (False,),
        "prediction_type": ("epsilon", "v_prediction"),
        "use_flow_sigmas": (False, None),
        "variance_type": (None, "fixed_small", "fixed_large"),
    },
    "DDIMScheduler": {
        "clip_sample": (False,),
        "thresholding": (False,),
        "prediction_type": ("epsilon", "v_prediction"),
    },
    "EulerDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "LCMScheduler": {
        "clip_sample": (False,),
        "thresholding": (False,),
        "prediction_type": ("epsilon", "v_prediction"),
    },
}


@dataclass(frozen=True)
class SolverRow:
    """One step: `x' = a x + b e + c x0_prev + n noise`, `x0 = p x + q e`, network input `s x`."""

    a: float
    b: float
    c: float
    n: float
    p: float
    q: float
    s: float


@dataclass(frozen=True)
class SolverTable:
    """The rows of a whole run and what the run starts from.

    `timesteps[i]` is what the network is told at step i (0..999, float for samplers that interpolate);
    the first sample is `init_noise_sigma` times standard normal noise.
    """

    rows: tuple[SolverRow, ...]
    timesteps: tuple[int | float, ...]
    init_noise_sigma: float

    @property
    def needs_x0_prev(self) -> bool:
        """Whether any step reads the memory."""
        return any(row.c != 0.0 for row in self.rows)

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds noise of its own."""
        return any(row.n != 0.0 for row in self.rows)


def solver_table(scheduler: Any, num_steps: int) -> SolverTable:
    """Read the table of `num_steps` steps off a diffusers scheduler, which is left as it was.

    Supported: DPMSolverMultistepScheduler (dpmsolver++, order 1 or 2), DDIMScheduler (eta 0), EulerDiscreteScheduler,
    LCMScheduler; epsilon and v prediction. Raises UnsupportedSchedulerError naming the class or the setting otherwise.
    """
    probe = prepared(scheduler, num_steps)
    timesteps = tuple(_plain_number(timestep) for timestep in probe.timesteps)
    return SolverTable(read_rows(probe), timesteps, float(probe.init_noise_sigma))


def prepared(scheduler: Any, num_steps: int) -> Any:
    """A copy of a supported scheduler with its run of `num_steps` steps set and its tables in double."""
    check_supported(scheduler)
    if num_steps < 1:
        raise UnsupportedSchedulerError("num_steps", got=num_steps, expected="at least 1")
    probe = copy.deepcopy(scheduler)
    try:
        probe.set_timesteps(num_steps)
    except ValueError as error:  # LCM has no more steps than its training schedule had
        raise UnsupportedSchedulerError("num_steps", got=num_steps, expected=str(error)) from error
    _use_double(probe)
    return probe


def read_rows(probe: Any) -> tuple[SolverRow, ...]:
    """The rows of a prepared scheduler, which has stepped through its run afterwards; its tables may be others' own."""
    return tuple(_read_row(probe, step, timestep) for step, timestep in enumerate(probe.timesteps))


def check_supported(scheduler: Any) -> None:
    """Raise UnsupportedSchedulerError for a class or a setting that has no table."""
    name = type(scheduler).__name__
    if name not in _EXPECTED:
        raise UnsupportedSchedulerError("scheduler class", got=name, expected=" | ".join(_EXPECTED))
    for setting, allowed in _EXPECTED[name].items():
        got = scheduler.config.get(setting)
        if got not in allowed:
            raise UnsupportedSchedulerError(setting, got=got, expected=allowed[0] if len(allowed) == 1 else allowed)


def _use_double(probe: Any) -> None:
    for table in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        values = getattr(probe, table, None)
        if isinstance(values, torch.Tensor):
            setattr(probe, table, values.double())


def _read_row(probe: Any, step: int, timestep: torch.Tensor) -> SolverRow:
    x, e, memory = (torch.tensor(lanes, dtype=torch.float64) for lanes in (_X, _E, _MEMORY))
    multistep = hasattr(probe, "model_outputs")
    if multistep and step > 0:
        probe.model_outputs[-1] = memory  # what the step before left there, as a unit input
    scale = float(probe.scale_model_input(torch.ones(1, dtype=torch.float64), timestep)[0])
    result, noise = _stepped(probe, e, timestep, x)
    x0 = probe.model_outputs[-1] if multistep else getattr(result, "denoised", result.get("pred_original_sample"))
    n = float(result.prev_sample[3] / noise[3]) if noise is not None else 0.0
    without = result.prev_sample if noise is None else result.prev_sample - n * noise
    a, b, c, rest = (float(value) for value in without[:4])
    c = c if multistep else 0.0  # exactly, also where a noise was subtracted
    row = SolverRow(a=a, b=b, c=c, n=n, p=float(x0[0]), q=float(x0[1]), s=scale)
    mixture = a * _X[4] + b * _E[4] + c * _MEMORY[4]
    if abs(rest) > 1e-12 or abs(float(without[4]) - mixture) > 1e-5 * max(1.0, *map(abs, astuple(row))):
        raise UnsupportedSchedulerError(f"step {step}", got="noise or clipping", expected="a linear step")
    return row


def _stepped(probe: Any, e: torch.Tensor, timestep: torch.Tensor, x: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
    """One step of diffusers, and the noise (5,) that it drew where the sampler draws any: LCM, but at the last step."""
    if type(probe).__name__ != "LCMScheduler":
        return probe.step(e, timestep, x), None
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    return probe.step(e, timestep, x, generator=torch.Generator().manual_seed(0)), noise


def _plain_number(timestep: torch.Tensor) -> int | float:
    value = float(timestep)
    return int(value) if value.is_integer() else value
