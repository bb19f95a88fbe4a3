"""Light autoencoders: `AutoencoderTiny` of diffusers (TAESD's topology) at a width and depth of one's own.

decode: scaled latents (N, 4, h, w), unit variance -> pictures (N, 3, 8h, 8w) in about [-1, 1]; encode is the way back.
The two scalings differ and are never guessed: an AutoencoderKL decodes latents / scaling_factor, an AutoencoderTiny has
scaling_factor 1 and takes scaled latents as they are (it works in [0, 1] inside and converts itself).
`latent_magnitude` and `latent_shift` only serve `scale_latents`, which packs latents into bytes; neither encode nor
decode uses them.
All stages have one width: the blocks of diffusers take no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import nn

DOWNSCALE = 8


@dataclass(frozen=True)
class LightVaeSpec:
    """Width and residual blocks a stage. The decoder's stages run at 1/8, 1/4, 1/2 and the whole of the picture, the
    encoder's the other way round. Without blocks in the last stage nothing but two convolutions is as large as the
    picture, which is where the time goes."""

    width: int
    decoder_blocks: tuple[int, int, int, int]
    encoder_blocks: tuple[int, int, int, int]
    latent_channels: int = 4


SD = LightVaeSpec(width=64, decoder_blocks=(3, 3, 3, 1), encoder_blocks=(1, 3, 3, 3))
"""TAESD as published for SD 1.x: 1,222,532 parameters in the encoder, 1,222,531 in the decoder."""


def new_light_vae(spec: LightVaeSpec, seed: int = 0) -> AutoencoderTiny:
    """An untrained autoencoder with seeded weights; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderTiny(
            encoder_block_out_channels=(spec.width,) * 4,
            decoder_block_out_channels=(spec.width,) * 4,
            num_encoder_blocks=spec.encoder_blocks,
            num_decoder_blocks=spec.decoder_blocks,
            latent_channels=spec.latent_channels,
            scaling_factor=1.0,
        )


def sd_light_decoder() -> nn.Module:
    """The decoder of TAESD's topology, untrained: (N, 4, h, w) scaled latents -> (N, 3, 8h, 8w)."""
    decoder: nn.Module = new_light_vae(SD).decoder
    return decoder


def decode_scaled(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents at unit variance (what a U-Net makes) by either kind: divided by the decoder's own factor. Not
    clamped."""
    pictures: torch.Tensor = vae.decode(latents / vae.config.scaling_factor).sample  # type: ignore[operator,union-attr]
    return pictures


def load_light_vae(folder: Path | str) -> AutoencoderTiny:
    """A stored light autoencoder in float32 on the CPU, in evaluation mode. Raises OSError where there is none."""
    found: AutoencoderTiny = AutoencoderTiny.from_pretrained(
        str(folder), torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
    )
    return found.eval()
