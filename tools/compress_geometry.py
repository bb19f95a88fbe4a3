"""Compression of a geometry: the real sizes with random weights, to see what fits before any download or training.

Scores of random weights mean nothing and would take days at this size: the shipped prior is used, and said.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.budget import budget_of, student_within
from latentrelay.compress.errors import CompressError
from latentrelay.compress.geometry import Geometry, named
from latentrelay.compress.light_vae import sd_light_decoder
from latentrelay.compress.plan import PlanSource, full_plan
from latentrelay.compress.plan_student import StudentPlan, build_student, plan_student
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.prune_unet import prune_unet
from latentrelay.compress.published_recipes import LCM_EMBEDDING, RECIPES, published_widths
from latentrelay.compress.remove_blocks import parameter_count, remove_blocks
from latentrelay.compress.sensitivity import score_prior
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.student_unet import StudentUNet2DConditionModel, widths_of
from latentrelay.device_profiles import DeviceProfile
from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import sampler_rule, scheduler_digest
from latentrelay.tools.compress import note, plan_document, student_target
from latentrelay.tools.console import counting
from latentrelay.tools.student_folder import roundtrip_identical, student_folder

SEED = 0


def compress_geometry(
    name: str,
    output: Path,
    *,
    profile: DeviceProfile | None,
    recipe: str | None,
    parameters: int | None,
    allocation: str,
    overwrite: bool,
    max_step_ms: float | None = None,
) -> dict[str, Any]:
    """Write the student's U-Net and a Plan below `output`; the document that the command prints."""
    geometry = named(name)
    if recipe is not None and recipe not in RECIPES:
        raise RequestError("unknown recipe", got=recipe, expected=" | ".join(RECIPES))
    note(f"{name}: random weights; scores come from the shipped prior" if recipe is None else f"{name}: random weights")
    budget: dict[str, Any] | None = None
    if recipe is None:
        budget = student_target(name, profile, parameters, max_step_ms)
    with counting("making the source U-Net", 4) as advance:
        torch.manual_seed(SEED)
        source: Any = UNet2DConditionModel.from_config(dict(geometry.unet)).eval()
        source_parameters = parameter_count(source)
        advance("removing blocks and pruning", 1)
        student, plan = _student(source, geometry, recipe, budget, profile, allocation)
        del source
        advance("saving and loading it again", 1)
        with student_folder(output, overwrite=overwrite) as folder:
            student.save_pretrained(folder / "unet", safe_serialization=True)
            document = _document(geometry, student, plan, source_parameters, recipe, budget)
            _write_plan(folder, geometry, student, profile, document)
            if not roundtrip_identical(student, folder / "unet", geometry.tokens):
                raise CompressError("the saved student does not load to the same network", do="Report it.")
            document["roundtrip_identical"] = True
            advance("done", 1)
    return {**document, "student": str(output)}


def _student(
    source: Any,
    geometry: Geometry,
    recipe: str | None,
    budget: dict[str, Any] | None,
    profile: DeviceProfile | None,
    allocation: Any,
) -> tuple[StudentUNet2DConditionModel, StudentPlan]:
    if recipe is not None or budget is None:
        published = RECIPES[str(recipe)]
        smaller = remove_blocks(source, published.blocks)
        widths = published_widths(published, prunable_units(smaller))
        student = prune_unet(smaller, widths)
        count = parameter_count(student)
        return student, StudentPlan(published.blocks, widths, count, published.parameters, allocation, 0.0)
    scores = score_prior(prunable_units(source))
    if budget["parameters"] is not None:
        plan = plan_student(source, scores, budget["parameters"], allocation=allocation)
        return build_student(source, plan), plan
    if profile is None:
        raise RequestError("nothing says how small the student is to be", do="Give --device, --parameters or --recipe.")
    within = student_within(
        source,
        scores,
        budget_of(profile, step_ms=budget.get("step_ms")),
        geometry,
        allocation=allocation,
        profile=profile,
    )
    budget |= {
        "limited_by": within.admitted.limiting,
        "parameters": within.admitted.parameters,
        "limits": [asdict(limit) for limit in within.admitted.limits],
        "precision": within.admitted.precision,
        "predicted_peak_memory_mib": within.peak_memory_mib,
        "predicted_file_bytes": within.file_bytes,
    }
    return build_student(source, within.plan), within.plan


def _document(
    geometry: Geometry,
    student: StudentUNet2DConditionModel,
    plan: StudentPlan,
    source_parameters: int,
    recipe: str | None,
    budget: dict[str, Any] | None,
) -> dict[str, Any]:
    widths, count = widths_of(student), parameter_count(student)
    light = parameter_count(sd_light_decoder())
    return {
        "geometry": geometry.name,
        "recipe": recipe,
        "parameters": count,
        "source_parameters": source_parameters,
        "target_parameters": RECIPES[recipe].parameters if recipe is not None else (budget or {})["parameters"],
        "budget": budget,
        "block_mid_channels": list(widths["resnet_mid_channels"].values()),
        "self_attention_heads": list(widths["self_attention_heads"].values()),
        "cross_attention_heads": list(widths["cross_attention_heads"].values()),
        "light_decoder_parameters": light,
        "with_light_decoder": count + light,
        # The sum that the paper states has the few-step variant's guidance embedding in it.
        "published_total": count + LCM_EMBEDDING + light if recipe == "hybrid-sd-224m" else None,
        "scores": "none: published widths" if recipe is not None else "prior",
        "shape": plan_document(plan),
    }


def _write_plan(
    folder: Path,
    geometry: Geometry,
    student: StudentUNet2DConditionModel,
    profile: DeviceProfile | None,
    document: dict[str, Any],
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    sampler = "dpmsolver++"
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        **dict(sampler_rule(sampler).overrides),
    )  # fmt: skip
    steps = profile.defaults.num_steps if profile is not None else 25
    compression = {
        key: value
        for key, value in document.items()
        if key not in ("block_mid_channels", "self_attention_heads", "cross_attention_heads")
    }
    full_plan(
        PlanSource(f"{geometry.name} with random weights", "sha256:" + "0" * 64, "sd1"),
        profile.model_dump(mode="json") if profile is not None else {},
        sampler,
        type(scheduler).__name__,
        scheduler_digest(type(scheduler).__name__, dict(scheduler.config)),
        solver_table(scheduler, steps),
        {**compression, "student_digest": weights_digest(_arrays(student))},
    ).save(folder)


def _arrays(module: Any) -> Any:
    return ((name, tensor.detach().numpy()) for name, tensor in module.state_dict().items())
