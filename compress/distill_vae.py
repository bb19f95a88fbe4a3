"""Distil a light autoencoder from a large one, decoder first, then encoder.

The decoder learns the teacher's reconstruction of a latent, and for a part the true picture (the teacher's own errors
are no aim); the encoder learns the teacher's latents. Losses: squared and absolute error, absolute error of gradients
at three scales, and distances of features from an extractor that is passed in. There is no adversarial term: against a
teacher's own output a squared error does not blur what the teacher itself resolved, and a discriminator costs more than
the network it would train. Nothing here knows where pictures come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from diffusers import AutoencoderTiny
from latentrelay.compress.folded_tail import FoldedDecoder, folds
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit
from torch import nn
from torch.nn import functional as F

SCALES = (1, 2, 4)  # gradients are compared at these pixel strides


@dataclass(frozen=True)
class DecodePairs:
    """A batch: scaled latents (N, 4, h, w); the teacher's reconstructions and the true pictures, both
    (N, 3, 8h, 8w) in [-1, 1]."""

    latents: torch.Tensor
    reconstructions: torch.Tensor
    pictures: torch.Tensor


class PairSource(Protocol):
    """Draws the batch of a step from that step's random numbers."""

    def __call__(self, rng: BatchRng, count: int) -> DecodePairs: ...


class FeatureExtractor(Protocol):
    """Pictures (N, 3, H, W) in [-1, 1] to feature maps, fine to coarse: a judge's layers, LPIPS, anything
    differentiable."""

    def __call__(self, pictures: torch.Tensor) -> Sequence[torch.Tensor]: ...


@dataclass(frozen=True)
class LossWeights:
    """Weights of the decoder's terms. `truth` is the share of the pixel terms that looks at the true picture."""

    squared: float = 8.0
    absolute: float = 1.0
    gradient: float = 0.5
    perceptual: float = 0.02
    truth: float = 0.15


def gradient_error(restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences, averaged over `SCALES` (average-pooled)."""
    total = restored.new_zeros(())
    for scale in SCALES:
        error = F.avg_pool2d(restored - target, scale) if scale > 1 else restored - target
        rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
        total = total + rows.abs().mean() + columns.abs().mean()
    return total / len(SCALES)


def feature_error(restored: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of squared feature distance relative to the target features' own mean square."""
    terms = [
        (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp(min=1e-8)
        for ours, theirs in zip(restored, target, strict=True)
    ]
    return torch.stack(terms).mean()


def decoder_losses(
    restored: torch.Tensor, pairs: DecodePairs, weights: LossWeights, extractor: FeatureExtractor | None
) -> Losses:
    """Named scalars; `loss` is the weighted sum and `mse` the squared error against the teacher at peak 1 (so
    PSNR = -10 log10 mse)."""
    target = torch.lerp(pairs.reconstructions, pairs.pictures, weights.truth)
    error = restored - target
    pixel = weights.squared * error.square().mean() + weights.absolute * error.abs().mean()
    loss = pixel + weights.gradient * gradient_error(restored, target)
    losses = {"mse": (restored - pairs.reconstructions).square().mean() / 4}
    if extractor is not None and weights.perceptual > 0:
        with torch.no_grad():
            wanted = extractor(target)
        losses["perceptual"] = feature_error(extractor(restored), wanted)
        loss = loss + weights.perceptual * losses["perceptual"]
    return {"loss": loss, **losses}


def distil_decoder(
    student: AutoencoderTiny,
    source: PairSource,
    recipe: Recipe,
    folder: Path,
    *,
    weights: LossWeights | None = None,
    extractor: FeatureExtractor | None = None,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train `student.decoder` in place, resumable (see `training.fit`). `on_checkpoint(step)` is called with the EMA
    weights in `student`."""
    chosen = weights or LossWeights()

    def loss_of(module: nn.Module, rng: BatchRng) -> Losses:
        pairs = _moved(source(rng, recipe.batch), device_of(module))
        restored = module(pairs.latents.contiguous(memory_format=torch.channels_last)).float()
        return decoder_losses(restored, pairs, chosen, extractor)

    student.to(memory_format=torch.channels_last)
    decoder = FoldedDecoder(student.decoder) if folds(student.decoder) else student.decoder
    fit(decoder, loss_of, recipe, folder, on_checkpoint=_calling(on_checkpoint))
    student.eval()


def distil_encoder(
    student: AutoencoderTiny,
    source: PairSource,
    recipe: Recipe,
    folder: Path,
    *,
    on_checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Train `student.encoder` in place to give the teacher's scaled latents of the true pictures; resumable."""

    def loss_of(module: nn.Module, rng: BatchRng) -> Losses:
        pairs = _moved(source(rng, recipe.batch), device_of(module))
        found = module(pairs.pictures.contiguous(memory_format=torch.channels_last)).float()
        squared = (found - pairs.latents).square().mean()
        return {"loss": squared + 0.1 * (found - pairs.latents).abs().mean(), "latent_mse": squared}

    student.to(memory_format=torch.channels_last)
    fit(student.encoder, loss_of, recipe, folder, on_checkpoint=_calling(on_checkpoint))
    student.eval()


def _moved(pairs: DecodePairs, device: torch.device) -> DecodePairs:
    return DecodePairs(pairs.latents.to(device), pairs.reconstructions.to(device), pairs.pictures.to(device))


def _calling(on_checkpoint: Callable[[int], None] | None) -> Callable[[int, nn.Module], None] | None:
    return None if on_checkpoint is None else lambda step, _module: on_checkpoint(step)
