"""Source loading: a hub id, a local folder or one .safetensors file -> a float32 StableDiffusionPipeline on the CPU.

Only safetensors weights are read, never pickles. What the export cannot serve is refused with the part named, before
weights are loaded where the configuration tells, and again on the loaded modules. The model digest covers the state
dicts of unet, text_encoder and vae, so a bundle knows which cloud model may start its runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from latentrelay.compress.lora import Adapter, merge
from latentrelay.export.architecture import check_architecture, check_index, family_of
from latentrelay.export.errors import SourceError
from latentrelay.runtime.digest import weights_digest

DIGESTED = ("unet", "text_encoder", "vae")


@dataclass(frozen=True)
class SourceModel:
    """A checked pipeline in float32 on the CPU, what it is called, and its model digest ("sha256:<hex>").

    `notes` go into the manifest's additional_metadata: which adapters were merged, whose U-Net the device runs.
    `base_digest` is the model digest before adapters were merged, None where none were.
    """

    pipeline: Any
    model: str
    digest: str
    family: str
    licence: str
    revision: str | None
    notes: Mapping[str, Any] = field(default_factory=dict)
    base_digest: str | None = None


def load_source(
    model: Any,
    revision: str | None = None,
    *,
    name: str | None = None,
    config: str | None = None,
    loras: Sequence[Adapter] = (),
) -> SourceModel:
    """Load and check a source.

    `model`: a hub id, a folder in diffusers' layout, a single .safetensors file, or a StableDiffusionPipeline (which
    is used as it is, frozen and moved to float32 on the CPU). `revision` is the hub's. `name` is what the bundle calls
    the source (by default the hub id, or the last part of a local path, which stays private). `config` is a folder or
    hub id that describes a single file; without it diffusers asks the hub. `loras` are merged into the float32 weights
    (in place, where a pipeline was given) before the digest is taken, and recorded. Raises SourceError,
    UnsupportedSourceError, AdapterError.
    """
    if isinstance(model, SourceModel):
        if loras:
            raise SourceError("adapters cannot be merged into a source that is loaded", do="Give them when loading it.")
        return model
    if isinstance(model, (str, Path)):
        origin, pipeline = str(model), _load(str(model), revision, config)
    else:
        origin, pipeline = str(getattr(model, "name_or_path", "") or type(model).__name__), model
    check_architecture(pipeline)
    for part in DIGESTED:
        module = getattr(pipeline, part).eval().requires_grad_(False)
        torch.nn.Module.to(module, device="cpu", dtype=torch.float32)  # diffusers' own `to` talks about every cast
    base = model_digest(pipeline) if loras else None
    merged = merge(pipeline, loras)
    return SourceModel(
        pipeline,
        name or _public_name(origin),
        model_digest(pipeline),
        family_of(pipeline),
        _licence(Path(origin)),
        revision,
        {"adapters": [each.document() for each in merged]} if merged else {},
        base,
    )


def model_digest(pipeline: Any) -> str:
    """ "sha256:<hex>" over the state dicts of unet, text_encoder and vae, names prefixed with the component's."""

    def arrays() -> Any:
        for part in DIGESTED:
            for name, tensor in getattr(pipeline, part).state_dict().items():
                array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
                yield f"{part}.{name}", array

    return weights_digest(arrays())


def _public_name(origin: str) -> str:
    path = Path(origin)
    return path.resolve().name if path.exists() else origin


def _load(model: str, revision: str | None, config: str | None) -> Any:
    path = Path(model)
    if path.is_file():
        return _load_single_file(path, config)
    if path.suffix in (".safetensors", ".ckpt", ".bin") or (path.is_absolute() and not path.exists()):
        raise SourceError("the model was not found", got=model, expected="an existing file or folder", do="Check it.")
    if path.is_dir():
        _check_folder(path)
    else:
        check_index(_hub_index(model, revision))
    try:
        pipeline_class: Any = StableDiffusionPipeline
        return pipeline_class.from_pretrained(
            model,
            revision=revision,
            torch_dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=path.is_dir(),
        )
    except (OSError, ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise SourceError(
            f"the model {model} cannot be loaded: {error}",
            do="It needs model_index.json and safetensors for unet, vae and text_encoder; pickles are not read.",
        ) from error


def _load_single_file(path: Path, config: str | None) -> Any:
    if path.suffix != ".safetensors":
        raise SourceError(
            "a single-file model must be .safetensors", got=path.name, do="Convert it; pickles can run code when read."
        )
    pipeline_class: Any = StableDiffusionPipeline
    try:
        return pipeline_class.from_single_file(
            str(path),
            config=config,
            torch_dtype=torch.float32,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:  # diffusers raises many kinds here: from the hub, from the keys, from the shapes
        raise SourceError(
            f"the single file {path.name} cannot be loaded: {error}",
            do="diffusers fetches the matching configuration from the hub once; offline, give `config` or a folder.",
        ) from error


def _check_folder(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise SourceError(
            "the folder is not a diffusers pipeline", got=str(path), expected="model_index.json in it", do="Check it."
        )
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"model_index.json in {path} is not JSON: {error}", do="Fetch the model again.") from error
    check_index(document)
    for part in DIGESTED:
        if not any((path / part).glob("*.safetensors")):
            raise SourceError(
                f"{part} has no safetensors weights",
                got=", ".join(sorted(entry.name for entry in (path / part).glob("*"))) or "nothing",
                expected=f"{part}/*.safetensors",
                do="Save the pipeline with safe_serialization=True; pickles are not read.",
            )


def _hub_index(model: str, revision: str | None) -> dict[str, Any]:
    try:
        config = DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise SourceError(
            f"the model {model} was not found on this machine or on the hub: {error}",
            do="Give a hub id, a folder with model_index.json or one .safetensors file.",
        ) from error
    return dict(config[0] if isinstance(config, tuple) else config)


def _licence(path: Path) -> str:
    card = path / "README.md"
    if path.is_dir() and card.is_file():
        for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "unknown"
