"""The students a sweep runs: found by name or folder, checked against the teacher, exported as a device's bundle.

A released student is a folder of reference/weights/students; any folder with a `unet/` in diffusers' layout (or that
U-Net's own folder) is taken too. The bundle is the teacher's pipeline with the student in the U-Net's place, built once
and kept under a digest of what it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle
from latentrelay.runtime.digest import json_digest, sha256_file, weights_digest
from latentrelay.runtime.errors import BundleError, RequestError

_MUST_AGREE = ("in_channels", "out_channels", "cross_attention_dim", "sample_size")


@dataclass(frozen=True)
class Student:
    """A loaded U-Net under the name that its rows carry, and its folder: with the Plan, where `compress` wrote one."""

    name: str
    unet: Any
    folder: Path

    @property
    def parameters(self) -> int:
        """How many numbers the U-Net holds."""
        return parameters(self.unet)

    @property
    def digest(self) -> str:
        """ "sha256:<hex>" of its weights."""
        return _digest(self.unet)


def parameters(module: Any) -> int:
    """How many numbers a module holds."""
    return sum(value.numel() for value in module.parameters())


def released(weights: Path) -> dict[str, Path]:
    """The students in a weights folder, by name."""
    return {path.parent.parent.name: path.parent for path in sorted(weights.glob("students/*/unet/config.json"))}


def find(wanted: Sequence[str], weights: Path) -> dict[str, Path]:
    """Folders of U-Nets by the name that rows carry; all released students where none is asked for.

    A folder is called by its last part, or by the one before where that is `unet`. Raises RequestError for what is
    neither a released name nor a folder with a U-Net, and where there is nothing to run.
    """
    known = released(weights)
    if not wanted:
        if not known:
            raise RequestError("no student is released with these weights", do="Name a folder: --student DIR.")
        return known
    found: dict[str, Path] = {}
    for word in wanted:
        path = known.get(word) or _folder(Path(word).expanduser())
        if path is None:
            raise RequestError(
                "no such student", got=word, expected=" | ".join(known) or "a folder", do="Or give a folder with unet/."
            )
        name = word if word in known else (path.parent if path.name == "unet" else path).resolve().name
        if name in found:
            raise RequestError("two students have the same name", got=name, expected="a name each")
        found[name] = path
    return found


def _folder(path: Path) -> Path | None:
    return next((each for each in (path / "unet", path) if (each / "config.json").is_file()), None)


def load(name: str, folder: Path, teacher: Any) -> Student:
    """The U-Net in float32, checked against the teacher's. Raises RequestError, OSError."""
    from diffusers import UNet2DConditionModel
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"the student's config.json is not JSON: {error}", got=str(folder)) from error
    kinds = {kind.__name__: kind for kind in (StudentUNet2DConditionModel, UNet2DConditionModel)}
    kind: Any = kinds.get(config.get("_class_name"))
    if kind is None:
        raise RequestError(
            "the student is of another class", got=str(config.get("_class_name")), expected=" | ".join(kinds)
        )
    unet = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True).float().eval()
    for setting in _MUST_AGREE:
        got, expected = (_plain(each.config[setting]) for each in (unet, teacher.unet))
        if got != expected:
            raise RequestError(f"the student {name} does not fit the teacher: {setting}", got=got, expected=expected)
    return Student(name, unet.requires_grad_(False), folder.parent if folder.name == "unet" else folder)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def bundle_of(
    student: Student,
    teacher: Any,
    folder: Path,
    *,
    name: str,
    light_vae: Path | None,
    num_steps: int,
    guidance: float,
    progress: Callable[[str], None],
) -> Bundle:
    """The student's bundle, from `folder` or exported there: the cloud's identity stays the teacher's, the device runs
    the student. Raises ExportError and its kin."""
    from latentrelay.export import export, load_source
    from latentrelay.tools.demo import machine_profile

    profile, plan = machine_profile(), student.folder / "plan.json"
    made_from = {
        "unet": student.digest,
        "plan": sha256_file(plan) if plan.is_file() else None,
        "rest": [_digest(teacher.vae), _digest(teacher.text_encoder)],
        "light_vae": None if light_vae is None else _folder_digest(light_vae),
        "name": name,
        "num_steps": num_steps,
        "guidance": guidance,
        "profile": profile,
        "version": _version(),
    }
    path = folder / json_digest(made_from)[7:39]
    if path.is_dir():
        try:
            return Bundle.open(path)
        except BundleError:
            progress("the kept bundle is not intact and is built again")
    made = export(
        load_source(teacher, name=name),
        profile,
        path,
        num_steps=num_steps,
        guidance=guidance,
        progress=progress,
        overwrite=True,
        light_vae=light_vae,
        student=student.folder,
    )
    return Bundle.open(made.bundle)


def _digest(module: Any) -> str:
    return weights_digest((name, value.detach().cpu().numpy()) for name, value in module.state_dict().items())


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return json_digest({str(path.relative_to(folder)): sha256_file(path) for path in files})


def _version() -> str:
    from importlib.metadata import version

    return version("latentrelay")
