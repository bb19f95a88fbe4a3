"""One request's denoising run between two steps: its latents, its scheduler, its noise, its text states.

The network is not here: `Engine.predict` calls it for any number of states at once, and `advance` takes each state's
own guided prediction through diffusers' scheduler. Tensors are replaced, never written into, so a `Snapshot` of any
step stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.segment_cache import SegmentCache
from latentrelay.runtime.errors import NonFiniteError
from latentrelay.runtime.samplers import SamplerRule


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run after `step` steps: latents (1, C, h, w) and the last x0 of a multistep solver, both as computed."""

    step: int
    latents: torch.Tensor
    x0_prev: torch.Tensor | None


class RunState:
    """The run of one request on one thread. `step` steps are done; at `request.split` there is nothing left to do."""

    def __init__(
        self,
        request: RunRequest,
        sampler: str,
        rule: SamplerRule,
        scheduler: Any,
        latents: torch.Tensor,
        generator: torch.Generator,
        cache: SegmentCache | None,
    ) -> None:
        """latents: (1, C, h, w), standard normal, the first draw of `generator`; cache: which steps need the network,
        None for all."""
        self.request, self.sampler, self.rule, self.scheduler = request, sampler, rule, scheduler
        self.latents = latents * scheduler.init_noise_sigma
        self.embeds: torch.Tensor | None = None  # (branches, T, D), before the first step
        self.x0: torch.Tensor | None = None
        self.step = 0
        self._generator = generator
        self._cache = cache
        self._held: list[tuple[int, torch.Tensor]] = []  # steps that called the network and what it said, newest last

    @property
    def done(self) -> bool:
        """Whether the split is reached."""
        return self.step >= self.request.split

    @property
    def timestep(self) -> torch.Tensor:
        """() int64 on the CPU: the network's timestep of the next step."""
        timestep: torch.Tensor = self.scheduler.timesteps[self.step]
        return timestep

    @property
    def needs_network(self) -> bool:
        """Whether the next step calls the network; otherwise `advance(held())` makes it."""
        return self._cache is None or self.step in self._cache.computed or not self._held

    def calls_until(self, split: int) -> int:
        """Network calls from now until `split` steps are done."""
        left = range(self.step, split)
        return len(left) if self._cache is None else sum(1 for each in left if each in self._cache.computed)

    def sample(self) -> torch.Tensor:
        """(1, C, h, w): what the network is given."""
        scaled: torch.Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        return scaled

    def held(self) -> torch.Tensor:
        """(1, C, h, w): the guided prediction of a step that does without the network."""
        if self._cache is None:
            raise ValueError("a run without a step cache schedule computes every step")
        return self._cache.predicted(self.step, self._held)

    def advance(self, noise_pred: torch.Tensor, *, computed: bool = True) -> None:
        """One step with the guided prediction (1, C, h, w). Whether the result is finite is checked by the caller."""
        if computed and self._cache is not None:
            self._held = [*self._held[-1:], (self.step, noise_pred.clone())]
        if self.rule.needs_noise:  # in float32, so that half precision draws the same noise
            arguments = (noise_pred.float(), self.timestep, self.latents.float(), self._generator)
            moved = self.scheduler.step(*arguments, return_dict=False)
            self.latents, self.x0 = moved[0].to(noise_pred.dtype), moved[1]
        else:
            moved = self.scheduler.step(noise_pred, self.timestep, self.latents, return_dict=False)
            self.latents = moved[0]
            history = getattr(self.scheduler, "model_outputs", None)
            self.x0 = history[-1] if history else moved[1]
        self.step += 1

    def check_finite(self) -> None:
        """Raise NonFiniteError naming the last step if the latents hold anything else than numbers."""
        bad = int(self.latents.numel() - torch.isfinite(self.latents).sum())
        if bad:
            raise NonFiniteError("the cloud's U-Net", step=self.step - 1, count=bad)

    def snapshot(self) -> Snapshot:
        """The run as it is now."""
        keeps = self.rule.needs_x0_prev and 0 < self.step < self.request.num_steps
        return Snapshot(self.step, self.latents, self.x0 if keeps else None)
