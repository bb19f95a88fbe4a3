"""The reference text encoder: a small `CLIPTextModel`, trained to say what a caption asks for, then frozen.

SD's text encoder comes trained on pictures and captions; here there are no such pairs but the truth is known, so the
encoder learns by reading captions back: from every position at or after the end token a linear read-out must name the
layout, the background and each object's attributes by place (left or top first), with "not named" as a value. The
U-Net's cross-attention then finds who is what and where already bound together.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit
from latentrelay.reference.captions import MAX_LENGTH, Caption, caption_scene
from latentrelay.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    in_split,
    sample_scene,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """An untrained encoder with seeded weights: 3 layers, width 128, 32 positions."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def target_sizes() -> list[int]:
    """Classes of each read-out: layout, background, then four attributes of the first and of the second place. One
    more than the values there are: not named, or no such object."""
    sizes = [len(LAYOUTS), len(BACKGROUNDS) + 1]
    return sizes + 2 * [len(values) + 1 for values in ATTRIBUTES.values()]


def targets_of(scene: Scene, caption: Caption) -> list[int]:
    """Class indices in the order of `target_sizes`."""
    background = BACKGROUNDS.index(caption.background) if caption.background else len(BACKGROUNDS)
    named = list(caption.objects)
    if caption.relation in ("right of", "below"):
        named.reverse()
    out = [LAYOUTS.index(scene.layout), background]
    for slot in range(2):
        said = named[slot].named() if slot < len(named) else {}
        out += [values.index(said[name]) if name in said else len(values) for name, values in ATTRIBUTES.items()]
    return out


class Reader(torch.nn.Module):
    """Encoder and read-out together; only the encoder is kept."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = torch.nn.ModuleList(torch.nn.Linear(encoder.config.hidden_size, n) for n in target_sizes())

    def forward(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.encoder(input_ids).last_hidden_state
        return [head(hidden) for head in self.heads]


def training_captions(rng: np.random.Generator, count: int) -> list[tuple[Scene, Caption]]:
    """Fresh training scenes with a caption each."""
    pairs: list[tuple[Scene, Caption]] = []
    while len(pairs) < count:
        scene = sample_scene(rng)
        if in_split(scene, "train"):
            pairs.append((scene, caption_scene(scene, rng)))
    return pairs


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (N, MAX_LENGTH), int64, padded and cut to length."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids
    return cast(torch.Tensor, ids)


def readout_loss(logits: list[torch.Tensor], ids: torch.Tensor, targets: torch.Tensor, end: int) -> Losses:
    """Cross-entropy at the end token and at every pad after it, averaged; and the share read right at the end token."""
    after = ids == end
    total = torch.zeros((), device=ids.device)
    right = torch.zeros((), device=ids.device)
    first = after.int().argmax(1)
    rows = torch.arange(len(ids), device=ids.device)
    for column, scores in enumerate(logits):
        wanted = targets[:, column]
        total = total + torch.nn.functional.cross_entropy(scores[after], wanted[:, None].expand_as(ids)[after])
        right = right + (scores[rows, first].argmax(-1) == wanted).float().mean()
    return {"loss": total / len(logits), "accuracy": right / len(logits)}


def train(tokenizer: CLIPTokenizer, recipe: Recipe, folder: Path) -> CLIPTextModel:
    """Resumable; see `training.fit`. One caption in twenty is replaced by the empty text, whose targets are
    all "not named", so that the unconditional branch of guidance is a point the encoder knows."""
    reader = Reader(new_text_encoder(tokenizer, recipe.seed))
    nothing = [-100, *(n - 1 for n in target_sizes()[1:])]  # an empty text has no layout to name

    def loss_of(module: torch.nn.Module, rng: BatchRng) -> Losses:
        pairs = training_captions(rng.numpy, recipe.batch)
        empty = rng.numpy.random(recipe.batch) < 0.05
        ids = tokenize(tokenizer, ["" if blank else pair[1].text for blank, pair in zip(empty, pairs, strict=True)])
        wanted = [nothing if blank else targets_of(*pair) for blank, pair in zip(empty, pairs, strict=True)]
        device = device_of(module)
        ids = ids.to(device)
        return readout_loss(module(ids), ids, torch.tensor(wanted, device=device), cast(int, tokenizer.eos_token_id))

    return cast(Reader, fit(reader, loss_of, recipe, folder)).encoder
