"""Which diffusers scheduler stands behind a sampler name, with which settings. Pure data: no diffusers here.

Cloud and export both build `getattr(diffusers, rule.scheduler_class).from_config(source_config, **rule.overrides)` and
`set_timesteps(num_steps)`; the digest of what comes out is how a handoff and a bundle know that they agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from latentrelay.runtime.digest import json_digest
from latentrelay.runtime.errors import RequestError


@dataclass(frozen=True)
class SamplerRule:
    """One sampler: the diffusers class, what overrides the source's own configuration, its memory, whether a step adds
    noise of its own, and the guidance branches (1: guidance is in the network, as consistency models have it)."""

    scheduler_class: str
    overrides: Mapping[str, Any]
    needs_x0_prev: bool
    needs_noise: bool = False
    branches: int = 2


SAMPLERS: Mapping[str, SamplerRule] = MappingProxyType(
    {
        "dpmsolver++": SamplerRule(
            "DPMSolverMultistepScheduler",
            MappingProxyType(
                {
                    "algorithm_type": "dpmsolver++",
                    "solver_order": 2,
                    "solver_type": "midpoint",
                    "lower_order_final": True,
                    "thresholding": False,
                }
            ),
            needs_x0_prev=True,
        ),
        # set_alpha_to_one and steps_offset stay as the source has them.
        "ddim": SamplerRule(
            "DDIMScheduler", MappingProxyType({"clip_sample": False, "thresholding": False}), needs_x0_prev=False
        ),
        # For networks distilled to latent consistency (arXiv 2310.04378): 4 or 8 steps, no guidance branch.
        "lcm": SamplerRule(
            "LCMScheduler",
            MappingProxyType(
                {
                    "original_inference_steps": 50,
                    "timestep_scaling": 10.0,
                    "clip_sample": False,
                    "thresholding": False,
                }
            ),
            needs_x0_prev=False,
            needs_noise=True,
            branches=1,
        ),
    }
)


def sampler_for(source_scheduler_class: str) -> str:
    """The sampler a source pipeline is built with: its own where there are tables for it, else DPM-Solver++(2M)."""
    own = [name for name, rule in SAMPLERS.items() if rule.scheduler_class == source_scheduler_class]
    return own[0] if own else "dpmsolver++"


def is_few_step(source_scheduler_class: str) -> bool:
    """Whether a pipeline says of itself that it was distilled to latent consistency: its scheduler is LCM's."""
    return source_scheduler_class == SAMPLERS["lcm"].scheduler_class


def sampler_reason(source_scheduler_class: str) -> str | None:
    """One sentence for the build to print when the sampler is not the source's own, else None."""
    name = sampler_for(source_scheduler_class)
    if SAMPLERS[name].scheduler_class == source_scheduler_class:
        return None
    return f"The source's {source_scheduler_class} has no step tables; the bundle is built with {name}."


def sampler_rule(name: str) -> SamplerRule:
    """The rule of a sampler; raises RequestError naming the samplers there are."""
    if name not in SAMPLERS:
        raise RequestError("unknown sampler", got=name, expected=" | ".join(SAMPLERS), do="Choose one of these.")
    return SAMPLERS[name]


def scheduler_digest(class_name: str, config: Mapping[str, Any]) -> str:
    """ "sha256:<hex>" of a scheduler's class and configuration.

    Keys that start with "_" (versions, bookkeeping) and values that are None are left out; arrays count
    as lists, infinities as strings.
    """
    kept = {key: _plain(value) for key, value in config.items() if not key.startswith("_") and value is not None}
    return json_digest({"class": class_name, "config": kept})


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # lambda_min_clipped is -inf by default, which canonical JSON does not have
    return value
