"""Latent-consistency distillation (LCM, arXiv 2310.04378) of a U-Net, along trajectories recorded once.

The teacher, with classifier-free guidance at one fixed scale w, solves the probability-flow ODE from noise; its states
at the timesteps that few-step runs use, and its solution, are kept. A consistency function
`f(x, t) = c_skip x + c_out x0(x, t)`, without guidance (w is learnt, not an input), is then trained to map every state
to the solution. This differs from the paper in two things: the target is the solver's solution (or, with
`target="next"`, the network's own answer one state further, as published), and the states come from the solver rather
than from noised pictures, so that one solve serves every timestep. In: latents (N, C, h, w) at unit variance,
text states (N, T, D). It knows neither pictures nor prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from latentrelay.compress.training import BatchRng, Losses, device_of
from numpy.typing import NDArray
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # latents (N,C,h,w), timesteps (N,), text states -> v or epsilon
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # LCMScheduler's
HUBER_C = 0.001


def few_step_timesteps(scheduler_config: Any, numbers_of_steps: Sequence[int]) -> tuple[int, ...]:
    """The timesteps that LCM runs of these lengths visit, together, the noisiest first."""
    found: set[int] = set()
    for count in numbers_of_steps:
        scheduler: Any = LCMScheduler.from_config(scheduler_config)
        scheduler.set_timesteps(count)
        found.update(int(timestep) for timestep in scheduler.timesteps)
    return tuple(sorted(found, reverse=True))


@dataclass(frozen=True)
class Trajectories:
    """`states` (n, G+1, C, h, w) float16: the solver's states at `timesteps` (G of them, the noisiest first), then its
    solution. `contexts` (n,) are the rows of the caller's text states."""

    states: NDArray[np.float16]
    contexts: NDArray[np.int64]
    timesteps: tuple[int, ...]


@torch.no_grad()
def solve(
    network: Network,
    scheduler_config: Any,
    noise: Tensor,
    context: Tensor,
    empty: Tensor,
    *,
    guidance: float,
    timesteps: Sequence[int],
    extra: Sequence[int] = (),
) -> Tensor:
    """Guided DPM-Solver++(2M) from `noise` (N, C, h, w) through `timesteps` and `extra`, to the end.

    context (N, T, D), empty (T, D). Returns (N, G+1, C, h, w): the states at `timesteps`, then the solution.
    """
    path = sorted({*timesteps, *extra}, reverse=True)
    scheduler: Any = DPMSolverMultistepScheduler.from_config(
        scheduler_config, algorithm_type="dpmsolver++", solver_order=2, thresholding=False
    )
    scheduler.set_timesteps(timesteps=path)
    both = torch.cat([empty.expand_as(context), context])
    latents, states = noise * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps:
        if int(timestep) in timesteps:
            states.append(latents)
        doubled = torch.cat([latents, latents]).contiguous(memory_format=torch.channels_last)
        unconditional, conditional = network(doubled, timestep, both).chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return torch.stack([*states, latents], dim=1)


