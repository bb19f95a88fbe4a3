"""The public export: a source pipeline and a device profile go in, a checked bundle folder comes out.

Here the request is checked and the schedule decided; bundle_job.py does the work, stage by stage. The bundle is written
beside its final place, so a refusal at any point leaves nothing behind there; stages that are done stay in the work
folder, where one is given, and the next build takes them.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
from latentrelay.compress.lora import Adapter
from latentrelay.compress.plan import Plan, PlanSource, full_plan
from latentrelay.compress.precision import PRECISIONS, PrecisionRecipe
from latentrelay.compress.solver_tables import solver_table
from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.export.architecture import latent_size
from latentrelay.export.bundle_folder import bundle_folder, check_output
from latentrelay.export.bundle_job import BundleJob, versions
from latentrelay.export.calibration import Calibration, default_calibration
from latentrelay.export.errors import UnsupportedSourceError
from latentrelay.export.light_decoder import checked_light_vae
from latentrelay.export.package_style import PackageStyle
from latentrelay.export.prediction_pass import PredictionAsk
from latentrelay.export.source import SourceModel, load_source
from latentrelay.export.stages import StageStore
from latentrelay.export.student import with_student
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.samplers import is_few_step, sampler_for, sampler_rule, scheduler_digest

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the folder, its digest ("sha256:<hex>"), lowest SNR in dB per component, seconds a stage.

    `reused`: stages that were taken from the work folder. `quality`: what the precision cost, as in the manifest.
    `stages`: their folders by name, where a work folder was given.
    """

    bundle: Path
    digest: str
    parity_db: Mapping[str, float]
    seconds: Mapping[str, float]
    precision: str = "fp32"
    reused: tuple[str, ...] = ()
    quality: Mapping[str, Any] = field(default_factory=dict)
    coreml: tuple[CoreMLPackage, ...] = ()
    stages: Mapping[str, Path] = field(default_factory=dict)


def export(
    pipeline_or_model: Any,
    profile: DeviceProfile | str,
    out: Path | str,
    *,
    sampler: str | None = None,
    num_steps: int = 25,
    height: int | None = None,
    width: int | None = None,
    guidance: float = 7.5,
    few_step: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    light_vae: Any = None,
    student: Any = None,
    student_loras: Sequence[Adapter] = (),
    precision: str = "fp32",
    calibration: Calibration | None = None,
    work: Path | str | None = None,
    recipe: PrecisionRecipe | None = None,
    packages: PackageStyle | None = None,
    prediction: PredictionAsk | None = None,
) -> ExportResult:
    """Export a Stable Diffusion pipeline as a bundle for a device.

    `pipeline_or_model`: a StableDiffusionPipeline (moved to float32 on the CPU), a hub id, a folder, a .safetensors
    file, or what `load_source` returned. `profile`: a DeviceProfile or its name. `sampler`: "dpmsolver++", "ddim" or
    "lcm", by default the source's own where it has tables, else DPM-Solver++(2M). `height`, `width`: pixels, by default
    the U-Net's own size. `guidance`: the bundle's default scale (>= 1), which the parity run uses too; with "lcm" it is
    in the network and the bundle's is 1. "lcm" is for networks distilled to latent consistency; where the source does
    not say that it is one (its scheduler is LCM's), `few_step=True` says so. `progress` is called with one sentence per
    stage. `light_vae`: an AutoencoderTiny, or the folder of one, whose decoder the bundle holds in the place of the
    source's; latents on the wire, and which cloud model may start a run, stay the source's. `student`: a compressed
    U-Net, or the folder that `latentrelay compress` wrote, which runs on the device in the place of the source's,
    with `student_loras` merged into it. `precision`: of the device's U-Net, one of `compress.precision.PRECISIONS`, or
    "target" for the profile's own. `calibration`: the prompts that a quantised U-Net's ranges and tables are fitted and
    judged on (`default_calibration()` if not given). `work`: a folder for stages that a later build can take over; with
    None they are made in a temporary folder beside `out` and removed. `recipe`: a rule for every layer, in the place of
    the precision's plain ones; its precision is the bundle's, and its kernels must be the profile's. `packages`: how
    Core ML packages are written, for a profile whose backend is Core ML. `prediction`: how much faster the device's
    part should run by predicting steps instead of computing them, fitted and judged on `calibration` too.

    Raises ExportError and its kin (source, architecture, output, parity), UnsupportedSchedulerError, ProfileError,
    RequestError.
    """
    if not 1.0 <= guidance < math.inf:
        raise RequestError(
            "guidance is out of range", got=guidance, expected=">= 1 (1 is no guidance)", do="Change it."
        )
    target = load_profile(profile) if isinstance(profile, str) else profile
    folder = Path(out).absolute()
    check_output(folder, overwrite=overwrite)
    wanted = target.target_precision if precision == "target" else precision
    if wanted not in PRECISIONS:
        raise RequestError("unknown precision", got=precision, expected=" | ".join((*PRECISIONS, "target")))
    if packages is not None and target.backend.name != "coreml":
        raise RequestError("only a Core ML profile has packages", got=target.name, do="Leave their style out.")
    if recipe is not None:
        wanted = _agreed(recipe, precision, target)
    with _work(work, folder) as place:
        stages = StageStore(place, progress or (lambda words: None), versions())
        with stages.timed("source", "reading the source pipeline"):
            source = load_source(pipeline_or_model)
            cloud = source.pipeline
            compression: Mapping[str, Any] = {}
            if student is not None:
                source, compression = with_student(source, student, student_loras)
        scheduler, plan = _schedule(source, target, sampler, num_steps, few_step, compression)
        if prediction is not None:
            prediction.check(plan, target)
        if sampler_rule(plan.recipe.sampler).branches == 1:
            guidance = 1.0
        downscale = 2 ** (len(source.pipeline.vae.config.block_out_channels) - 1)
        vae = source.pipeline.vae if light_vae is None else checked_light_vae(light_vae, source.pipeline)
        rows, columns = latent_size(source.pipeline.unet, height, width, downscale)
        job = BundleJob(
            source, cloud, target, plan, scheduler, rows, columns, downscale, guidance, vae,
            wanted, calibration or default_calibration(), stages, recipe, packages or PackageStyle(), prediction,
        )  # fmt: skip
        with bundle_folder(folder, overwrite=overwrite) as partial:
            digest, parity_db, refined = job.run(folder.name, partial)
    return ExportResult(
        folder, digest, parity_db, stages.seconds, wanted, tuple(stages.reused), refined.quality, refined.coreml,
        dict(stages.places) if work is not None else {},
    )  # fmt: skip


