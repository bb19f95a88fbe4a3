"""The shapes of a pipeline without its weights: configurations in, torch modules on the meta device out.

A `Geometry` is what config.json files say of the U-Net, the VAE and the text encoder, with the size of the latents.
`sd14()` is Stable Diffusion 1.4's, so that what depends on size alone is predicted and tested without a download.
Nothing is computed and no weight is read or allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from latentrelay.compress.errors import CompressError
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

GEOMETRIES = ("sd14",)
_UNETS = ("UNet2DConditionModel", "StudentUNet2DConditionModel")
_VAES = ("AutoencoderKL", "AutoencoderTiny")

_SD14_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
_SD14_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_SD14_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


class GeometryError(CompressError):
    """A pipeline's configuration is not there or not one of this project's families."""

    exit_status = 3


@dataclass(frozen=True)
class Geometry:
    """Three configurations as in config.json, latents of `rows` x `columns`, prompts of `tokens`."""

    name: str
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    rows: int
    columns: int
    tokens: int

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(_decoder_widths(self.vae)) - 1))

    def with_unet(self, config: Mapping[str, Any]) -> Geometry:
        """The same pipeline with another U-Net."""
        return replace(self, unet=config)

    def with_vae(self, config: Mapping[str, Any]) -> Geometry:
        """The same pipeline with another VAE, of the same latents."""
        return replace(self, vae=config)

    def at(self, height: int | None, width: int | None) -> Geometry:
        """The same pipeline at another picture size in pixels. Raises GeometryError for a size it cannot have."""
        sizes = []
        for name, pixels, latents in (("height", height, self.rows), ("width", width, self.columns)):
            if pixels is not None and (pixels < self.downscale or pixels % self.downscale):
                raise GeometryError(f"picture {name}", got=pixels, expected=f"a multiple of {self.downscale} pixels")
            sizes.append(latents if pixels is None else pixels // self.downscale)
        return replace(self, rows=sizes[0], columns=sizes[1])

    def build_unet(self) -> Any:
        """The U-Net on the meta device."""
        return unet_from(self.unet)

    def build_vae(self) -> Any:
        """The VAE on the meta device."""
        name = str(self.vae.get("_class_name"))
        if name not in _VAES:
            raise GeometryError("the VAE is of a class that is not served", got=name, expected=" | ".join(_VAES))
        with torch.device("meta"):
            return getattr(diffusers, name).from_config(dict(self.vae)).eval()

    def build_text_encoder(self) -> nn.Module:
        """The text encoder on the meta device."""
        with torch.device("meta"):
            encoder: nn.Module = CLIPTextModel(CLIPTextConfig(**dict(self.text_encoder)))
        return encoder.eval()


def unet_from(config: Mapping[str, Any]) -> Any:
    """A U-Net or student of one config.json on the meta device. Raises GeometryError for another class."""
    name = str(config.get("_class_name"))
    if name not in _UNETS:
        raise GeometryError("the U-Net is of a class that is not served", got=name, expected=" | ".join(_UNETS))
    kind: Any = StudentUNet2DConditionModel if name.startswith("Student") else diffusers.UNet2DConditionModel
    with torch.device("meta"):
        return kind.from_config(dict(config)).eval()


def named(name: str) -> Geometry:
    """A geometry by name. Raises GeometryError."""
    if name != "sd14":
        raise GeometryError("no such geometry", got=name, expected=" | ".join(GEOMETRIES))
    return sd14()


def sd14() -> Geometry:
    """Stable Diffusion 1.4 at 512x512: 859.5M parameters in the U-Net, 83.7M in the VAE, 123.1M in CLIP ViT-L/14."""
    return Geometry("sd14", _SD14_UNET, _SD14_VAE, _SD14_TEXT, 64, 64, 77)


def from_folder(folder: Path, *, name: str | None = None) -> Geometry:
    """The geometry of a diffusers folder, from its config.json files. Raises GeometryError naming the missing one."""
    unet, vae, text = (read_config(folder / part) for part in ("unet", "vae", "text_encoder"))
    size = unet.get("sample_size")
    rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
    if not rows or not columns:
        raise GeometryError("the U-Net's config has no sample_size", got=size, expected="the latents' rows and columns")
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    tokens = _read(tokenizer).get("model_max_length") if tokenizer.is_file() else None
    longest = int(text.get("max_position_embeddings", 77))
    return Geometry(name or folder.name, unet, vae, text, int(rows), int(columns), min(int(tokens or longest), longest))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of one component's folder. Raises GeometryError."""
    return _read(folder / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GeometryError(
            f"{path} cannot be read ({error})", expected="a diffusers folder with a config.json in every part"
        ) from error
    if not isinstance(document, dict):
        raise GeometryError(f"{path} is not a configuration", got=type(document).__name__, expected="a JSON object")
    return document


def _decoder_widths(vae: Mapping[str, Any]) -> Any:
    return vae.get("decoder_block_out_channels") or vae["block_out_channels"]
