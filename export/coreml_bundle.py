"""The `coreml/` folder of a bundle: text encoder, step and VAE decoder as .mlpackage folders, checked against torch.

`write_coreml(folder, parts, plan, profile, precision, samples)` converts, compresses, cuts where a file would be too
large, and gates: the saved packages are run on the samples and compared with what torch said. On a Mac they are run
by Core ML itself, elsewhere by the interpreter (`export/mil_interpreter.py`); `parity_method()` says which.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import LayerRule
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.coreml_chunks import chunk, weight_bytes
from latentrelay.export.coreml_compress import (
    WEIGHTS_OF,
    Range,
    check_target,
    compress,
    input_ranges,
    quantise_inputs,
)
from latentrelay.export.coreml_convert import check_operators, convert, load_program, package_bytes, save_package
from latentrelay.export.coreml_graphs import PackageInput
from latentrelay.export.coreml_predicted import predicted_samples, step_modules
from latentrelay.export.coremltools_import import coremltools
from latentrelay.export.errors import ConversionError, ParityError
from latentrelay.export.mil_interpreter import Arrays, MilProgram
from latentrelay.export.onnx_graphs import TextEncoderGraph, decoder_graph
from latentrelay.export.parity import Sample, snr_db
from latentrelay.runtime.manifest import CoreMLPackage, Port

FOLDER = "coreml"
MIB = 2**20
# Lowest SNR in dB over a component's samples and outputs. fp16 is the promise; the others only catch a broken
# conversion, and how good a compressed network is stands in the bundle's quality figures.
GATES_DB: Mapping[str, float] = {
    "fp32": 60.0,
    "fp16": 35.0,
    "w8a16": 25.0,
    "w8a8": 12.0,
    "w4a16": 8.0,
    "w4a8": 6.0,
}
# The step's head, tail and the sine of the timestep keep float32: 999 x frequency has no fraction left in float16.
FLOAT32_MODULES = ("head", "guess", "tail", "time_proj")
# Apple's, by our role; theirs have no predicted step
_NAMES = {
    "text_encoder": "text_encoder",
    "step_full": "unet",
    "step_predicted": "unet_predicted",
    "vae_decoder": "vae_decoder",
}
_STEPS = ("step_full", "step_predicted")

Progress = Callable[[str], None]
Run = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class CoreMLParts:
    """The networks that are converted, in torch: the device's U-Net, the text encoder, the VAE whose decoder ships."""

    unet: torch.nn.Module
    text_encoder: torch.nn.Module
    vae: torch.nn.Module


@dataclass(frozen=True)
class _Component:
    """One component to convert: its role in the bundle, module, signature, and the precision it gets."""

    role: str
    module: torch.nn.Module
    inputs: Sequence[PackageInput]
    outputs: Sequence[str]
    precision: str
    encoding: str | None
    rules: Mapping[str, LayerRule] | None = None
    float32: Sequence[str] = ()


def write_coreml(
    folder: Path,
    parts: CoreMLParts,
    plan: Plan,
    profile: DeviceProfile,
    precision: str,
    samples: Mapping[str, list[Sample]],
    *,
    rules: Mapping[str, LayerRule] | None = None,
    ranges: Mapping[str, Range] | None = None,
    encoding: str | None = None,
    apple_layout: bool = False,
    progress: Progress = lambda words: None,
) -> tuple[CoreMLPackage, ...]:
    """Write `folder`/coreml/*.mlpackage; returns the manifest's entries, the step's parts in the order they run.

    `samples`: by role, as `collect_samples` makes them ("text_encoder", "step_full", "vae_decoder"). `precision`: of
    the U-Net; the text encoder is w8a16 where it begins with w, and the decoder fp16. `rules`: the recipe's, by layer;
    without them every layer takes the precision. `ranges`: module path in the U-Net -> lowest and highest input, for
    a precision that ends in a8; without them they are taken from the step's samples in torch. `encoding`: how weights
    are stored, one of `coreml_compress.ENCODINGS`, where it is not to be the precision's own. `apple_layout`:
    `prompt_embeds` as (B, D, 1, T).

    Raises DeploymentTargetError before anything is written, ConversionError, UnknownOperatorError, ParityError.
    """
    target, units = _support(profile)
    stored = encoding or WEIGHTS_OF[precision]
    check_target(precision, stored, target)
    text = "w8a16" if precision.startswith("w") else precision
    check_target(text, WEIGHTS_OF[text], target)
    place = folder / FOLDER
    place.mkdir()
    written: list[CoreMLPackage] = []
    if plan.recipe.prediction:
        samples = {**samples, **predicted_samples(parts.unet, plan, samples["step_full"][0].inputs)}
    for component in _components(parts, plan, precision, samples, stored, rules, apple_layout):
        progress(f"Core ML: {_NAMES[component.role]} ({component.precision})")
        rounding: AbstractContextManager[None] = nullcontext()
        if component.role in _STEPS:
            if precision.endswith("a8"):
                ranges = ranges or _measured(component, parts.unet, samples["step_full"])
                rounding = quantise_inputs(parts.unet, ranges, rules)
            component = _with_own_rules(component, parts.unet, samples)
        path = place / _package_name(plan, component.role)
        with rounding:
            model = convert(
                component.module,
                component.inputs,
                component.outputs,
                target=target,
                compute_units=units,
                precision="fp32" if component.precision == "fp32" else "fp16",
                keep_float32=component.float32,
            )
        save_package(compress(model, component.encoding, component.rules), path)
        del model
        check_operators(load_program(path), target)
        paths = _within_limit(path, profile.memory.largest_file_mib, target, component, samples, progress)
        progress(f"Core ML parity: {_NAMES[component.role]}")
        parity_db, sides = _parity(paths, component, samples[component.role], units)
        for i, (each, (inputs, outputs)) in enumerate(zip(paths, sides, strict=True)):
            written.append(
                CoreMLPackage(
                    role=component.role,
                    path=f"{FOLDER}/{each.name}",
                    bytes=package_bytes(each),
                    precision=component.precision,
                    parity_db=parity_db,
                    deployment_target=target,
                    compute_units=units,
                    inputs=inputs,
                    outputs=outputs,
                    part=i + 1,
                    parts=len(paths),
                )
            )
    return tuple(written)


