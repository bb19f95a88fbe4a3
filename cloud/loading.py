"""Loading a pipeline: a hub id, a diffusers folder or one .safetensors file in, a StableDiffusionPipeline out.

Only safetensors are read, never pickles, and only SD 1.x and 2.x text-to-image pipelines are taken; anything else is
refused by name. No safety checker, no watermark, no progress bar: this service runs the denoising loop itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from latentrelay.cloud.errors import ModelLoadError, ModelRefusedError
from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.handoff import PREDICTION_TYPES
from numpy.typing import NDArray

_COMPONENTS = ("unet", "text_encoder", "vae")
_PIPELINE: Any = StableDiffusionPipeline


def load_pipeline(
    model: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    adapt: Callable[[Any], object] | None = None,
) -> Any:
    """The pipeline in evaluation mode on `device`. `config` is the folder or hub id that describes a single file.

    `adapt` changes the pipeline's weights in place before anything else sees them, in float32 on the CPU: it is how
    adapters are merged, which is the caller's business. The environment variables HF_HOME and HF_TOKEN are honoured by
    the hub client. Raises ModelRefusedError for a pipeline of another kind or one without safetensors, ModelLoadError
    for one that cannot be found or read.
    """
    path = Path(model)
    read = torch.float32 if adapt is not None else dtype
    if path.is_file():
        pipeline = _load_file(path, config, read)
    else:
        _check_class(path, revision)
        pipeline = _load_folder(model, revision, read)
    check_supported(pipeline)
    if adapt is not None:
        adapt(pipeline)
        for name in _COMPONENTS:
            torch.nn.Module.to(getattr(pipeline, name), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to(device)
    for name in _COMPONENTS:
        getattr(pipeline, name).eval().requires_grad_(False)
    return pipeline


def check_supported(pipeline: Any) -> None:
    """Raise ModelRefusedError naming the first part that is not of an SD 1.x or 2.x text-to-image pipeline."""
    unet, vae = pipeline.unet.config, pipeline.vae.config
    prediction = pipeline.scheduler.config.get("prediction_type", "epsilon")
    rules: tuple[tuple[str, object, bool | None, object], ...] = (
        ("the U-Net's class", type(pipeline.unet).__name__, None, "UNet2DConditionModel"),
        ("the VAE's class", type(pipeline.vae).__name__, None, "AutoencoderKL"),
        ("the text encoder's class", type(pipeline.text_encoder).__name__, None, "CLIPTextModel"),
        ("unet.in_channels", unet.in_channels, None, vae.latent_channels),
        ("unet.out_channels", unet.out_channels, None, vae.latent_channels),
        ("unet.cross_attention_dim", unet.cross_attention_dim, None, pipeline.text_encoder.config.hidden_size),
        ("unet.class_embed_type", unet.class_embed_type, None, None),
        ("unet.addition_embed_type", unet.addition_embed_type, None, None),
        ("unet.encoder_hid_dim_type", unet.encoder_hid_dim_type, None, None),
        ("unet.time_cond_proj_dim", unet.time_cond_proj_dim, None, None),
        ("scheduler.prediction_type", prediction, prediction in PREDICTION_TYPES, " or ".join(PREDICTION_TYPES)),
    )
    for what, got, holds, expected in rules:
        if not (got == expected if holds is None else holds):
            raise ModelRefusedError(
                f"{what} is not one of a Stable Diffusion 1.x or 2.x text-to-image pipeline",
                got=str(got),
                expected=str(expected),
                do="Choose another model.",
            )


def model_family(pipeline: Any) -> str:
    """ "sd2" for text states 1024 wide, as in SD 2.x, else "sd1"; the exporter names families by the same rule."""
    return "sd2" if pipeline.text_encoder.config.hidden_size == 1024 else "sd1"


def model_digest(pipeline: Any) -> str:
    """ "sha256:<hex>" over the weights of U-Net, text encoder and VAE in float32: one model, one digest, any format."""
    return weights_digest(_named_weights(pipeline))


def _named_weights(pipeline: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    for component in _COMPONENTS:
        for name, tensor in getattr(pipeline, component).state_dict().items():
            plain = tensor.float() if tensor.is_floating_point() else tensor
            yield f"{component}.{name}", np.asarray(plain.cpu())


def _check_class(path: Path, revision: str | None) -> None:
    """Read model_index.json before any weights, so that another kind of pipeline is refused by its name."""
    try:
        if path.is_dir():
            index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        else:
            index = DiffusionPipeline.load_config(str(path), revision=revision)
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"no pipeline was found at {str(path)!r} ({type(error).__name__})",
            expected="a hub id, a folder with model_index.json, or a .safetensors file",
            do="Check the name; without a network only folders, files and models in the local cache are found.",
        ) from error
    if name != _PIPELINE.__name__:
        raise ModelRefusedError(
            f"{str(path)!r} is another kind of pipeline",
            got=str(name),
            expected=_PIPELINE.__name__,
            do="Choose another model.",
        )


def _load_folder(model: str, revision: str | None, dtype: torch.dtype) -> Any:
    try:
        with _no_bars():
            return _PIPELINE.from_pretrained(
                model,
                revision=revision,
                torch_dtype=dtype,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise _unreadable(model, error) from error


def _load_file(path: Path, config: str | None, dtype: torch.dtype) -> Any:
    if path.suffix != ".safetensors":
        raise ModelRefusedError(
            f"{path.name!r} is not a safetensors file",
            got=path.suffix or "no suffix",
            expected=".safetensors",
            do="Convert it first; pickled checkpoints can run code and are not read.",
        )
    try:
        with _no_bars():
            return _PIPELINE.from_single_file(
                str(path),
                config=config,
                torch_dtype=dtype,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    except Exception as error:  # diffusers raises many kinds here: from the hub, the keys, the shapes
        raise _unreadable(str(path), error) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading takes seconds, or is a download with a bar of its own: diffusers' bar per part is left out."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()


def _unreadable(model: str, error: Exception) -> ModelLoadError:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return ModelLoadError(
        f"the pipeline {model!r} cannot be loaded: {reason}",
        expected="safetensors weights and a configuration for each part",
        do="Check that every part has its config.json and a .safetensors file.",
    )
