"""A cheap look at latents: one linear map from C channels to RGB, fitted to the model's own VAE.

Fitted by least squares of smooth random latents (C, n, n) against the VAE's decoding of them, averaged down to n x n:
no picture is needed, and decoding a step would cost as much as the step. What it shows is colour and layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

_SAMPLES, _SIDE, _SCALES = 8, 8, (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class PreviewFactors:
    """RGB in -1 .. 1 is `factors` (3, C) times the latents' channels plus `bias` (3,)."""

    factors: torch.Tensor
    bias: torch.Tensor

    def picture(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """(h, w, 3) of latents (1, C, h, w), scaled as the network sees them."""
        plain = latents[0].float().cpu()
        rgb = torch.einsum("rc,chw->hwr", self.factors, plain) + self.bias
        scaled = ((rgb / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return np.asarray(scaled)


def fit_factors(vae: Any, scaling_factor: float, shift_factor: float = 0.0) -> PreviewFactors:
    """Fit them to a VAE: one decoding of a small batch. The same VAE gives the same factors."""
    generator = torch.Generator("cpu").manual_seed(0)
    channels = vae.config.latent_channels
    latents = _smooth_latents(channels, generator)
    decoded = vae.decode((latents / scaling_factor + shift_factor).to(vae.device, vae.dtype), return_dict=False)[0]
    small = functional.adaptive_avg_pool2d(decoded.float().cpu(), (_SIDE, _SIDE))
    inputs = latents.movedim(1, -1).reshape(-1, channels)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    solution = torch.linalg.lstsq(inputs, small.movedim(1, -1).reshape(-1, 3).double()).solution.float()
    return PreviewFactors(factors=solution[:channels].T.contiguous(), bias=solution[channels])


def _smooth_latents(channels: int, generator: torch.Generator) -> torch.Tensor:
    """(n, C, side, side) of unit variance: noise on ever finer grids, because pictures' latents are mostly flat."""
    layers = []
    for scale in _SCALES:
        coarse = torch.randn((_SAMPLES, channels, scale, scale), generator=generator)
        layers.append(functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="nearest"))
    smooth: torch.Tensor = torch.stack(layers).sum(0) / len(layers) ** 0.5
    return smooth
