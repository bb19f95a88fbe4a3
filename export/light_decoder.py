"""A light decoder in a bundle: whether an `AutoencoderTiny` fits a source pipeline, and what the manifest says of it.

The source's VAE stays what the wire and the model digest know; only the graph that turns latents into a picture on the
device is another. The two have scalings of their own: the manifest records both, and the runtime divides by the
decoder's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from latentrelay.compress.light_vae import load_light_vae
from latentrelay.export.errors import SourceError, UnsupportedSourceError
from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.manifest import DecoderSpec


def checked_light_vae(vae: Any, pipeline: Any) -> Any:
    """`vae` (an AutoencoderTiny, or the folder of one) in float32 on the CPU, frozen.

    Raises SourceError where the folder cannot be read, UnsupportedSourceError where the decoder is not for the source's
    latents: another class, channels or factor, or a latent shift.
    """
    if isinstance(vae, (str, Path)):
        vae = _load(Path(vae))
    if type(vae).__name__ != "AutoencoderTiny":
        raise UnsupportedSourceError("light decoder", got=type(vae).__name__, expected="AutoencoderTiny")
    own, light = pipeline.vae.config, vae.config
    facts = {
        "light decoder's latent channels": (light.latent_channels, own.latent_channels),
        "light decoder's pixels a latent": (_factor(light), 2 ** (len(own.block_out_channels) - 1)),
        "light decoder's shift factor": (light.get("shift_factor") or 0.0, 0.0),
    }
    for part, (found, expected) in facts.items():
        if found != expected:
            raise UnsupportedSourceError(part, got=found, expected=expected)
    module: torch.nn.Module = vae.eval().requires_grad_(False)
    torch.nn.Module.to(module, device="cpu", dtype=torch.float32)
    return module


def _load(folder: Path) -> Any:
    try:
        return load_light_vae(folder)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise SourceError(
            f"the light VAE {folder} cannot be read: {error}",
            expected="config.json of an AutoencoderTiny with safetensors weights",
            do="Check the folder.",
        ) from error


def _factor(config: Any) -> int:
    factor: int = config.upsampling_scaling_factor ** (len(config.decoder_block_out_channels) - 1)
    return factor


def decoder_spec(vae: Any) -> DecoderSpec:
    """What the manifest records: class, digest over the decoder's weights, and its own scaling."""
    arrays = ((name, tensor.detach().cpu().numpy()) for name, tensor in vae.decoder.state_dict().items())
    return DecoderSpec(type(vae).__name__, weights_digest(arrays), float(vae.config.scaling_factor), 0.0)
