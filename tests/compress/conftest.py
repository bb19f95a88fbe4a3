"""Fixtures for predicted steps: a staged network of a few lines, and recorded runs of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.denoising_chain import Start, chain
from latentrelay.compress.predicted_chain import Staged
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import CloudHandoff, Identity, Trajectories, record

N, C, SIDE, GUIDANCE = 9, 2, 6, 3.0


class TinyStaged:
    """noise_pred = 0.6 feature[:C] + 0.2 tanh(latents); feature (2, 3, h, w) and probe (2, 2, h, w) drift with the
    steps, differently from token to token. Calls are counted; `spoil` poisons what a full call should not pass on."""

    def __init__(self, drift: float = 1.0) -> None:
        self.calls = {"full": 0, "probe": 0, "shallow": 0}
        self.drift = drift

    def _feature(self, latents: Any, step: int, embeds: Any) -> Any:
        shift = embeds.mean(axis=(1, 2))[:, None, None, None]
        channels = np.arange(1, 4, dtype=np.float32)[None, :, None, None]
        wave = np.sin(np.float32(self.drift * 0.3 * step) * channels)
        return (np.tanh(latents[:, :1] + shift) * wave + np.float32(0.5) * shift + latents[:, 1:]).astype(np.float32)

    def full(self, latents: Any, step: int, prompt_embeds: Any) -> Staged:
        self.calls["full"] += 1
        feature = self._feature(latents, step, prompt_embeds)
        return Staged(self._shallow(latents, feature), feature, self._probe(latents, step, prompt_embeds))

    def probe(self, latents: Any, step: int, prompt_embeds: Any) -> Any:
        self.calls["probe"] += 1
        return self._probe(latents, step, prompt_embeds)

    def shallow(self, latents: Any, step: int, prompt_embeds: Any, feature: Any) -> Any:
        self.calls["shallow"] += 1
        return self._shallow(latents, feature)

    def __call__(self, latents: Any, step: int, prompt_embeds: Any) -> Any:
        return self.full(latents, step, prompt_embeds).noise_pred

    def _shallow(self, latents: Any, feature: Any) -> Any:
        return (np.float32(0.6) * feature[:, :C] + np.float32(0.2) * np.tanh(latents)).astype(np.float32)

    def _probe(self, latents: Any, step: int, embeds: Any) -> Any:
        return self._feature(latents, step, embeds)[:, 1:]


def _table(memory: bool = True) -> SolverTable:
    alphas = np.linspace(0.4, 0.95, N)  # x0 = alpha x - sigma v
    rows = tuple(
        SolverRow(0.97, -0.12, 0.03 * (0 < i < N - 1) * memory, 0.0, alpha, -float(np.sqrt(1 - alpha**2)), 1.0)
        for i, alpha in enumerate(alphas.tolist())
    )
    return SolverTable(rows, tuple(900 - 100 * i for i in range(N)), 1.0)


def _cloud(prompt: str, seed: int, split: int) -> CloudHandoff:
    rng = np.random.default_rng(seed)
    embeds = np.stack([np.zeros((2, 2)), np.full((2, 2), 0.3 + len(prompt) / 20)]).astype(np.float32)
    latents, memory = rng.standard_normal((1, C, SIDE, SIDE)).astype(np.float32), None
    for done in chain(TinyStaged(), _table(), Start(0, latents, None, embeds), GUIDANCE):
        if done.step == split:
            break
        latents, memory = done.next_latents, done.next_x0_prev
    return CloudHandoff(latents, memory, embeds)


@pytest.fixture
def make_staged() -> type[TinyStaged]:
    """The class of the tiny network; 9 steps, 2 channels, 6 by 6, guidance 3."""
    return TinyStaged


@pytest.fixture
def staged() -> TinyStaged:
    """One of it."""
    return TinyStaged()


@pytest.fixture
def staged_table() -> Callable[..., SolverTable]:
    """`staged_table(memory=True)`: its solver's rows."""
    return _table


@pytest.fixture
def staged_start() -> Callable[..., Start]:
    """`staged_start(split, seed=0)`: where a run of it begins."""

    def made(split: int, seed: int = 0) -> Start:
        handoff = _cloud("abc", seed, split)
        return Start(split, handoff.latents, handoff.x0_prev, handoff.prompt_embeds)

    return made


@pytest.fixture
def staged_runs(tmp_path: Path) -> Callable[..., Trajectories]:
    """`staged_runs("name", count, first seed)`: recorded runs of it, every second one from step 2."""

    def made(name: str, count: int = 6, seed: int = 0) -> Trajectories:
        identity = Identity("sha256:a", "sha256:b", "dpmsolver++", "sha256:c", N, GUIDANCE)
        prompts = [chr(97 + i) * (1 + i % 5) for i in range(count)]
        seeds = range(seed, seed + count)
        return record(tmp_path / name, prompts, seeds, (0, 2), _cloud, TinyStaged(), _table(), identity)

    return made
