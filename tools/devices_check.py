"""`latentrelay devices check`: what a device's bundle of a model will take, and whether the device allows it.

In: a device profile and configurations (a named geometry, or a model's config.json files; no weights are read and
nothing is computed). Out: a table, or one JSON object, and exit status 3 where it does not fit. Checked is what is
built for the device: by default the student that `compress --device` would choose, which is the source itself where
that fits.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.device_profiles.preflight import Predicted, Preflight, ladder_dtype, preflight, with_ladders
from latentrelay.runtime.errors import REFUSED, RequestError
from latentrelay.tools.console import counting, emit, err, extra, printable, table
from latentrelay.tools.models import FEW_STEP_STUDENT, OURS, REFERENCE, resolve

# ONNX operators of what export/ writes, by component; a test compares them with an export.
_SHARED = {"Add", "Concat", "Identity", "MatMul", "Mul", "Reshape", "Sigmoid", "Softmax", "Transpose", "Unsqueeze"}
_TEXT = {"ArgMax", "Cast", "Equal", "Gather", "GatherND", "LayerNormalization"}
_STEP = {"Conv", "Cos", "Expand", "Gather", "Gelu", "Gemm", "InstanceNormalization", "LayerNormalization",
         "Resize", "Sin", "Slice", "Split", "Sub", "Where"}  # fmt: skip
_DECODER = {"Conv", "InstanceNormalization", "Resize"}
_LIGHT_DECODER = {"ConstantOfShape", "Conv", "DepthToSpace", "Div", "Relu", "Resize", "Slice", "Sub", "Tanh"}
_RUNGS = 3  # of the highest order that a build with predicted steps may choose
_DYNAMIC = {"Expand", "Range", "Shape", "Slice", "Squeeze"}  # where the batch is not fixed


def run(
    name: str,
    *,
    geometry: str | None,
    model: str | None,
    student: str = "auto",
    vae: Path | None = None,
    precision: str = "fp32",
    height: int | None = None,
    width: int | None = None,
    num_steps: int = 25,
    max_step_ms: float | None = None,
    measure: bool = False,
    cache: Path = Path("runs/latency"),
    profiles: Path | None = None,
    as_json: bool = False,
    predict: str | None = None,
) -> int:
    """Print the prediction; returns the exit status, 0 or 3. `predict`: the target of predicted steps, whose ladders
    are then counted, "auto" as the widest; None: every step is computed. Raises ProfileError, GeometryError,
    RequestError."""
    profile = load_profile(name, profiles)
    if (geometry is None) == (model is None):
        raise RequestError("one of --geometry and --model is needed", got=[geometry, model], expected="exactly one")
    with extra("compress", "predicting a bundle's footprint"):
        from latentrelay.compress import footprint as foot
        from latentrelay.compress.budget import budget_of, largest_parameters
        from latentrelay.compress.geometry import named
    with counting("predicting from shapes", None):
        source = named(geometry) if geometry is not None else _geometry_of(str(model))
        source = source.at(height, width)
        if vae is not None:
            source = source.with_vae(_config(vae))
        elif model in OURS and student != "none":
            source = source.with_vae(_config(Path(resolve(REFERENCE)) / "light_vae"))  # what build takes
        shape, refusal = _chosen(source, _released(model, student, profile), profile, precision, max_step_ms)
        result = foot.footprint(shape, precision, num_steps=num_steps)
        step_ms, how = _step_ms(shape, profile, measure, cache)
        predicted = Predicted(
            precision,
            result.parameters,
            result.bytes,
            result.largest_file,
            round(result.largest_file_bytes / foot.MIB, 1),
            round(result.peak_memory_mib, 1),
            result.limiting_stage,
            {stage.name: round(stage.peak_mib, 1) for stage in result.stages},
            _operators(profile),
            step_ms,
        )
        kept_in = None
        if predict is not None:
            ladders = ladder_shapes(shape, predict)
            core_ml = profile.backend.name == "coreml"  # whose packages keep them in float32
            kept_in = "float32" if core_ml else ladder_dtype(profile, predicted, ladders)
            predicted = with_ladders(predicted, ladders, kept_in)
        verdict = preflight(profile, predicted, max_step_ms=max_step_ms)
        admitted = largest_parameters(budget_of(profile), shape, precision)
    document = _document(profile, shape.name, student, predicted, verdict, result, how, admitted, refusal)
    if kept_in is not None:
        document["predicted"] |= {"ladder_mib": round(predicted.ladder_mib, 3), "ladder_dtype": kept_in}
    emit(document, as_json, lambda console: _show(console, profile, document, verdict, result))
    if not verdict.fits:
        err.print(f"[bold red]latentrelay:[/] {printable(document['reason'])}")
    return 0 if verdict.fits else REFUSED


def ladder_shapes(shape: Any, target: str) -> list[tuple[int, ...]]:
    """The widest ladders (rungs, 2, channels, rows, columns) of a build that predicts `target`, one a stream: what is
    predicted, and the probe where tokens may choose. Raises RequestError."""
    allowed = ("auto", "whole_output", "deep_feature")
    if target not in allowed:
        raise RequestError("unknown target of prediction", got=target, expected=" | ".join(allowed))
    unet = shape.build_unet()
    last, first = unet.up_blocks[-1].resnets, unet.down_blocks[0].resnets[0]
    deep = last[-2].conv2.out_channels if len(last) > 1 else last[-1].conv1.in_channels
    streams = (int(shape.unet["in_channels"]) if target == "whole_output" else deep, first.conv1.out_channels)
    return [(_RUNGS, 2, channels, shape.rows, shape.columns) for channels in streams]


def _geometry_of(model: str) -> Any:
    """The geometry of a folder or a hub model, from its configuration files alone."""
    from latentrelay.compress.geometry import from_folder

    if model in OURS:
        from latentrelay.reference.pipeline import reference_path

        return from_folder(reference_path(), name=model)
    path = Path(model).expanduser()
    if path.is_dir():
        return from_folder(path)
    if path.suffix == ".safetensors" or path.is_file():
        raise RequestError(
            "a single file does not hold its configuration", got=model, expected="a folder or a hub id",
            do="For a Stable Diffusion 1.x file, give --geometry sd14.",
        )  # fmt: skip
    return from_folder(_hub_configs(model), name=model)


def _released(model: str | None, student: str, profile: DeviceProfile) -> str:
    """On the reference, auto is the student released for the profile's class, as it is for build."""
    if model not in OURS or student != "auto":
        return student
    from latentrelay.reference.students import RELEASED_FOR

    return RELEASED_FOR[profile.student_class] if model == REFERENCE else FEW_STEP_STUDENT


