"""Consistency distillation: the grid, the boundary conditions, the recorded solver, the loss, a short training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from latentrelay.compress.consistency import (
    ConsistencyFunction,
    Trajectories,
    consistency_loss,
    few_step_timesteps,
    load_shards,
    record_shard,
    solve,
)
from latentrelay.compress.lora import LowRankUpdate
from latentrelay.compress.training import BatchRng, Recipe, fit
from torch.func import functional_call

STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRID = (999, 759, 499, 259)


def config_of(prediction_type: str = "v_prediction") -> Any:
    return DPMSolverMultistepScheduler(**STABLE, steps_offset=1, prediction_type=prediction_type).config


def network(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """Smooth, and different for every timestep and text."""
    scale = 1 + timestep.float().reshape(-1, 1, 1, 1) / 1000
    return torch.tanh(0.6 * x * scale) + 0.2 * context.mean((1, 2))[:, None, None, None]


def test_the_grid_holds_every_timestep_of_runs_of_four_and_eight() -> None:
    assert few_step_timesteps(config_of(), (4, 8)) == (999, 879, 759, 639, 499, 379, 259, 139)
    assert few_step_timesteps(config_of(), (4,)) == GRID


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_consistency_function_is_what_lcms_step_calls_denoised(prediction_type: str) -> None:
    scheduler = LCMScheduler(**STABLE, prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    function = ConsistencyFunction(config_of(prediction_type))
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 5, generator=generator)
    for timestep in scheduler.timesteps:
        output = network(x, timestep, context)
        _, denoised = scheduler.step(output, timestep, x, return_dict=False)
        torch.testing.assert_close(function(network, x, timestep[None], context), denoised, rtol=1e-5, atol=1e-5)


def test_a_trajectory_is_diffusers_guided_run() -> None:
    generator = torch.Generator().manual_seed(1)
    noise, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 5, generator=generator)
    empty = torch.zeros(3, 5)
    found = solve(network, config_of(), noise, context, empty, guidance=4.0, timesteps=GRID, extra=(900, 100))
    scheduler = DPMSolverMultistepScheduler(**STABLE, steps_offset=1, prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=[999, 900, 759, 499, 259, 100])
    x, states = noise, []
    for timestep in scheduler.timesteps:
        states.append(x)
        plain, wanted = network(x, timestep, empty.expand(2, 3, 5)), network(x, timestep, context)
        x = scheduler.step(plain + 4.0 * (wanted - plain), timestep, x, return_dict=False)[0]
    expected = torch.stack([states[0], states[2], states[3], states[4], x], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def record(path: Path, seed: int) -> None:
    contexts = np.random.default_rng(0).normal(size=(20, 3, 5)).astype(np.float16)
    record_shard(
        path,
        network,
        config_of(),
        contexts,
        np.zeros((3, 5), np.float16),
        shape=(4, 8, 8),
        count=6,
        seed=seed,
        guidance=4.0,
        timesteps=GRID,
        batch=4,
    )


def test_shards_are_kept_and_equal_seeds_are_equal_bytes(tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"trajectories-00{i}.npz" for i in range(3))
    record(first, 1)
    record(again, 1)
    record(other, 2)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    before = first.stat().st_mtime_ns
    record(first, 1)
    assert first.stat().st_mtime_ns == before
    found = load_shards(tmp_path)
    assert (found.states.shape, found.states.dtype) == ((18, 5, 4, 8, 8), np.float16)
    assert found.timesteps == GRID
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in (first, again, other)]
    with pytest.raises(FileNotFoundError, match="record some"):
        load_shards(tmp_path / "nothing")


def trajectories() -> Trajectories:
    rng = np.random.default_rng(3)
    states = rng.normal(size=(5, len(GRID) + 1, 4, 8, 8)).astype(np.float16)
    return Trajectories(states, np.arange(5), GRID)


def test_the_loss_is_the_huber_distance_to_the_solution() -> None:
    """A network whose f is the solution's negative: |f - x0| = 2 |x0| in the mean, but for the rounding of halves."""
    found = trajectories()
    solution = torch.from_numpy(found.states[:1, -1].astype(np.float32))
    one = Trajectories(found.states[:1], found.contexts[:1], GRID)
    function = ConsistencyFunction(config_of("epsilon"))
    alphas = LCMScheduler(**STABLE).alphas_cumprod

    def oracle(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        alpha = alphas[timestep][:, None, None, None]
        return (x + alpha.sqrt() * solution) / (1 - alpha).sqrt()  # epsilon of x0 = -solution

    contexts = np.zeros((5, 3, 5), np.float16)
    loss_of = consistency_loss(function, one, contexts, 4, lambda module: oracle)
    losses = loss_of(torch.nn.Linear(1, 1), BatchRng.of(0, 0))
    assert float(losses["loss"]) == pytest.approx(float(2 * solution.abs().mean()), rel=2e-3)
    assert float(losses["x0_mse"]) == pytest.approx(float(4 * solution.square().mean()), rel=2e-3)


def test_the_published_target_is_the_networks_own_answer_one_state_on() -> None:
    """f = 0 everywhere: nothing to correct but at the last state, whose target is the solution."""
    found = trajectories()
    function = ConsistencyFunction(config_of("epsilon"))
    alphas = LCMScheduler(**STABLE).alphas_cumprod

    def nothing(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x / (1 - alphas[timestep][:, None, None, None]).sqrt()  # epsilon of x0 = 0

    contexts = np.zeros((5, 3, 5), np.float16)
    rng = BatchRng.of(0, 0)
    rows = BatchRng.of(0, 0).numpy.integers(0, 5, size=4)
    losses = consistency_loss(function, found, contexts, 4, lambda module: nothing, "next")(torch.nn.Linear(1, 1), rng)
    replay = BatchRng.of(0, 0).numpy
    replay.integers(0, 5, size=4)
    where = (np.arange(4) + int(replay.integers(4))) % 4
    last = found.states[rows[where == 3], -1].astype(np.float32)
    assert last.shape[0] == 1
    assert float(losses["loss"]) == pytest.approx(float(np.abs(last).mean()) / 4, rel=0.02)


def test_training_the_adapters_learns_and_leaves_the_network_alone(tiny: Any, tmp_path: Path) -> None:
    unet = tiny.make_unet().requires_grad_(False)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    found = trajectories()
    function = ConsistencyFunction(config_of())
    contexts = np.random.default_rng(0).normal(size=(5, 7, 16)).astype(np.float16)
    adapters = LowRankUpdate(unet, rank=4)

    def network_of(module: Any) -> Any:
        weights = module.weights()
        return lambda x, t, h: functional_call(unet, weights, (x, t, h), {"return_dict": False})[0]

    loss_of = consistency_loss(function, found, contexts, 16, network_of)
    first = float(loss_of(adapters, BatchRng.of(9, 0))["loss"].detach())
    recipe = Recipe(steps=60, batch=16, learning_rate=1e-2, warmup=5, checkpoint_every=60, ema_decay=0.9)
    trained = fit(adapters, loss_of, recipe, tmp_path)
    assert float(loss_of(trained, BatchRng.of(9, 0))["loss"].detach()) < 0.9 * first
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
