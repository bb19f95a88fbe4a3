"""What a student is distilled on and scored with: Scenes for the reference, a user's pictures for any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from latentrelay.compress.distill_unet import LatentData
from latentrelay.compress.image_latents import encode_folder, read_captions
from latentrelay.tools.console import counting
from latentrelay.tools.models import REFERENCE

SCENES = 18_000
# For models that bring no captions of their own: plain subjects in several styles.
PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a wooden table, oil painting",
    "a street in the rain at night, neon signs",
    "portrait of an old fisherman, black and white",
    "a red bicycle leaning against a yellow wall",
    "a mountain lake at sunrise, mist over the water",
    "a cat asleep on a windowsill, watercolour",
    "a city skyline from above, isometric drawing",
    "a plate of pasta with basil, close up",
    "two children flying a kite on a beach",
    "a steam locomotive crossing a stone bridge",
    "a bouquet of sunflowers in a blue vase",
    "an owl on a branch under a full moon",
    "a wooden cabin in a snowy forest",
    "a robot watering plants in a greenhouse",
    "a sailing ship in a storm, engraving",
)


def scoring_prompts(model: str, data: Path | None, count: int) -> list[str]:
    """`count` prompts at most: the reference's calibration captions, the data folder's, or the list above."""
    if data is not None:
        return [text for _, text in read_captions(data)[:count]]
    if model == REFERENCE:
        from latentrelay.reference.captions import sample_captions

        return [caption.text for _, caption in sample_captions("calibrate", count, 0)]
    return list(PROMPTS[:count])


def folder_data(pipeline: Any, folder: Path, cache: Path) -> tuple[LatentData, LatentData]:
    """A user's captioned pictures, encoded once: to train on, and held out."""
    with counting("encoding pictures", None) as advance:
        return encode_folder(pipeline, folder, cache, lambda done, of: advance(f"encoded {done} of {of} pictures", 1))


def reference_data(pipeline: Any, cache: Path, scenes: int | None) -> tuple[LatentData, LatentData]:
    """Scenes of the training split, rendered and encoded once; the last thirty-sixth is held out from training."""
    from latentrelay.reference import unet as reference

    count = SCENES if scenes is None else scenes
    shard = min(reference.SHARD, max(1, count // 4))
    count -= count % shard
    vae = pipeline.vae.to(memory_format=torch.channels_last)
    with counting(f"rendering and encoding {count} scenes", None):
        reference.cache_latents(vae, vae.config.scaling_factor, cache, 128, count, shard_size=shard)
        reference.cache_embeddings(pipeline.tokenizer, pipeline.text_encoder, cache, 128, count, 2, shard_size=shard)
    whole = reference.load_cache(cache, 128)
    held = max(1, count // 36)
    return whole.part(0, count - held), whole.part(count - held, count)
