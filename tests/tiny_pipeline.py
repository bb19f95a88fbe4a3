"""Tiny Stable Diffusion pipelines with random weights, made in a second and never downloaded.

`make_pipeline(...)` returns a `StableDiffusionPipeline` in float32 on the CPU (U-Net of two levels, 4 latent channels,
8x8 latents, 16x16 pixels by default); every argument that changes the architecture can be set, because the exporter
promises to serve any such shape. The tokenizer has 256 + 256 byte symbols, a few merges and the two special tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "r e", "re d</w>", "i n", "in g</w>", "o n</w>", "a n"]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "lcm": LCMScheduler,
    "pndm": PNDMScheduler,
}


def make_tokenizer(folder: Path, *, max_length: int = 16, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIPTokenizer over bytes and ten merges; its files are written to `folder`."""
    symbols = list(bytes_to_unicode().values())
    vocab = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(m.split()) for m in MERGES)]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=max_length, pad_token=pad_token
    )


def make_unet(
    *,
    widths: Sequence[int] = (8, 16),
    layers_per_block: int = 1,
    heads: int | Sequence[int] = 2,
    text_dim: int = 16,
    sample_size: int = 8,
    **overrides: Any,
) -> UNet2DConditionModel:
    """A U-Net in SD 1.x's block layout: cross-attention everywhere but in the last level."""
    levels = len(widths)
    arguments: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "block_out_channels": tuple(widths),
        "layers_per_block": layers_per_block,
        "cross_attention_dim": text_dim,
        "attention_head_dim": heads if isinstance(heads, int) else tuple(heads),
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**arguments, **overrides})


def make_pipeline(
    work: Path,
    *,
    seed: int = 0,
    sampler: str = "dpmsolver++",
    prediction_type: str = "epsilon",
    text_dim: int = 16,
    text_layers: int = 1,
    max_length: int = 16,
    pad_token: str = "<|endoftext|>",
    vae_widths: Sequence[int] = (8, 8),
    scheduler_overrides: dict[str, Any] | None = None,
    **unet: Any,
) -> StableDiffusionPipeline:
    """A whole pipeline; `work` receives the tokenizer's files. Weights are drawn from `seed`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(work / "tokenizer", max_length=max_length, pad_token=pad_token)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer.encoder),
            hidden_size=text_dim,
            intermediate_size=2 * text_dim,
            num_hidden_layers=text_layers,
            num_attention_heads=2,
            max_position_embeddings=max_length,
            projection_dim=text_dim,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    blocks = len(vae_widths)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=tuple(vae_widths),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
    )
    scheduler_arguments: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "steps_offset": 1,
    }
    if sampler == "ddim":
        scheduler_arguments |= {"clip_sample": False, "set_alpha_to_one": False}
    scheduler = SCHEDULERS[sampler](**{**scheduler_arguments, **(scheduler_overrides or {})})
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=make_unet(text_dim=text_dim, **unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path, *, half: bool = False) -> Path:
    """Write the pipeline as a diffusers folder (safetensors); `half` stores the weights in float16."""
    if half:
        pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