def _agreed(recipe: PrecisionRecipe, precision: str, profile: DeviceProfile) -> str:
    """The recipe's precision; raises RequestError where it is not for this profile's kernels or what was asked for."""
    if profile.backend.name == "coreml":
        raise RequestError(
            "recipes are for ONNX graphs", got=profile.name, do="Leave it out: Core ML has its own rules."
        )
    if recipe.kernels != profile.backend.kernels:
        raise RequestError(
            "the recipe is for other kernels", got=recipe.kernels, expected=profile.backend.kernels, do="Make it again."
        )
    if precision not in ("fp32", "target", recipe.precision):
        raise RequestError("the recipe is of another precision", got=recipe.precision, expected=precision)
    return recipe.precision


@contextlib.contextmanager
def _work(given: Path | str | None, out: Path) -> Iterator[Path]:
    """The folder of the stages: the one given, or one that is removed at the end."""
    if given is not None:
        place = Path(given).absolute()
        if place == out or out in place.parents:
            raise RequestError("the work folder lies in the bundle", got=str(place), expected=f"outside {out}")
        yield place
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".work", dir=out.parent) as folder:
        yield Path(folder)


def _schedule(
    source: SourceModel,
    profile: DeviceProfile,
    sampler: str | None,
    num_steps: int,
    few_step: bool,
    compression: Mapping[str, Any],
) -> tuple[Any, Plan]:
    own = source.pipeline.scheduler
    name = sampler or sampler_for(type(own).__name__)
    rule = sampler_rule(name)
    _check_few_step(name, type(own).__name__, few_step)
    scheduler = getattr(diffusers, rule.scheduler_class).from_config(own.config, **rule.overrides)
    trained = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= trained:
        raise UnsupportedSourceError("number of steps", got=num_steps, expected=f"1..{trained}")
    digest = scheduler_digest(rule.scheduler_class, dict(scheduler.config))
    plan = full_plan(
        PlanSource(source.model, source.digest, source.family),
        profile.model_dump(mode="json"),
        name,
        rule.scheduler_class,
        digest,
        solver_table(scheduler, num_steps),
        compression,
    )
    return scheduler, plan


def _check_few_step(sampler: str, own: str, few_step: bool) -> None:
    """A network that was not distilled to consistency makes mush of four steps, and one that was of twenty-five."""
    distilled = few_step or is_few_step(own)
    if sampler == "lcm" and not distilled:
        raise RequestError(
            "sampler lcm is for networks distilled to latent consistency, which the source does not say it is",
            got=f"its scheduler is {own}",
            expected="LCMScheduler, or a consistency adapter merged",
            do="Merge one with --lora, or give --few-step (in Python, few_step=True) if it is one.",
        )
    if sampler != "lcm" and distilled:
        raise RequestError(
            "the source was distilled to latent consistency: its guidance is in the network",
            got=f"sampler {sampler}",
            expected="lcm",
            do="Leave the sampler out, or give the model it was distilled from.",
        )