def parity_method() -> str:
    """What packages are run by here: "prediction" (Core ML on macOS) or "interpreter"."""
    return "prediction" if sys.platform == "darwin" else "interpreter"


def _support(profile: DeviceProfile) -> tuple[str, str]:
    target, units = profile.support.coreml_deployment_target, profile.backend.compute_units
    if target is None or units is None:
        raise ConversionError(
            f"{profile.name} is not an Apple profile",
            got=f"backend {profile.backend.name}, deployment target {target}",
            expected="backend coreml with compute_units and support.coreml_deployment_target",
            do="Build for an Apple profile.",
        )
    return target, str(units)


def _components(
    parts: CoreMLParts,
    plan: Plan,
    precision: str,
    samples: Mapping[str, list[Sample]],
    encoding: str | None,
    rules: Mapping[str, LayerRule] | None,
    apple_layout: bool,
) -> list[_Component]:
    text, decoder = ("w8a16", "fp16") if precision.startswith("w") else (precision, precision)
    ids = samples["text_encoder"][0].inputs["input_ids"]
    latent = samples["vae_decoder"][0].inputs["latent_sample"]
    steps = [
        _Component(role, *made, precision, encoding, rules, FLOAT32_MODULES)
        for role, made in step_modules(parts.unet, plan, samples, apple_layout=apple_layout).items()
    ]
    return [
        _Component(
            "text_encoder",
            TextEncoderGraph(parts.text_encoder),
            [PackageInput("input_ids", ids.shape, "int32")],
            ["last_hidden_state", "pooler_output"],
            text,
            WEIGHTS_OF[text],
        ),
        *steps,
        _Component(
            "vae_decoder",
            decoder_graph(parts.vae),
            [PackageInput("latent_sample", latent.shape)],
            ["sample"],
            decoder,
            None,
        ),
    ]


def _package_name(plan: Plan, role: str) -> str:
    """Apple's name: `Stable_Diffusion_version_<id>_<component>.mlpackage`, the id without slashes and the like."""
    model = plan.recipe.source.model
    last = Path(model).name if Path(model).is_absolute() else model
    name = re.sub(r"[^A-Za-z0-9.\-]+", "_", last).strip("_.")[:80] or "model"
    return f"Stable_Diffusion_version_{name}_{_NAMES[role]}.mlpackage"


def _measured(component: _Component, unet: torch.nn.Module, cases: Sequence[Sample]) -> Mapping[str, Range]:
    """Ranges of the U-Net's inputs while the component runs its samples in torch."""

    def calls() -> None:
        for case in cases:
            _call(component, case)

    return input_ranges(unet, calls)


def _with_own_rules(component: _Component, unet: torch.nn.Module, samples: Mapping[str, list[Sample]]) -> _Component:
    """With the rules of the layers that the component runs: a predicted step has the first and the last ones only."""
    if component.rules is None or component.role == "step_full":
        return component
    case = samples[component.role][0]
    run = input_ranges(unet, lambda: _call(component, case))
    return replace(component, rules={path: rule for path, rule in component.rules.items() if path in run})


