"""A cheap picture of unfinished latents: one linear map from latent channels to RGB, for previews between steps.

In: latents (1, C, h, w) and the manifest's `preview`, factors (3, C) and bias (3,), fitted at build time with the
shipped decoder. Out: (h, w, 3) uint8, one pixel a latent. It is no decoder: edges are blurred, fine colours are off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Preview:
    """A small picture (h, w, 3) uint8 of a run after `step` of `num_steps` steps; `where` it was made, "cloud" or
    "device"."""

    rgb: NDArray[np.uint8]
    step: int
    num_steps: int
    where: str


def project(latents: NDArray[Any], factors: Sequence[Sequence[float]], bias: Sequence[float]) -> NDArray[np.uint8]:
    """(h, w, 3) uint8 of latents (1, C, h, w): factors (3, C) times the channels plus bias (3,), in 0..1, clipped."""
    weights = np.asarray(factors, np.float32)
    rgb = np.einsum("kc,chw->hwk", weights, np.asarray(latents[0], np.float32)) + np.asarray(bias, np.float32)
    pixels: NDArray[np.uint8] = np.round(np.clip(np.nan_to_num(rgb), 0.0, 1.0) * 255).astype(np.uint8)
    return pixels
