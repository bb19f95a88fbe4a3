"""Bytes that cross for one picture: the request up, the handoff with the solver's memory down, as the cloud writes it.

In: what a run looks like. Out: bytes, HTTP's headers included. The blob is really built, of zeros, so that the figure
follows the wire format; TLS records and TCP's own headers are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from latentrelay.runtime.handoff import SCHEMA_VERSION, Handoff, HandoffMeta
from latentrelay.runtime.handoff_request import HandoffRequest

REQUEST_HEADERS = 420  # method, host, bearer token, key, media types: counted once on a real request, rounded up
ANSWER_HEADERS = 620  # status, location, ETag, Repr-Digest, job id, dates
_PROMPT = "a large striped red circle left of a small blue square on sand, light from above"
_HEX = "0" * 64


def request_bytes(num_steps: int, split: int, height: int, width: int) -> int:
    """The POST of a usual prompt with the digests of a bundle."""
    digest = f"sha256:{_HEX}"
    request = HandoffRequest(
        _PROMPT, height, width, num_steps, split, sampler="dpmsolver++", model_digest=digest, scheduler_digest=digest
    )
    return REQUEST_HEADERS + len(json.dumps(request.to_dict()))


def handoff_bytes(
    timesteps: Sequence[float],
    split: int,
    shape: tuple[int, int, int],
    *,
    downscale: int = 8,
    needs_x0_prev: bool = True,
    dtype: str = "float16",
) -> int:
    """The answer at a split: latents (1, *shape) and, where the solver goes on with it, its memory. 0 at split 0."""
    if split == 0:
        return 0
    array = np.zeros((1, *shape), np.float16 if dtype == "float16" else np.float32)
    memory = array if needs_x0_prev and split < len(timesteps) else None
    meta = HandoffMeta(
        model_family="sd1",
        model_digest=f"sha256:{_HEX}",
        scheduler_class="DPMSolverMultistepScheduler",
        scheduler_digest=f"sha256:{_HEX}",
        num_steps=len(timesteps),
        timesteps=tuple(float(each) for each in timesteps),
        next_step=split,
        prediction_type="epsilon",
        guidance=7.5,
        scaling_factor=0.18215,
        shift_factor=0.0,
        seed=2**31,
        init_noise_sigma=1.0,
        height=shape[1] * downscale,
        width=shape[2] * downscale,
        dtype=dtype,
        prompt_salt=_HEX[:32],
        prompt_digest=_HEX,
        producer={"name": "latentrelay.cloud", "version": "0.1.0"},
        schema_version=SCHEMA_VERSION,
    )
    return ANSWER_HEADERS + len(Handoff(array, memory, meta).to_bytes())


def usual_timesteps(num_steps: int) -> tuple[float, ...]:
    """Timesteps as a 1000-step schedule has them, where no manifest says them."""
    return tuple(float(round(999 - 999 * step / num_steps)) for step in range(num_steps))
