"""The run that nobody split: diffusers' own pipeline from a seed, and how far other latents are from its own.

Knows nothing of this project, so that it can be the measure for all of it.
"""

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

Latents = NDArray[np.float32]


def final_latents(
    pipeline: StableDiffusionPipeline,
    sampler: str,
    prompt: str,
    negative_prompt: str,
    *,
    seed: int,
    guidance: float,
    num_steps: int,
) -> Latents:
    """Latents (1, C, h, w) after `num_steps` steps with `sampler` ("ddim" or "dpmsolver++")."""
    config = pipeline.scheduler.config
    if sampler == "ddim":
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(config, algorithm_type="dpmsolver++", solver_order=2)
    parts: dict[str, Any] = {**pipeline.components, "scheduler": scheduler, "requires_safety_checker": False}
    whole = StableDiffusionPipeline(**parts)
    whole.set_progress_bar_config(disable=True)
    found = whole(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=num_steps,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
    )
    latents: Latents = found.images.numpy()
    return latents


def snr_db(expected: NDArray[Any], got: NDArray[Any]) -> float:
    """Energy of `expected` over energy of the difference, in dB; equal arrays count as 300."""
    wanted = expected.astype(np.float64)
    error = float(np.sum((got.astype(np.float64) - wanted) ** 2))
    return min(300.0, 10 * float(np.log10(np.sum(wanted**2) / error))) if error else 300.0
