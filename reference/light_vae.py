"""The reference's light autoencoder: an `AutoencoderTiny` distilled from the reference VAE on Scenes.

In: the cached teacher latents at 128 pixels (see `unet.cache_latents`) and, made here once, the teacher's
reconstructions and the true renderings of the same scenes as bytes. Out: `weights/light_vae/`, and `load_light_vae`.
How a light autoencoder is trained is `compress/distill_vae.py`; here are its data, its size and its recipe.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from latentrelay.compress.distill_vae import DecodePairs, FeatureExtractor, distil_decoder, distil_encoder
from latentrelay.compress.light_vae import LightVaeSpec, load_light_vae, new_light_vae
from latentrelay.compress.training import BatchRng, Recipe
from latentrelay.reference.judge import Judge
from latentrelay.reference.pipeline import reference_path
from latentrelay.reference.scenes import render, sample_scenes
from latentrelay.reference.unet import SHARD
from numpy.typing import NDArray

SIZE = 128
SPEC = LightVaeSpec(width=32, decoder_blocks=(2, 2, 1, 0), encoder_blocks=(0, 1, 1, 2))


@torch.no_grad()
def cache_pictures(
    vae: AutoencoderKL,
    scale: float,
    folder: Path,
    count: int,
    part: tuple[int, int] = (0, 1),
    shard_size: int = SHARD,
    batch: int = 8,
) -> None:
    """What the teacher makes of the first `count` cached latents, beside the truth: shards `pictures-128-NNN.npy` of
    uint8 (n, 2, 128, 128, 3), [:, 0] the reconstruction, [:, 1] the rendering. Shards that exist are kept; `part` =
    (i, n) does every n-th. The teacher runs in bfloat16, 61 dB from float32."""
    scenes = sample_scenes("train", count, seed=SIZE)
    for shard in range(part[0], count // shard_size, part[1]):
        path = folder / f"pictures-{SIZE}-{shard:03d}.npy"
        if path.exists():
            continue
        latents = torch.from_numpy(np.load(folder / f"latents-{SIZE}-{shard:03d}.npy").astype(np.float32)) / scale
        pairs = np.empty((shard_size, 2, SIZE, SIZE, 3), np.uint8)
        for i in range(0, shard_size, batch):
            with torch.autocast("cpu", torch.bfloat16):
                rows = latents[i : i + batch].contiguous(memory_format=torch.channels_last)
                restored = vae.decode(rows).sample.float().permute(0, 2, 3, 1).numpy()
            pairs[i : i + batch, 0] = _bytes(restored / 2 + 0.5)
            first = shard * shard_size + i
            pairs[i : i + batch, 1] = _bytes(render(scenes[first : first + batch], SIZE))
        beside = path.with_name(f".{path.name}.tmp.npy")
        np.save(beside, pairs)
        beside.replace(path)


def _bytes(pictures: NDArray[np.float32]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8)
    return levels


@dataclass(frozen=True)
class CachedPairs:
    """A `PairSource` over the cached shards: `latents` and `pictures` have one memory-mapped array a shard."""

    latents: tuple[NDArray[np.float16], ...]
    pictures: tuple[NDArray[np.uint8], ...]

    @classmethod
    def of(cls, folder: Path) -> CachedPairs:
        """Everything cached by `cache_pictures`. Raises FileNotFoundError when there is nothing."""
        paths = sorted(folder.glob(f"pictures-{SIZE}-*.npy"))
        if not paths:
            raise FileNotFoundError(f"no cached pictures in {folder}; run the `light_vae` stage after `cache`")
        latents = tuple(np.load(path.with_name(path.name.replace("pictures", "latents"))) for path in paths)
        return cls(latents, tuple(np.load(path, mmap_mode="r") for path in paths))

    def __call__(self, rng: BatchRng, count: int) -> DecodePairs:
        """Whole pictures: a crop would show the student borders that the teacher never saw."""
        rows = rng.numpy.integers(0, sum(map(len, self.pictures)), size=count)
        size = len(self.pictures[0])
        latents = np.stack([self.latents[row // size][row % size] for row in rows]).astype(np.float32)
        pairs = np.stack([self.pictures[row // size][row % size] for row in rows])
        found = torch.from_numpy(pairs).permute(1, 0, 4, 2, 3).float() / 127.5 - 1
        return DecodePairs(torch.from_numpy(latents), found[0], found[1])


def judge_layers(judge: Judge) -> FeatureExtractor:
    """The judge's activations at a quarter and at an eighth of the picture, as a perceptual distance. The judge also
    scores the pictures in the end, so its scores of this decoder are not independent of its training."""
    judge.requires_grad_(False)

    def layers(pictures: torch.Tensor) -> list[torch.Tensor]:
        fine = judge.trunk[:9](pictures.contiguous(memory_format=torch.channels_last))
        return [fine, judge.trunk[9:15](fine)]

    return layers


def train(cache: Path, judge: Judge, decoder: Recipe, encoder: Recipe, folder: Path) -> AutoencoderTiny:
    """Decoder, then encoder, each resumable; the latest weights are in `folder/light_vae` after each checkpoint."""
    student = new_light_vae(SPEC, decoder.seed)
    pairs = CachedPairs.of(cache)

    def checkpoint(_step: int) -> None:
        student.save_pretrained(folder / "light_vae", safe_serialization=True)

    network: Any = judge
    layers = judge_layers(network.to(memory_format=torch.channels_last))
    distil_decoder(student, pairs, decoder, folder / "decoder", extractor=layers, on_checkpoint=checkpoint)
    distil_encoder(student, pairs, encoder, folder / "encoder", on_checkpoint=checkpoint)
    checkpoint(encoder.steps)
    return student


def save(student: AutoencoderTiny, folder: Path) -> None:
    """Write the autoencoder in float16; the one in memory stays float32."""
    copy.deepcopy(student).half().save_pretrained(folder, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    for key in ("_name_or_path", "block_out_channels"):  # a path of this machine; a copy that diffusers warns of
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_reference_light_vae(folder: Path | None = None) -> AutoencoderTiny:
    """The light autoencoder in float32 on the CPU, from a pipeline's `folder` or the shipped one. Raises OSError where
    there is none."""
    return load_light_vae((folder or reference_path()) / "light_vae")