def _hub_configs(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*/config.json", "tokenizer/tokenizer_config.json"]))
    except Exception as error:  # the hub's own classes and the network's share no narrower root
        raise RequestError(
            f"the model {model} was not found here or on the hub ({type(error).__name__})",
            do="Give a folder in diffusers' layout, a hub id, or --geometry sd14.",
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    from latentrelay.compress.geometry import read_config

    inner = next((folder / part for part in ("unet", "vae") if (folder / part / "config.json").is_file()), folder)
    return read_config(inner)


def _chosen(
    source: Any, student: str, profile: DeviceProfile, precision: str, max_step_ms: float | None
) -> tuple[Any, str | None]:
    """The geometry that is built: the source's, a student's, or the automatic one's; why there is no automatic one."""
    if student == "none":
        return source, None
    if student != "auto":
        folder = Path(student).expanduser()
        if not folder.is_dir():
            from latentrelay.reference.pipeline import reference_path

            folder = reference_path() / "students" / student
            if not folder.is_dir():
                known = " | ".join(sorted(each.name for each in folder.parent.iterdir()))
                raise RequestError("no such student", got=student, expected=known, do="Or give a folder with unet/.")
        return source.with_unet(_config(folder)), None
    from latentrelay.compress.budget import budget_of, planned_unet, student_within
    from latentrelay.compress.keep_ratios import BudgetError
    from latentrelay.compress.prunable_units import prunable_units
    from latentrelay.compress.sensitivity import score_prior

    unet = source.build_unet()
    scores = score_prior(prunable_units(unet))
    try:
        within = student_within(
            unet, scores, budget_of(profile, step_ms=max_step_ms), source, precision, profile=profile
        )
    except BudgetError as error:
        return source, str(error)
    return source.with_unet(dict(planned_unet(unet, within.plan).config)), None


def _operators(profile: DeviceProfile) -> dict[str, frozenset[str]]:
    more = set() if profile.support.static_shapes_only else _DYNAMIC
    fused = {"MultiHeadAttention"} if profile.backend.kernels.startswith("onnxruntime") else set()
    parts = {"text_encoder": _TEXT, "unet": _STEP | fused, "vae_decoder": _DECODER | _LIGHT_DECODER}
    return {name: frozenset(_SHARED | own | more) for name, own in parts.items()}


def _step_ms(shape: Any, profile: DeviceProfile, measure: bool, cache: Path) -> tuple[float | None, str]:
    """Milliseconds of a guided step on the device, and how they were come by."""
    from latentrelay.compress.step_estimate import estimated_step_ms

    own = None
    if measure:
        from latentrelay.tools.time_blocks import measured_table

        unet = shape.build_unet()
        own = measured_table(unet, shape.rows, shape.columns, shape.tokens, cache, lambda words: err.print(words))
    return estimated_step_ms(shape, profile, own)


def _document(
    profile: DeviceProfile,
    shape: str,
    student: str,
    predicted: Predicted,
    verdict: Preflight,
    result: Any,
    how: str,
    admitted: Any,
    refusal: str | None,
) -> dict[str, Any]:
    limiting = verdict.limiting
    how_much = f"{_plain(limiting.predicted)} of {_plain(limiting.allowed)}"
    words = f"{limiting.name} of {limiting.part}: {how_much} {limiting.words}"
    largest = {stage.name: stage.largest_activation for stage in result.stages}
    if limiting.name == "peak_memory":
        words += f"; largest activation: {largest[limiting.part]}"
    return {
        "device": profile.name,
        "source": shape,
        "student": student,
        "fits": verdict.fits,
        "limiting": limiting.name,
        "limiting_part": limiting.part,
        "reason": f"does not fit {profile.name}: {refusal or words}" if not verdict.fits else words,
        "predicted": {
            "parameters": predicted.parameters,
            "all_parameters": result.all_parameters,
            "bytes": predicted.bytes,
            "peak_memory_mib": predicted.peak_memory_mib,
            "step_ms": predicted.step_ms,
            "step_ms_source": how,
            "largest_file": predicted.largest_file,
            "largest_file_mib": predicted.largest_file_mib,
            "memory_mib_by_stage": dict(predicted.memory_by_stage),
            "largest_activation": largest,
            "precision": predicted.precision,
            "label": "calibrated" if result.calibrated else "estimate",
        },
        "allowed": {
            "parameters": profile.target_unet_parameters.parameters,
            "peak_memory_mib": profile.memory.application_ceiling_mib,
            "largest_file_mib": profile.memory.largest_file_mib,
            "denied_operators": list(profile.support.denied_ops),
        },
        "checks": [asdict(check) | {"load": round(check.load, 4)} for check in verdict.checks if check.allowed > 0],
        "admitted_parameters": {limit.name: limit.parameters for limit in admitted.limits},
    }


def _show(console: Any, profile: DeviceProfile, document: dict[str, Any], verdict: Preflight, result: Any) -> None:
    rows = [
        [check.name, _plain(check.predicted), _plain(check.allowed), "yes" if check.fits else "NO", check.part]
        for check in verdict.checks
    ]
    console.print(table(["limit", "predicted", "allowed", "fits", "part"], rows, title=profile.title))
    if document["student"] == "auto":
        chosen = (
            "the released student" if document["source"] in OURS else "the student that `compress --device` chooses"
        )
        console.print(f"checked: {chosen}, not the whole U-Net of {printable(document['source'])} (--student none)")
    stages = ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in document["predicted"]["memory_mib_by_stage"].items())
    if "ladder_dtype" in document["predicted"]:
        stages += (
            f"; {document['predicted']['ladder_mib']:,.1f} MiB of ladders in {document['predicted']['ladder_dtype']}"
        )
    ms, how = document["predicted"]["step_ms"], document["predicted"]["step_ms_source"]
    console.print(f"memory by stage: {stages} ({document['predicted']['label']})")
    console.print(f"one guided step: {'unknown' if ms is None else f'{ms:,.0f} ms'}, {printable(how)}")
    words = "[green]fits[/]" if verdict.fits else "[red]does not fit[/]"
    console.print(f"{words}; limiting: {printable(document['reason'])}")


def _plain(number: float) -> str:
    """ "330,000,000" and "945.6"."""
    return f"{number:,.0f}" if number == int(number) or number >= 10_000 else f"{number:,.1f}"
