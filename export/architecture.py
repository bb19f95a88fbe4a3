"""What can be exported: the check that names the unsupported part of a pipeline. It loads nothing and changes nothing.

Two passes: `check_index` on model_index.json alone (before any weight is read), `check_architecture` on the loaded
modules. Anything SD 1.x- or 2.x-shaped passes whatever its widths, heads, depths and text dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from latentrelay.export.errors import UnsupportedSourceError

_COMPONENTS = {
    "unet": ("UNet2DConditionModel", "StudentUNet2DConditionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_PIPELINES = ("StableDiffusionPipeline",)
_FAMILY_NAMES = {
    "StableDiffusionXLPipeline": "SDXL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3",
    "StableDiffusionInpaintPipeline": "inpainting",
    "StableDiffusionImg2ImgPipeline": "image-to-image",
    "FluxPipeline": "Flux",
    "LatentConsistencyModelPipeline": "latent consistency models",
}
# Settings of a U-Net that add inputs or branches which the step graphs do not have, with the value that means "absent".
_UNET_ABSENT = {
    "class_embed_type": "class embeddings",
    "num_class_embeds": "class embeddings",
    "addition_embed_type": "added conditioning (as in SDXL)",
    "time_cond_proj_dim": "guidance embedding (as in LCM)",
    "encoder_hid_dim": "projection of the text states",
    "encoder_hid_dim_type": "projection of the text states",
    "timestep_post_act": "time embedding activation",
}


def check_index(index: Mapping[str, Any]) -> None:
    """Check model_index.json: the pipeline class, and that every component is there and of a class that exports."""
    name = index.get("_class_name")
    if name not in _PIPELINES:
        family = _FAMILY_NAMES.get(str(name), "other")
        raise UnsupportedSourceError(f"pipeline class ({family})", got=name, expected=" | ".join(_PIPELINES))
    for part, classes in _COMPONENTS.items():
        got = (index.get(part) or [None, None])[1]
        if got not in classes:
            raise UnsupportedSourceError(part, got=got or "nothing", expected=" | ".join(classes))
    if (index.get("image_encoder") or [None, None])[1] is not None:
        raise UnsupportedSourceError("image_encoder", got=index["image_encoder"][1], expected="none")


def check_architecture(pipeline: Any) -> None:
    """Check loaded modules; raises UnsupportedSourceError naming the first part that cannot be exported."""
    if type(pipeline).__name__ not in _PIPELINES:
        family = _FAMILY_NAMES.get(type(pipeline).__name__, "other")
        raise UnsupportedSourceError(
            f"pipeline class ({family})", got=type(pipeline).__name__, expected=" | ".join(_PIPELINES)
        )
    for part, classes in _COMPONENTS.items():
        got = type(getattr(pipeline, part, None)).__name__
        if got not in classes:
            raise UnsupportedSourceError(
                part, got="nothing" if got == "NoneType" else got, expected=" | ".join(classes)
            )
    for part, found, expected in _differences(pipeline):
        if found != expected:
            raise UnsupportedSourceError(part, got=found, expected=expected)


def _differences(pipeline: Any) -> Iterator[tuple[str, Any, Any]]:
    unet, vae, text = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
    for setting, meaning in _UNET_ABSENT.items():
        yield f"U-Net {meaning} ({setting})", unet.get(setting), None
    channels = vae.latent_channels
    inpainting = " (9 channels: inpainting)" if unet.in_channels == 9 else ""
    yield f"U-Net input channels{inpainting}", unet.in_channels, channels
    yield "U-Net output channels", unet.out_channels, channels
    dims = unet.cross_attention_dim
    widths = sorted(set(dims)) if isinstance(dims, (list, tuple)) else [dims]
    yield "U-Net cross-attention width against the text encoder's", widths, [text.hidden_size]
    yield "text encoder attention mask", bool(getattr(text, "use_attention_mask", None)), False
    yield "VAE shift factor", vae.get("shift_factor") or 0.0, 0.0
    yield "VAE per-channel statistics", vae.get("latents_mean") or vae.get("latents_std"), None
    vocabulary = max(len(pipeline.tokenizer), pipeline.tokenizer.vocab_size)
    yield "tokenizer vocabulary larger than the text encoder's", vocabulary > text.vocab_size, False
    longer = pipeline.tokenizer.model_max_length > text.max_position_embeddings
    yield "tokenizer length beyond the text encoder's positions", longer, False


def family_of(pipeline: Any) -> str:
    """ "sd2" for text states 1024 wide (as in SD 2.x), else "sd1"."""
    if pipeline.text_encoder.config.hidden_size == 1024:
        return "sd2"
    return "sd1"


def latent_size(unet: Any, height: int | None, width: int | None, downscale: int) -> tuple[int, int]:
    """Latent rows and columns for a picture of `height` x `width` pixels (the U-Net's own size where None).

    Raises UnsupportedSourceError when the pixels are not a multiple of the VAE's factor.
    """
    own = unet.config.sample_size
    rows, columns = own if isinstance(own, (list, tuple)) else (own, own)
    sizes = []
    for name, pixels, latent in (("height", height, rows), ("width", width, columns)):
        if pixels is None:
            pixels = (latent or 0) * downscale
        if pixels < downscale or pixels % downscale:
            raise UnsupportedSourceError(f"picture {name}", got=pixels, expected=f"a multiple of {downscale} pixels")
        sizes.append(pixels // downscale)
    return sizes[0], sizes[1]
