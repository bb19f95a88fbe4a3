"""A student in a bundle: whether a compressed U-Net fits a source pipeline, and what the Plan takes over from it.

The source stays what the wire and the model digest know: the cloud runs it, and the device finishes with the student.
A student's folder says which source it was made from; another source is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import PlanError, UnitError
from latentrelay.compress.lora import Adapter, merge
from latentrelay.compress.plan import PLAN_JSON, Plan
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.export.errors import SourceError, UnsupportedSourceError
from latentrelay.export.source import SourceModel
from latentrelay.runtime.digest import weights_digest

_CLASSES = {each.__name__: each for each in (StudentUNet2DConditionModel, UNet2DConditionModel)}
_MUST_AGREE = ("in_channels", "out_channels", "cross_attention_dim", "sample_size")


def with_student(
    source: SourceModel, student: Any, adapters: Sequence[Adapter] = ()
) -> tuple[SourceModel, dict[str, Any]]:
    """The source with the student in its U-Net's place, its identity unchanged, and the Plan's `compression`.

    `student`: a U-Net (in float32 it is changed in place), or the folder that `latentrelay compress` wrote (or any with
    `unet/` in diffusers' layout). `adapters` are merged into the student. The source's own pipeline is left as it was.
    Raises SourceError where it cannot be read, UnsupportedSourceError where it does not fit or was made from another
    source, AdapterError.
    """
    compression: dict[str, Any] = {}
    name = "student"
    if isinstance(student, (str, Path)):
        folder = Path(student)
        name = (folder.parent if folder.name == "unet" else folder).resolve().name
        compression = _compression(folder, source, adapted=bool(adapters))
        student = _load(folder)
    own, theirs = source.pipeline.unet.config, student.config
    for setting in _MUST_AGREE:
        got, expected = _plain(theirs.get(setting)), _plain(own.get(setting))
        if got != expected:
            raise UnsupportedSourceError(f"student's {setting}", got=got, expected=expected)
    torch.nn.Module.to(student, device="cpu", dtype=torch.float32, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    student.eval().requires_grad_(False)
    pipeline: Any = source.pipeline
    parts = {part: getattr(pipeline, part) for part in ("vae", "text_encoder", "tokenizer", "scheduler")}
    swapped = type(pipeline)(
        **parts, unet=student, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    swapped.set_progress_bar_config(disable=True)
    merged = merge(swapped, adapters)
    swapped.scheduler = pipeline.scheduler  # an adapter for few steps brings one; the source's is the bundle's
    parameters = sum(parameter.numel() for parameter in student.parameters())
    arrays = ((key, tensor.detach().cpu().numpy()) for key, tensor in student.state_dict().items())
    digest = weights_digest(arrays)
    record: dict[str, Any] = {**compression, "parameters": parameters, "student_digest": digest}
    note: dict[str, Any] = {"name": name, "digest": digest, "parameters": parameters}
    if merged:
        record["adapters"] = note["adapters"] = [each.document() for each in merged]
    return replace(source, pipeline=swapped, notes={**source.notes, "student": note}), record


def _compression(folder: Path, source: SourceModel, *, adapted: bool) -> dict[str, Any]:
    """What the folder's plan says was done. A folder without a plan says nothing: nothing can be checked then.

    A student with adapters of its own fits a source with adapters merged where it was made from the source before
    that: as of few-step networks, where each side has its own.
    """
    if not (folder / PLAN_JSON).is_file():
        return {}
    try:
        recipe = Plan.load(folder).recipe
    except PlanError as error:
        raise SourceError(f"the student's plan cannot be read: {error}", got=str(folder)) from error
    made_from = (recipe.source.digest, *recipe.compression.get("fits", ()))
    fitting = {source.digest, source.base_digest} if adapted else {source.digest}
    if not fitting & set(made_from):
        raise UnsupportedSourceError(
            "student, which was made from another model", got=source.digest, expected=" or ".join(made_from)
        )
    return dict(recipe.compression)


def _load(folder: Path) -> Any:
    place = next((each for each in (folder / "unet", folder) if (each / "config.json").is_file()), None)
    if place is None:
        raise SourceError("the student was not found", got=str(folder), expected="a folder with unet/config.json")
    try:
        name = json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name")
        kind: Any = _CLASSES.get(name)
        if kind is None:
            raise SourceError("the student is of another class", got=name, expected=" | ".join(_CLASSES))
        return kind.from_pretrained(place, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, UnitError) as error:
        raise SourceError(f"the student in {folder} cannot be read: {error}", do="Make it again.") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
