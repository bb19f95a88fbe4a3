"""The reference U-Net (the teacher): SD 1.x's block layout at small widths, trained on cached Scenes latents.

In: latents (N, 4, h, w) scaled to unit variance, and frozen text embeddings (N, 32, 128). The network predicts v on
SD's noise schedule with min-SNR weighting; one caption in ten is dropped for classifier-free guidance. Most samples
are seen at 8x8 latents (64-pixel pictures, a fifth of the cost), the last part at 16x16. Latents and embeddings are
computed once and read from disk, since the encoders are frozen and would otherwise cost as much as the U-Net.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit
from latentrelay.reference.captions import caption_scene
from latentrelay.reference.scenes import render, sample_scenes
from latentrelay.reference.text_encoder import tokenize
from latentrelay.reference.vae import to_tensor
from numpy.typing import NDArray
from transformers import CLIPTextModel, CLIPTokenizer

WIDTHS = {"cpu": (32, 64, 128, 128), "gpu": (40, 80, 160, 160)}
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
SNR_CAP = 5.0
CAPTION_DROPOUT = 0.1
SHARD = 1000


def new_unet(widths: tuple[int, ...], seed: int = 0) -> UNet2DConditionModel:
    """Four levels, two layers a block, cross-attention in all levels but the innermost, a mid block."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=[2, 4, 4, 4],  # the number of heads a level, as diffusers names it
        norm_num_groups=8,
    )


# ---- the cache -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentSet:
    """Training latents (n, 4, h, w) at unit variance and, for each, `captions` embeddings (n * captions, T, D)."""

    latents: NDArray[np.float16]
    embeddings: NDArray[np.float16]
    empty: NDArray[np.float16]

    @property
    def captions(self) -> int:
        """Captions a scene."""
        return len(self.embeddings) // len(self.latents)

    @property
    def identity(self) -> str:
        """A digest of the arrays, for what is trained on them."""
        digest = hashlib.sha256()
        for array in (self.latents, self.embeddings, self.empty):
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"scenes sha256:{digest.hexdigest()}"

    def batch(self, rng: np.random.Generator, count: int, caption_dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, 4, h, w) and text states (count, T, D) float32; dropped captions become the empty prompt."""
        rows = rng.integers(0, len(self.latents), size=count)
        chosen = rows * self.captions + rng.integers(0, self.captions, size=count)
        context = self.embeddings[chosen].astype(np.float32)
        context[rng.random(count) < caption_dropout] = self.empty.astype(np.float32)
        return torch.from_numpy(self.latents[rows].astype(np.float32)), torch.from_numpy(context)

    def part(self, first: int, last: int) -> LatentSet:
        """Scenes first..last-1."""
        each = self.captions
        return LatentSet(self.latents[first:last], self.embeddings[first * each : last * each], self.empty)


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL,
    scale: float,
    folder: Path,
    size: int,
    count: int,
    part: tuple[int, int] = (0, 1),
    shard_size: int = SHARD,
) -> None:
    """Encode `count` training scenes at `size` pixels into shards; shards that exist are kept. `part` = (i, n)
    does every n-th shard, so that several processes can share the work."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = sample_scenes("train", count, seed=size)
    for shard in range(part[0], count // shard_size, part[1]):
        path = folder / f"latents-{size}-{shard:03d}.npy"
        if path.exists():
            continue
        rows = scenes[shard * shard_size : (shard + 1) * shard_size]
        encoded = [
            vae.encode(
                to_tensor(render(rows[i : i + 50], size)).contiguous(memory_format=torch.channels_last)
            ).latent_dist.mean
            for i in range(0, shard_size, 50)
        ]
        _save(path, (torch.cat(encoded) * scale).half().numpy())


@torch.no_grad()
def cache_embeddings(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    folder: Path,
    size: int,
    count: int,
    captions: int,
    part: tuple[int, int] = (0, 1),
    shard_size: int = SHARD,
) -> None:
    """Embed `captions` paraphrases of each scene that `cache_latents` encodes, into shards like its own."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "empty.npy", encoder(tokenize(tokenizer, [""])).last_hidden_state[0].half().numpy())
    scenes = sample_scenes("train", count, seed=size)
    for shard in range(part[0], count // shard_size, part[1]):
        path = folder / f"embeddings-{size}-{shard:03d}.npy"
        if path.exists():
            continue
        rng = np.random.Generator(np.random.PCG64([size, shard]))
        texts = [
            caption_scene(scene, rng).text
            for scene in scenes[shard * shard_size : (shard + 1) * shard_size]
            for _ in range(captions)
        ]
        found = [
            encoder(tokenize(tokenizer, texts[i : i + 250])).last_hidden_state.half() for i in range(0, len(texts), 250)
        ]
        _save(path, torch.cat(found).numpy())


def _save(path: Path, array: NDArray[np.float16]) -> None:
    beside = path.with_name(f".{path.name}.tmp.npy")
    np.save(beside, array)
    beside.replace(path)


def load_cache(folder: Path, size: int) -> LatentSet:
    """Everything cached at a size, in memory. Raises FileNotFoundError when a shard has no partner."""
    latents = sorted(folder.glob(f"latents-{size}-*.npy"))
    embeddings = [folder / path.name.replace("latents", "embeddings") for path in latents]
    if not latents or not all(path.exists() for path in embeddings):
        raise FileNotFoundError(f"no complete cache for {size} pixels in {folder}; run the `cache` stage first")
    return LatentSet(
        np.concatenate([np.load(path) for path in latents]),
        np.concatenate([np.load(path) for path in embeddings]),
        np.load(folder / "empty.npy"),
    )


# ---- training ------------------------------------------------------------------------------------------------------


def train(unet: UNet2DConditionModel, cached: LatentSet, recipe: Recipe, folder: Path) -> UNet2DConditionModel:
    """Resumable; see `training.fit`. The network is modified in place and returned with its EMA weights."""
    unet = unet.to(memory_format=torch.channels_last)
    alphas_cumprod = DDPMScheduler(**SCHEDULE).alphas_cumprod
    steps = len(alphas_cumprod)

    def loss_of(module: torch.nn.Module, rng: BatchRng) -> Losses:
        device = device_of(module)
        latents, context = (tensor.to(device) for tensor in cached.batch(rng.numpy, recipe.batch, CAPTION_DROPOUT))
        noise = torch.randn(latents.shape, generator=rng.torch).to(device)
        # Stratified: one timestep from each of `batch` equal slices, which steadies the loss.
        spread = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=rng.torch)) / recipe.batch
        timesteps = (spread * steps).long().clamp(max=steps - 1)
        alpha_bar = alphas_cumprod[timesteps].to(device)[:, None, None, None]
        noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        predicted = module(noisy, timesteps.to(device), context).sample.float()
        squared = (predicted - target).square().mean((1, 2, 3))
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        return {"loss": (squared * snr.clamp(max=SNR_CAP) / (snr + 1)).mean(), "v_mse": squared.mean()}

    def export(step: int, module: torch.nn.Module) -> None:
        cast(UNet2DConditionModel, module).save_pretrained(folder / "unet")
        (folder / "unet" / "step.json").write_text(json.dumps({"step": step}))

    return cast(UNet2DConditionModel, fit(unet, loss_of, recipe, folder, on_checkpoint=export))
