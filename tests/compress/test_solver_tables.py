"""Solver tables against diffusers' own scheduler.step, over whole runs and at every split."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from latentrelay.compress.errors import UnsupportedSchedulerError
from latentrelay.compress.solver_tables import SolverTable, solver_table

STABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SAMPLERS: dict[str, Any] = {
    "ddim": lambda **kw: DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, **kw),
    "ddim-trailing": lambda **kw: DDIMScheduler(
        **STABLE, clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True, **kw
    ),
    "dpmsolver++": lambda **kw: DPMSolverMultistepScheduler(**STABLE, **kw),
    "dpmsolver++-karras": lambda **kw: DPMSolverMultistepScheduler(**STABLE, use_karras_sigmas=True, **kw),
    "dpmsolver++-trailing": lambda **kw: DPMSolverMultistepScheduler(**STABLE, timestep_spacing="trailing", **kw),
    "euler": lambda **kw: EulerDiscreteScheduler(**STABLE, **kw),
}
# Epsilon prediction divides by alpha, which is 0 at the zero terminal SNR of "ddim-trailing".
CASES = [
    (sampler, prediction_type)
    for sampler in sorted(SAMPLERS)
    for prediction_type in ("epsilon", "v_prediction")
    if (sampler, prediction_type) != ("ddim-trailing", "epsilon")
]


def denoise(x: torch.Tensor, step: int) -> torch.Tensor:
    """A stand-in for the network: smooth, not linear, different every step."""
    return torch.tanh(0.7 * x + 0.1 * step) - 0.2 * x.flip(0)


def run_diffusers(scheduler: Any, num_steps: int, x: torch.Tensor) -> list[torch.Tensor]:
    scheduler.set_timesteps(num_steps)
    states = [x]
    for step, timestep in enumerate(scheduler.timesteps):
        e = denoise(scheduler.scale_model_input(x, timestep), step)
        x = scheduler.step(e, timestep, x, return_dict=False)[0]
        states.append(x)
    return states


def run_table(
    table: SolverTable, x: torch.Tensor, memory: torch.Tensor, first: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    states = [(x, memory)]
    for step, row in enumerate(table.rows[first:], start=first):
        e = denoise(row.s * x, step)
        x, memory = row.a * x + row.b * e + row.c * memory, row.p * x + row.q * e
        states.append((x, memory))
    return states


def decibels(reference: torch.Tensor, got: torch.Tensor) -> float:
    error = float(((got - reference) ** 2).sum())
    return 10 * float(torch.log10((reference**2).sum() / max(error, 1e-300)))


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 25, 50])
@pytest.mark.parametrize(("sampler", "prediction_type"), CASES)
def test_a_table_reproduces_the_scheduler(sampler: str, prediction_type: str, num_steps: int) -> None:
    scheduler = SAMPLERS[sampler](prediction_type=prediction_type)
    table = solver_table(scheduler, num_steps)
    x = torch.randn(64, generator=torch.Generator().manual_seed(num_steps), dtype=torch.float64)
    x = x * table.init_noise_sigma
    expected = run_diffusers(scheduler, num_steps, x)
    got = run_table(table, x, torch.zeros_like(x))
    assert len(table.rows) == len(table.timesteps) == num_steps
    assert [float(t) for t in scheduler.timesteps] == list(table.timesteps)
    # diffusers rounds the sample to float32 at each step (not DDIM); 100 dB is 1e-5
    for reference, (state, _) in zip(expected, got, strict=True):
        assert decibels(reference, state) > 100


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "euler"])
def test_a_split_at_every_step_equals_the_uninterrupted_run(sampler: str, prediction_type: str) -> None:
    table = solver_table(SAMPLERS[sampler](prediction_type=prediction_type), 25)
    x = table.init_noise_sigma * torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = run_table(table, x, torch.zeros_like(x))
    for split in range(26):
        state, memory = whole[split]
        rest = run_table(table, state, memory, first=split)
        assert torch.equal(rest[-1][0], whole[-1][0])


def test_ddim_rows_are_the_closed_form() -> None:
    scheduler = SAMPLERS["ddim"](prediction_type="epsilon")
    table = solver_table(scheduler, 25)
    alphas = scheduler.alphas_cumprod.double()
    t, previous = table.timesteps[3], table.timesteps[4]
    alpha, alpha_previous = float(alphas[int(t)]), float(alphas[int(previous)])
    row = table.rows[3]
    assert row.p == pytest.approx(alpha**-0.5, rel=1e-12)
    assert row.q == pytest.approx(-(((1 - alpha) / alpha) ** 0.5), rel=1e-12)
    assert row.a == pytest.approx((alpha_previous / alpha) ** 0.5, rel=1e-12)
    assert (row.c, row.n, row.s) == (0.0, 0.0, 1.0)
    assert not table.needs_x0_prev


def test_dpmsolver_reads_memory_between_the_ends_and_writes_x0_out_last() -> None:
    table = solver_table(SAMPLERS["dpmsolver++"](prediction_type="v_prediction"), 10)
    assert table.needs_x0_prev
    assert [row.c != 0.0 for row in table.rows] == [False] + [True] * 8 + [False]
    last = table.rows[-1]
    assert (last.a, last.b, last.c) == pytest.approx((last.p, last.q, 0.0), rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_lcm_rows_reproduce_the_scheduler_and_its_noise(prediction_type: str, num_steps: int) -> None:
    scheduler = LCMScheduler(**STABLE, prediction_type=prediction_type)
    table = solver_table(scheduler, num_steps)
    x = torch.randn(64, generator=torch.Generator().manual_seed(num_steps), dtype=torch.float64)
    scheduler.set_timesteps(num_steps)
    mine, theirs = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    state = x
    for step, (row, timestep) in enumerate(zip(table.rows, scheduler.timesteps, strict=True)):
        last = step == num_steps - 1
        noise = torch.zeros_like(x) if last else torch.randn(64, generator=mine, dtype=torch.float64)
        expected, denoised = scheduler.step(denoise(x, step), timestep, x, generator=theirs, return_dict=False)
        e = denoise(state, step)
        assert decibels(denoised, row.p * state + row.q * e) > 100
        state, x = row.a * state + row.b * e + row.n * noise, expected
        assert decibels(expected, state) > 100
        assert (row.c, row.s, row.n == 0.0) == (0.0, 1.0, last)
    assert table.needs_noise == (num_steps > 1)
    assert not table.needs_x0_prev


def test_lcm_rows_by_hand() -> None:
    """Four steps at 999, 759, 499, 259: x0 = sqrt(abar) x - sqrt(1 - abar) v, then noise at the next timestep."""
    table = solver_table(LCMScheduler(**STABLE, prediction_type="v_prediction"), 4)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    now, following = float(abar[999]), float(abar[759])
    row = table.rows[0]
    assert table.timesteps == (999, 759, 499, 259)
    assert (row.p, row.q) == pytest.approx((now**0.5, -((1 - now) ** 0.5)), rel=1e-5)
    assert (row.a, row.n) == pytest.approx(((following * now) ** 0.5, (1 - following) ** 0.5), rel=1e-5)
    last = table.rows[-1]
    assert (last.a, last.b, last.n) == (last.p, last.q, 0.0)


def test_more_lcm_steps_than_it_was_trained_with_are_refused() -> None:
    with pytest.raises(UnsupportedSchedulerError, match="original_steps") as caught:
        solver_table(LCMScheduler(**STABLE), 51)
    assert caught.value.part == "num_steps"


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = SAMPLERS["dpmsolver++"](prediction_type="epsilon")
    scheduler.set_timesteps(7)
    solver_table(scheduler, 25)
    assert len(scheduler.timesteps) == 7
    assert scheduler.sigmas.dtype == torch.float32
    assert scheduler.step_index is None


@pytest.mark.parametrize(
    ("scheduler", "part"),
    [
        (DPMSolverMultistepScheduler(**STABLE, thresholding=True), "thresholding"),
        (DPMSolverMultistepScheduler(**STABLE, algorithm_type="sde-dpmsolver++"), "algorithm_type"),
        (DPMSolverMultistepScheduler(**STABLE, solver_order=3), "solver_order"),
        (DPMSolverMultistepScheduler(**STABLE, prediction_type="sample"), "prediction_type"),
        (DDIMScheduler(**STABLE, clip_sample=True), "clip_sample"),
        (DDIMScheduler(**STABLE, clip_sample=False, thresholding=True), "thresholding"),
        (PNDMScheduler(**STABLE), "scheduler class"),
        (LCMScheduler(clip_sample=True), "clip_sample"),
        (LCMScheduler(**STABLE, prediction_type="sample"), "prediction_type"),
    ],
)
def test_what_has_no_table_is_refused_by_name(scheduler: Any, part: str) -> None:
    with pytest.raises(UnsupportedSchedulerError) as caught:
        solver_table(scheduler, 5)
    assert caught.value.part == part
    assert part in str(caught.value)
    assert caught.value.exit_status == 3