def record_shard(
    path: Path,
    network: Network,
    scheduler_config: Any,
    contexts: NDArray[np.float16],
    empty: NDArray[np.float16],
    *,
    shape: tuple[int, int, int],
    count: int,
    seed: int,
    guidance: float,
    timesteps: Sequence[int],
    extra: Sequence[int] = (),
    batch: int = 16,
) -> None:
    """Solve `count` trajectories from noise (C, h, w) = `shape` and write them to `path` (.npz), whole or not at all.

    `contexts` (m, T, D) are drawn from without replacement while they last; a file that exists is kept.
    """
    if path.exists():
        return
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed])))
    generator = torch.Generator().manual_seed(seed)
    rows = rng.choice(len(contexts), size=count, replace=count > len(contexts))
    parts = []
    for i in range(0, count, batch):
        text = torch.from_numpy(contexts[rows[i : i + batch]].astype(np.float32))
        noise = torch.randn((len(text), *shape), generator=generator)
        unconditional = torch.from_numpy(empty.astype(np.float32))
        found = solve(
            network,
            scheduler_config,
            noise,
            text,
            unconditional,
            guidance=guidance,
            timesteps=timesteps,
            extra=extra,
        )
        parts.append(found.half().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.tmp.npz")
    np.savez(beside, states=np.concatenate(parts), contexts=rows.astype(np.int64), timesteps=np.array(timesteps))
    beside.replace(path)


def load_shards(folder: Path) -> Trajectories:
    """Every shard of a folder as one set. Raises FileNotFoundError where there is none."""
    paths = sorted(folder.glob("trajectories-*.npz"))
    if not paths:
        raise FileNotFoundError(f"no trajectories in {folder}; record some first")
    shards = [np.load(path) for path in paths]
    return Trajectories(
        np.concatenate([shard["states"] for shard in shards]),
        np.concatenate([shard["contexts"] for shard in shards]),
        tuple(int(timestep) for timestep in shards[0]["timesteps"]),
    )


class ConsistencyFunction:
    """`f(x, t)`, the estimate of the solution, from a network of v or epsilon: LCM's boundary conditions included."""

    def __init__(self, scheduler_config: Any) -> None:
        scheduler: Any = LCMScheduler.from_config(scheduler_config)
        self._alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self._prediction_type = str(scheduler.config.prediction_type)

    def __call__(self, network: Network, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """x (N, C, h, w), timesteps i64 (N,), context (N, T, D) -> (N, C, h, w)."""
        scaled = timesteps.float() * TIMESTEP_SCALING
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
        alpha = self._alphas_cumprod[timesteps.cpu()].to(x.device)
        signal, noise = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        predicted = network(x.contiguous(memory_format=torch.channels_last), timesteps, context)
        if self._prediction_type == "v_prediction":
            x0 = signal * x - noise * predicted
        else:
            x0 = (x - noise * predicted) / signal
        return c_skip[:, None, None, None] * x + c_out[:, None, None, None] * x0


def consistency_loss(
    function: ConsistencyFunction,
    trajectories: Trajectories,
    contexts: NDArray[np.float16],
    batch: int,
    network_of: Callable[[torch.nn.Module], Network],
    target: Literal["solution", "next"] = "solution",
) -> Callable[[torch.nn.Module, BatchRng], Losses]:
    """What `training.fit` minimises: pseudo-Huber distance (c = 0.001) of f(x, t) to the target, the timesteps in equal
    shares a batch. `contexts` (m, T, D) are the rows that the trajectories name.

    "solution": the solver's solution. "next": f of the same network, without gradient, at the next recorded state.
    """
    grid = torch.tensor(trajectories.timesteps)

    def loss_of(module: torch.nn.Module, rng: BatchRng) -> Losses:
        network = network_of(module)
        rows = rng.numpy.integers(0, len(trajectories.states), size=batch)
        where = (np.arange(batch) + int(rng.numpy.integers(len(grid)))) % len(grid)
        device = device_of(module)
        x, wanted = (
            torch.from_numpy(trajectories.states[rows, place].astype(np.float32)).to(device) for place in (where, -1)
        )
        context = torch.from_numpy(contexts[trajectories.contexts[rows]].astype(np.float32)).to(device)
        if target == "next":
            wanted = _bootstrapped(function, network, trajectories, rows, where, context, wanted)
        found = function(network, x, grid[where].to(device), context)
        apart = ((found - wanted).square() + HUBER_C**2).sqrt() - HUBER_C
        return {"loss": apart.mean(), "x0_mse": (found - wanted).square().mean()}

    return loss_of


@torch.no_grad()
def _bootstrapped(
    function: ConsistencyFunction,
    network: Network,
    trajectories: Trajectories,
    rows: NDArray[np.int64],
    where: NDArray[np.int64],
    context: Tensor,
    solution: Tensor,
) -> Tensor:
    """f at the next state; at the last state, whose next is the solution itself, the solution."""
    count = len(trajectories.timesteps)
    following = np.minimum(where + 1, count - 1)
    x = torch.from_numpy(trajectories.states[rows, following].astype(np.float32)).to(context.device)
    found = function(network, x, torch.tensor(trajectories.timesteps)[following].to(context.device), context)
    last = torch.from_numpy(where == count - 1)[:, None, None, None].to(context.device)
    return torch.where(last, solution, found)
