"""The teacher's whole runs for a sweep: every step's state, once a caption, shared by all students and splits.

In: prompts and seeds. Out: per batch of captions the float16 handoff of every step (latents and, where the solver has
memory, x0_prev) and the picture that the source's own decoder makes of the last. It is the cloud engine's arithmetic,
several captions at a time; a sweep compares the two (see sweep_clock.py), since only the engine is what a cloud runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from latentrelay.runtime.errors import NonFiniteError
from latentrelay.runtime.samplers import sampler_for, sampler_rule
from latentrelay.tools.array_cache import ArrayCache, Arrays
from numpy.typing import NDArray

BATCH = 16


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """B captions' runs: `latents` and `x0_prev` (N, B, C, h, w) float16 after each step (the second None for a solver
    without memory), `pictures` (B, H, W, 3) uint8."""

    latents: NDArray[np.float16]
    x0_prev: NDArray[np.float16] | None
    pictures: NDArray[np.uint8]

    def handoff(self, row: int, split: int) -> tuple[NDArray[np.float16], NDArray[np.float16] | None]:
        """What crosses for one caption after `split` >= 1 steps: (1, C, h, w) each."""
        memory = None if self.x0_prev is None else self.x0_prev[split - 1, row : row + 1]
        return self.latents[split - 1, row : row + 1], memory


@dataclass(frozen=True)
class Teacher:
    """The pipeline and the settings of its runs; `digest` is the model's."""

    pipeline: Any
    digest: str
    num_steps: int
    guidance: float
    cache: ArrayCache

    @property
    def sampler(self) -> str:
        """The sampler that the cloud gives this pipeline."""
        return sampler_for(type(self.pipeline.scheduler).__name__)

    def made_from(self, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Everything that a batch depends on, as JSON."""
        return {
            "model": self.digest,
            "sampler": self.sampler,
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "prompts": list(prompts),
            "seeds": list(seeds),
        }

    def batch(self, prompts: Sequence[str], seeds: Sequence[int]) -> TeacherBatch:
        """The runs of at most BATCH captions, from the cache where it has them."""
        arrays = self.cache.get("teacher", self.made_from(prompts, seeds), lambda: self._run(prompts, seeds))
        return TeacherBatch(arrays["latents"], arrays.get("x0_prev"), arrays["pictures"])

    def scheduler(self) -> Any:
        """A fresh scheduler, its timesteps set."""
        rule = sampler_rule(self.sampler)
        made = getattr(diffusers, rule.scheduler_class).from_config(self.pipeline.scheduler.config, **rule.overrides)
        made.set_timesteps(self.num_steps)
        return made

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """The pictures (B, H, W, 3) that the source's decoder makes of float32 latents (B, C, h, w)."""
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return as_bytes(decoded.permute(0, 2, 3, 1).float().numpy() / 2 + 0.5)

    @torch.inference_mode()
    def _run(self, prompts: Sequence[str], seeds: Sequence[int]) -> Arrays:
        unet, scheduler, count = self.pipeline.unet, self.scheduler(), len(prompts)
        states = self._encode(["", *prompts])
        prompt_embeds = torch.cat([states[:1].expand(count, -1, -1), states[1:]])
        size = unet.config.sample_size
        shape = (1, unet.config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)))
        noise = [torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
        latents = torch.cat(noise) * scheduler.init_noise_sigma
        kept, memory = [], []
        for step, timestep in enumerate(scheduler.timesteps):
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            uncond, cond = unet(both, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0].chunk(2)
            noise_pred = uncond + self.guidance * (cond - uncond)
            latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
            bad = int(latents.numel() - torch.isfinite(latents).sum())
            if bad:
                raise NonFiniteError("the teacher's U-Net", step=step, count=bad)
            kept.append(latents.half().numpy())
            if sampler_rule(self.sampler).needs_x0_prev:
                memory.append(scheduler.model_outputs[-1].half().numpy())
        arrays: Arrays = {"latents": np.stack(kept), "pictures": self.decode(latents)}
        return arrays | ({"x0_prev": np.stack(memory)} if memory else {})

    def _encode(self, prompts: Sequence[str]) -> torch.Tensor:
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        length = tokenizer.model_max_length
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states: torch.Tensor = encoder(tokens.input_ids)[0]
        return states


def as_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pixels in 0..1 (clipped there) as uint8, rounded as the runtime's PNGs are."""
    found: NDArray[np.uint8] = (pixels.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    return found