def _call(component: _Component, case: Sample) -> None:
    feeds = feeds_of(component.inputs, case)
    component.module(*(torch.from_numpy(feeds[each.name]) for each in component.inputs))


def feeds_of(inputs: Sequence[PackageInput], case: Sample) -> Arrays:
    """A sample's inputs as the package declares them: int32, rank 1 for rank 0, (B, D, 1, T) where it wants that."""
    feeds: Arrays = {}
    for each in inputs:
        array = np.asarray(case.inputs[each.name]).astype(each.dtype)
        if array.ndim == 3 and len(each.shape) == 4:
            array = array.transpose(0, 2, 1)[:, :, None, :]
        feeds[each.name] = np.array(array.reshape(each.shape), order="C")
    return feeds


def _within_limit(
    path: Path,
    limit_mib: int | None,
    target: str,
    component: _Component,
    samples: Mapping[str, list[Sample]],
    progress: Progress,
) -> list[Path]:
    """The package, or its two halves where its weights pass the limit; the halves are proved equal to the whole."""
    limit = None if limit_mib is None else limit_mib * MIB
    if limit is None or weight_bytes(path) <= limit:
        return [path]
    progress(f"Core ML: cutting {path.name} in two")
    halves = list(chunk(path, limit, target))
    feeds = feeds_of(component.inputs, samples[component.role][0])
    whole = MilProgram(path)(feeds)
    chained, _ = _chain([MilProgram(half) for half in halves], feeds)
    for name, array in whole.items():
        if not np.array_equal(array, chained[name], equal_nan=True):
            raise ParityError(f"{path.stem} cut in two", snr_db(array, chained[name]), 200.0)
    shutil.rmtree(path)
    return halves


def _chain(programs: Sequence[MilProgram], feeds: Arrays) -> tuple[Arrays, list[tuple[Arrays, Arrays]]]:
    """Run packages in order, each on the inputs and on what came before; also what went in and out of each."""
    values, sides = dict(feeds), []
    for program in programs:
        given = {name: values[name] for name in program.inputs}
        made = program(given)
        sides.append((given, made))
        values |= made
    return values, sides


def _parity(
    paths: Sequence[Path], component: _Component, cases: Sequence[Sample], units: str
) -> tuple[float, list[tuple[tuple[Port, ...], tuple[Port, ...]]]]:
    """The lowest SNR over cases and outputs, gated, and every package's ports."""
    programs = [MilProgram(path) for path in paths]
    runs = [_prediction(path, units) for path in paths] if parity_method() == "prediction" else None
    lowest, ports = 200.0, []
    for i, case in enumerate(cases):
        feeds = feeds_of(component.inputs, case)
        values, sides = _chain(programs, feeds) if runs is None or i == 0 else ({}, [])
        if i == 0:
            ports = [(_ports(given), _ports(made)) for given, made in sides]
        if runs is not None:
            values = dict(feeds)
            for run, program in zip(runs, programs, strict=True):
                values |= run({name: values[name] for name in program.inputs})
        gated = [name for name in component.outputs if name != "choices"]  # counts: one flipped token is no error
        lowest = min(lowest, *(_agreement(case.outputs[name], values[name]) for name in gated))
    gate = GATES_DB[component.precision]
    if not lowest >= gate:
        raise ParityError(f"Core ML {_NAMES[component.role]} ({component.precision})", lowest, gate)
    return round(lowest, 2), ports


def _agreement(expected: np.ndarray[Any, Any], got: np.ndarray[Any, Any]) -> float:
    """SNR in dB; what has rank 0 in ONNX is (1,) here."""
    return snr_db(np.asarray(expected).reshape(got.shape if np.size(expected) == 1 else np.shape(expected)), got)


def open_packages(paths: Sequence[Path], units: str) -> Run:
    """A component's packages as one function of its inputs: by Core ML on a Mac, elsewhere by the interpreter."""
    programs = [MilProgram(path) for path in paths]
    runs: list[Run] = (
        [_prediction(path, units) for path in paths] if parity_method() == "prediction" else list(programs)
    )

    def run(feeds: Arrays) -> Arrays:
        values = dict(feeds)
        for each, program in zip(runs, programs, strict=True):
            values |= each({name: values[name] for name in program.inputs})
        return values

    return run


def _prediction(path: Path, units: str) -> Run:
    model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit[units])
    return lambda feeds: {name: np.asarray(array) for name, array in model.predict(feeds).items()}


def _ports(arrays: Arrays) -> tuple[Port, ...]:
    """Ports as they are named; an output that is the next step's input has its role."""
    return tuple(
        Port(name, name.removeprefix("next_"), str(array.dtype), array.shape) for name, array in arrays.items()
    )
