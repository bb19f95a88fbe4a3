"""`latentrelay build`: source pipeline + device profile -> bundle, with a line a stage and the parity figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.samplers import sampler_for, sampler_reason
from latentrelay.tools.console import counting, emit, err, extra, printable, table
from latentrelay.tools.models import (
    FEW_STEP,
    FEW_STEP_STUDENT,
    OURS,
    REFERENCE,
    adapters,
    default_guidance,
    few_step_adapters,
    public_name,
    resolve,
)

_SEED = 4  # of the reference's calibration captions


def run(
    model: str,
    device: str,
    output: Path,
    *,
    revision: str | None,
    config: str | None,
    num_steps: int,
    sampler: str | None,
    height: int | None,
    width: int | None,
    guidance: float | None,
    profiles: Path | None,
    overwrite: bool,
    as_json: bool,
    loras: Sequence[str] = (),
    few_step: bool = False,
    student: str = "auto",
    light_vae: str = "auto",
    data: Path | None = None,
    steps: int | None = None,
    precision: str = "auto",
    prompts: Path | None = None,
    work: Path | None = None,
    recipe: Path | None = None,
    coreml_encoding: str | None = None,
    apple_layout: bool = False,
    speedup: float | None = None,
    predict: str = "auto",
    predict_splits: str | None = None,
    hot_speedup: float | None = None,
) -> None:
    """Build and print.

    `speedup`, `predict`, `predict_splits` (numbers with commas): which steps the device predicts; None computes all.
    `hot_speedup`: of second masks with fewer computed steps, for a device that is hot.

    `precision`: of the device's U-Net; "auto" is the profile's own. `prompts`: a file, one a line, to calibrate on.
    `work`: where stages are kept for the next build, OUTPUT.work if not given. `recipe`: a file with a rule for every
    layer; a released student's own if not given.

    `student`: a released name or a folder whose U-Net runs the device's steps, "none" for the source's own, or "auto":
    on the reference the student released for the profile's class (with its consistency adapters for few steps), on any
    other model one compressed first where `data` is given, else the source's own. `light_vae`: "released", a folder,
    "none", or "auto": the released one on the reference. `steps`: of the compression.
    """
    profile = load_profile(device, profiles)
    with extra("export", "building a bundle"):
        from latentrelay.export import export, load_source
        from latentrelay.export.bundle_folder import check_output
    check_output(output.absolute(), overwrite=overwrite)
    prediction = _prediction(speedup, predict, predict_splits, hot_speedup)
    if (data is None and steps is not None) or (data is not None and (model in OURS or student != "auto")):
        raise RequestError(
            "--data and --steps are for compressing a model of your own first",
            do="Leave them out, or give --student auto.",
        )
    compressing = {"data": data, "steps": steps, "revision": revision, "config": config}
    parts = _for_device(model, profile, output.absolute(), student, light_vae, compressing, loras)
    with counting("reading the source pipeline", None) as advance:
        source = load_source(
            resolve(model), revision, name=public_name(model), config=config, loras=adapters(model, loras)
        )
        reason = sampler_reason(type(source.pipeline.scheduler).__name__)
        if sampler is None and reason is not None:
            err.print(f"[yellow]sampler:[/] {reason}")
        chosen = _precision(precision, profile, sampler or own_sampler(source))
        place = work or output.absolute().with_name(output.absolute().name + ".work")
        result = export(
            source,
            profile,
            output,
            sampler=sampler,
            num_steps=num_steps,
            height=height,
            width=width,
            guidance=default_guidance(model) if guidance is None else guidance,
            few_step=few_step,
            progress=lambda words: advance(words, 1),
            overwrite=overwrite,
            precision=chosen,
            packages=_packages(coreml_encoding, apple_layout),
            prediction=prediction,
            recipe=_recipe(recipe, parts.get("student"), chosen, profile),
            calibration=calibration(model, prompts),
            work=place,
            **parts,
        )
    document: dict[str, Any] = {
        "bundle": str(result.bundle),
        "digest": result.digest,
        "device": profile.name,
        "precision": result.precision,
        "parity_db": dict(result.parity_db),
        "seconds": dict(result.seconds),
        "reused": list(result.reused),
        "work": str(place),
        "quality": dict(result.quality),
        "coreml": coreml_document(result.coreml),
    }
    rows = [[name, f"{value:.1f} dB"] for name, value in result.parity_db.items()]
    rows += [[f"{name} (time)", f"{value:.1f} s"] for name, value in result.seconds.items()]

    def show(console: Any) -> None:
        console.print(table(["component against torch", "SNR"], rows))
        console.print(f"bundle: [bold]{printable(result.bundle)}[/] ({result.precision})\ndigest: {result.digest}")
        console.print(f"stages: {printable(place)}; the next build takes them over, and it may be removed")

    emit(document, as_json, show)


def _precision(asked: str, profile: DeviceProfile, sampler: str) -> str:
    """The precision to build in. A few-step run has no calibration yet, so there "auto" leaves activations float."""
    if asked != "auto":
        return asked
    target = profile.target_precision
    if sampler == "lcm" and target.endswith("a8"):
        err.print(f"[yellow]precision:[/] {target[:2]}a16, not {target}: few-step runs are not calibrated yet")
        return f"{target[:2]}a16"
    return target


def _prediction(speedup: float | None, predict: str, splits: str | None, hot_speedup: float | None = None) -> Any:
    """What is asked to be predicted, None where nothing is. Raises RequestError."""
    from latentrelay.export.prediction_pass import PredictionAsk

    if speedup is None:
        if predict != "auto" or splits is not None or hot_speedup is not None:
            raise RequestError(
                "--predict, --predict-splits and --hot-speedup go with --speedup", do="Give --speedup too."
            )
        return None
    try:
        chosen = tuple(sorted({int(word) for word in splits.split(",")})) if splits is not None else ()
    except ValueError as error:
        raise RequestError("the splits are not numbers", got=splits, expected="numbers with commas, as 0,8") from error
    return PredictionAsk(speedup, predict, chosen, hot_speedup)  # type: ignore[arg-type]  # which checks it


def _packages(encoding: str | None, apple_layout: bool) -> Any:
    """The style asked for, None where nothing was."""
    from latentrelay.export.package_style import PackageStyle

    return PackageStyle(encoding, apple_layout) if encoding is not None or apple_layout else None


def _recipe(given: Path | None, student: Any, precision: str, profile: DeviceProfile) -> PrecisionRecipe | None:
    """The file's, else the one beside the student, else None: the precision's plain rules."""
    from latentrelay.tools.recipes import read_recipe, shipped_recipe

    if given is not None:
        return read_recipe(given)
    return shipped_recipe(Path(student), precision, profile.backend.kernels) if student is not None else None


def calibration(model: str, prompts: Path | None) -> Any:
    """Captions of the reference's own splits, a file's lines, or plain prompts."""
    from latentrelay.export.calibration import Calibration, default_calibration, split_prompts

    if prompts is not None:
        try:
            lines = prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the prompts cannot be read: {error}", got=str(prompts)) from error
        return split_prompts(tuple(line.strip() for line in lines if line.strip()))
    if model not in OURS:
        return default_calibration()
    from latentrelay.reference.captions import sample_captions

    fit = dict.fromkeys(caption.text for _, caption in sample_captions("calibrate", 48, _SEED))
    held_out = dict.fromkeys(caption.text for _, caption in sample_captions("gate", 24, _SEED))
    return Calibration(tuple(fit), tuple(text for text in held_out if text not in fit))


def coreml_document(packages: Sequence[CoreMLPackage]) -> dict[str, Any]:
    """{component: {"path", "bytes", "precision", "parity_db"}}; a component in several parts has lists of paths."""
    document: dict[str, Any] = {}
    for package in sorted(packages, key=lambda each: (each.role, each.part)):
        entry = document.setdefault(
            package.role, {"path": [], "bytes": 0, "precision": package.precision, "parity_db": package.parity_db}
        )
        entry["path"].append(package.path)
        entry["bytes"] += package.bytes
    for entry in document.values():
        if len(entry["path"]) == 1:
            entry["path"] = entry["path"][0]
    return document


def own_sampler(source: Any) -> str:
    """The sampler that a source is built with unless told otherwise."""
    return sampler_for(type(source.pipeline.scheduler).__name__)


def _for_device(
    model: str,
    profile: DeviceProfile,
    output: Path,
    student: str,
    light_vae: str,
    compressing: Mapping[str, Any],
    loras: Sequence[str],
) -> dict[str, Any]:
    """What runs on the device in the place of the source's own networks, as arguments of `export`."""
    from latentrelay.compress.lora import Adapter
    from latentrelay.tools.students import find, released

    chosen: dict[str, Any] = {}
    if student == "auto" and model in OURS and loras:
        err.print("[yellow]student:[/] none; the released ones belong to the reference without further adapters")
    elif student == "auto" and model in OURS:
        from latentrelay.reference.students import RELEASED_FOR

        student = RELEASED_FOR[profile.student_class] if model == REFERENCE else FEW_STEP_STUDENT
    elif student == "auto" and compressing["data"] is not None:
        student = str(_compressed(model, profile, output.with_name(output.name + ".student"), compressing, loras))
    if student not in ("auto", "none"):
        weights = Path(resolve(REFERENCE))
        ((name, folder),) = find([student], weights).items()
        chosen["student"] = folder.parent if folder.name == "unet" else folder
        ours = model == FEW_STEP and folder in released(weights).values()
        chosen["student_loras"] = (Adapter(few_step_adapters(name)),) if ours else ()
        own = chosen["student"] / "vae"
        if light_vae == "auto" and model not in OURS and _is_light(own):
            chosen["light_vae"] = own
    if light_vae == "released" or (light_vae == "auto" and model in OURS):
        chosen["light_vae"] = Path(resolve(REFERENCE)) / "light_vae"
    elif light_vae not in ("auto", "none"):
        chosen["light_vae"] = Path(light_vae)
    return chosen


def _is_light(vae: Path) -> bool:
    config = vae / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("_class_name") == "AutoencoderTiny"


def _compressed(
    model: str, profile: DeviceProfile, student: Path, compressing: Mapping[str, Any], loras: Sequence[str]
) -> Path:
    """The student of a model for this device, made beside the bundle; one that is there must be for this device."""
    from latentrelay.compress.plan import Plan
    from latentrelay.tools.compress import Training
    from latentrelay.tools.compress_model import ModelJob

    if (student / "plan.json").is_file():
        made_for = Plan.load(student).recipe.profile.get("name")
        if made_for != profile.name:
            raise RequestError(
                f"{student} holds a student for another device", got=profile.name, expected=made_for, do="Remove it."
            )
        err.print(f"student: {printable(student)} is there already")
        return student
    work = student.with_name(student.name + ".work")
    training = Training(steps=compressing["steps"], data=compressing["data"])
    ModelJob(
        model, student, work, profile, None, None, "sensitivity", tuple(loras), None, training, "measured",
        compressing["revision"], compressing["config"], False,
    ).run()  # fmt: skip
    return student
