"""The reference autoencoder: `AutoencoderKL`, factor 8, 4 latent channels, trained from scratch on Scenes.

In: pictures (N, 3, H, W) in [-1, 1]. Out: latents (N, 4, H/8, W/8). Trained on 64x64 pictures: half are whole scenes
drawn small, half are crops of 128x128 ones, so that both sizes the U-Net trains at decode well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit
from latentrelay.reference.scenes import Floats, Scene, Split, in_split, render, sample_scene, sample_scenes

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 128,
}
KL_WEIGHT = 1e-4


def new_vae(seed: int = 0) -> AutoencoderKL:
    """An untrained autoencoder with seeded weights."""
    torch.manual_seed(seed)
    return AutoencoderKL.from_config(CONFIG)


def to_tensor(pictures: Floats) -> torch.Tensor:
    """(N, H, W, 3) in [0, 1] to (N, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1


def training_pictures(rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 3, 64, 64) in [-1, 1]: the first half scenes at 64 pixels, the rest crops of scenes at 128."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if in_split(scene, "train"):
            scenes.append(scene)
    whole = render(scenes[: count // 2], 64)
    large = render(scenes[count // 2 :], 128)
    corners = rng.integers(0, 65, size=(len(large), 2))
    crops = np.stack([picture[y : y + 64, x : x + 64] for picture, (y, x) in zip(large, corners, strict=True)])
    return to_tensor(np.concatenate([whole, crops]))


def reconstruction_losses(restored: torch.Tensor, pictures: torch.Tensor) -> Losses:
    """Squared error for PSNR, absolute error and absolute difference of gradients for edges; all means."""
    error = restored - pictures
    rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    squared = error.square().mean()
    edges = rows.abs().mean() + columns.abs().mean()
    return {"loss": 4 * squared + error.abs().mean() + 0.5 * edges, "mse": squared / 4}


def train(recipe: Recipe, folder: Path) -> AutoencoderKL:
    """Encoder and decoder together. Resumable; see `training.fit`."""
    vae = new_vae(recipe.seed).to(memory_format=torch.channels_last)

    def loss_of(module: torch.nn.Module, rng: BatchRng) -> Losses:
        model = cast(AutoencoderKL, module)
        pictures = training_pictures(rng.numpy, recipe.batch).to(device_of(module))
        posterior = model.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng.torch).to(pictures.device)
        losses = reconstruction_losses(model.decode(posterior.mean + posterior.std * noise).sample.float(), pictures)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return {**losses, "loss": losses["loss"] + KL_WEIGHT * kl, "kl": kl}

    return cast(AutoencoderKL, fit(vae, loss_of, recipe, folder, on_checkpoint=_exporter(folder)))


def _exporter(folder: Path) -> Callable[[int, torch.nn.Module], None]:
    def export(_step: int, module: torch.nn.Module) -> None:
        cast(AutoencoderKL, module).save_pretrained(folder / "vae", safe_serialization=True)

    return export


@torch.no_grad()
def latent_std(vae: AutoencoderKL, count: int = 512) -> float:
    """Standard deviation of the latents of training scenes at 128 pixels; its inverse is the scaling factor."""
    latents = encode_scenes(vae, sample_scenes("train", count, seed=7))
    return float(latents.std())


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: Sequence[Scene], size: int = 128, batch: int = 32) -> torch.Tensor:
    """Unscaled latent means (N, 4, size/8, size/8)."""
    return torch.cat(
        [
            vae.encode(to_tensor(render(scenes[i : i + batch], size))).latent_dist.mean
            for i in range(0, len(scenes), batch)
        ]
    )


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, split: Split = "report", count: int = 256, size: int = 128) -> float:
    """Mean PSNR in dB (peak 1) of encode-decode on held-out scenes."""
    scenes = sample_scenes(split, count, seed=11)
    values = []
    for i in range(0, count, 32):
        pictures = to_tensor(render(scenes[i : i + 32], size))
        restored = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        mse = ((restored - pictures) / 2).square().flatten(1).mean(1)
        values.append(-10 * mse.log10())
    return float(torch.cat(values).mean())


def autoencoder(vae: AutoencoderKL) -> Callable[[torch.Tensor], torch.Tensor]:
    """Pictures (N, 3, H, W) in [-1, 1] to their reconstructions, without gradients."""

    def reconstruct(pictures: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean
            return cast(torch.Tensor, vae.decode(latents).sample.clamp(-1, 1).float())

    return reconstruct
