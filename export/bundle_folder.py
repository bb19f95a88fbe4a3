"""A bundle's folder: written beside its final place and renamed into it, so a failed export leaves nothing behind.

Also what the Optimum layout needs around the graphs: model_index.json, a config.json per component, the scheduler.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentrelay.export.errors import OutputExistsError
from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.manifest import MANIFEST_NAME, FileEntry


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError unless `out` is free, an empty folder, or a bundle that may be replaced."""
    if not (out.exists() or out.is_symlink()):
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputExistsError("the output is not a folder", got=str(out), do="Choose another output folder.")
    if not any(out.iterdir()):
        return
    if not _is_bundle(out):
        raise OutputExistsError(
            "the output folder holds something that is not a bundle", got=str(out), do="Choose another output folder."
        )
    if not overwrite:
        raise OutputExistsError(
            "the output folder is a bundle already",
            got=str(out),
            do="Give --overwrite (in Python, overwrite=True) to replace it.",
        )


@contextlib.contextmanager
def bundle_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `out` to write into; renamed to `out` on success, removed on any failure."""
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, out, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, out: Path, *, overwrite: bool) -> None:
    check_output(out, overwrite=overwrite)  # again: minutes have passed
    if not out.exists():
        os.rename(partial, out)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    try:
        os.rename(out, retired / "bundle")
        try:
            os.rename(partial, out)
        except OSError:
            os.rename(retired / "bundle", out)
            raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _is_bundle(folder: Path) -> bool:
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"schema_version", "components", "files", "digest"} <= set(document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Indented JSON with sorted keys and a newline at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def write_layout(pipeline: Any, scheduler: Any, folder: Path, vae: Any = None) -> None:
    """model_index.json, scheduler/ and the components' config.json, as Optimum's ORTStableDiffusionPipeline reads.
    `vae` stands in for the pipeline's own where the bundle decodes with another."""
    import diffusers

    index = {
        "_class_name": "ORTStableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["optimum.onnxruntime.modeling_diffusion", "ORTTextEncoder"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["optimum.onnxruntime.modeling_diffusion", "ORTUnet"],
        "vae_decoder": ["optimum.onnxruntime.modeling_diffusion", "ORTVaeDecoder"],
        "vae": ["optimum.onnxruntime.modeling_diffusion", "ORTVae"],
    }
    write_json(folder / "model_index.json", index)
    scheduler.save_pretrained(str(folder / "scheduler"))
    for component, module in (("unet", pipeline.unet), ("vae_decoder", vae or pipeline.vae)):
        config = {"_class_name": type(module).__name__, "_diffusers_version": diffusers.__version__}
        write_json(folder / component / "config.json", {**config, **_public(dict(module.config))})
    text = _public(pipeline.text_encoder.config.to_dict())
    write_json(folder / "text_encoder" / "config.json", {**text, "dtype": "float32"})


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without diffusers' bookkeeping: local paths, and lists whose order differs from run to run."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Every file below `folder` but the manifest: POSIX path, size in bytes, sha256; in order of path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return tuple(
        FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, sha256_file(path)) for path in paths
    )
