"""Compression of a model: score its units, choose the student's shape, prune, distil, and write student and Plan.

Stages keep what they made in the work folder (scores by content, encoded pictures, checkpoints), so a run that was
killed goes on where it was. The source is read once and stays as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from latentrelay.compress.budget import budget_of, student_within
from latentrelay.compress.distill_unet import DistilLosses, HeldOut, LatentData, NoiseSchedule, distill_unet
from latentrelay.compress.errors import CompressError, UnitError
from latentrelay.compress.geometry import Geometry
from latentrelay.compress.image_latents import read_captions
from latentrelay.compress.light_vae import load_light_vae
from latentrelay.compress.plan import PlanSource, full_plan
from latentrelay.compress.plan_student import StudentPlan, build_student, plan_student
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.published_recipes import RECIPES, published_widths
from latentrelay.compress.remove_blocks import block_map, parameter_count, remove_blocks
from latentrelay.compress.score_plot import plot_losses, plot_scores
from latentrelay.compress.sensitivity import TorchLatents, score_prior, score_units
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.student_unet import StudentUNet2DConditionModel, widths_of
from latentrelay.compress.training import Recipe
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export import SourceModel, load_source
from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import sampler_for, sampler_rule, scheduler_digest
from latentrelay.tools.compress import Training, note, plan_document, student_target
from latentrelay.tools.compress_data import folder_data, reference_data, scoring_prompts
from latentrelay.tools.console import counting
from latentrelay.tools.models import REFERENCE, adapters, default_guidance, public_name, resolve
from latentrelay.tools.student_folder import roundtrip_identical, student_folder

# Away from the reference the paper's settings are the default: they want an accelerator and days.
PAPER = Recipe(steps=50_000, batch=64, learning_rate=5e-5, warmup=500, decay=0.0, checkpoint_every=500)
SCORING = {"prompts": 16, "steps": 8}


@dataclass(frozen=True)
class ModelJob:
    """One compression of a model; `run` makes the student folder and returns what the command prints."""

    model: str
    output: Path
    work: Path
    profile: DeviceProfile | None
    recipe: str | None
    parameters: int | None
    allocation: str
    loras: Sequence[str]
    light_vae: Path | None
    training: Training
    scores: str
    revision: str | None
    config: str | None
    overwrite: bool
    max_step_ms: float | None = None

    def run(self) -> dict[str, Any]:
        """Every stage in order."""
        if self.recipe is not None and self.recipe not in RECIPES:
            raise RequestError("unknown recipe", got=self.recipe, expected=" | ".join(RECIPES))
        self._check()
        source_unet, budget = self.source.pipeline.unet, self.target
        scores = {} if self.recipe is not None else self._scores()
        plan = self._plan(scores, budget)
        student = build_student(source_unet, plan)
        note(f"student: {parameter_count(student):,} of {parameter_count(source_unet):,} parameters")
        trained = self._distil(student, plan)
        with student_folder(self.output, overwrite=self.overwrite) as folder:
            self._write(folder, student)
            document = {
                "model": self.source.model,
                "parameters": parameter_count(student),
                "source_parameters": parameter_count(source_unet),
                "target_parameters": plan.ceiling,
                "budget": budget,
                "scores_from": "published widths" if self.recipe else self.scores,
                "scores": {path: score for path, score in scores.items() if score != float("inf")},
                "shape": plan_document(plan),
                "light_vae": self.light_vae is not None,
                **trained,
                "student_digest": weights_digest(
                    (name, tensor.detach().numpy()) for name, tensor in student.state_dict().items()
                ),
                "adapters": list(self.source.notes.get("adapters", ())),
            }
            self._full_plan(document).save(folder)
            for name in ("scores.png", "losses.png"):
                if (self.work / name).exists():
                    shutil.copyfile(self.work / name, folder / name)
            if not roundtrip_identical(student, folder / "unet", self.geometry.tokens):
                raise CompressError("the saved student does not load to the same network", do="Report the model.")
        widths = widths_of(student)
        return {
            **document,
            "student": str(self.output),
            "roundtrip_identical": True,
            "block_mid_channels": list(widths["resnet_mid_channels"].values()),
            "self_attention_heads": list(widths["self_attention_heads"].values()),
        }

    # ---- what it starts from ---------------------------------------------------------------------------------------

    @cached_property
    def source(self) -> SourceModel:
        """The source, its adapters merged."""
        return load_source(
            resolve(self.model),
            self.revision,
            name=public_name(self.model),
            config=self.config,
            loras=adapters(self.model, self.loras),
        )

    @cached_property
    def geometry(self) -> Geometry:
        """The source's shapes."""
        pipeline = self.source.pipeline
        size = pipeline.unet.config.sample_size
        rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
        return Geometry(
            self.source.model,
            {**pipeline.unet.config, "_class_name": type(pipeline.unet).__name__},
            {**pipeline.vae.config, "_class_name": type(pipeline.vae).__name__},
            pipeline.text_encoder.config.to_dict(),
            rows,
            columns,
            pipeline.tokenizer.model_max_length,
        )

    @cached_property
    def target(self) -> dict[str, Any]:
        """What limits the student, and how many parameters that admits; {} for a published recipe."""
        if self.recipe is not None:
            return {"limited_by": f"the recipe {self.recipe}", "parameters": RECIPES[self.recipe].parameters}
        return student_target(self.model, self.profile, self.parameters, self.max_step_ms)

    def _check(self) -> None:
        """What can be refused before anything long begins."""
        recipe, _ = self._recipe()
        if recipe.mixed_precision not in ("no", "bf16", "fp16"):
            raise RequestError("unknown mixed precision", got=recipe.mixed_precision, expected="no, bf16 or fp16")
        if recipe.steps > 0 and self.training.data is None and self.model != REFERENCE:
            raise _nothing_to_distil_on()
        if self.training.data is not None:
            read_captions(self.training.data)
        if self.light_vae is not None:
            load_light_vae(self.light_vae)
        if self.recipe is not None:
            published = RECIPES[self.recipe]
            units = prunable_units(remove_blocks(self.source.pipeline.unet, published.blocks))
            widths = published_widths(published, units)
            if any(widths[unit.path] > unit.width for unit in units):
                raise UnitError("the published recipe is for another network", do="Use it with Stable Diffusion 1.x.")
        elif self.target["parameters"] is not None:  # whether it can be met does not depend on the scores
            alike = {**score_prior(prunable_units(self.source.pipeline.unet))}
            plan_student(self.source.pipeline.unet, alike, self.target["parameters"])

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _scores(self) -> dict[str, float]:
        unet = self.source.pipeline.unet
        units = prunable_units(unet)
        if self.scores == "prior":
            return score_prior(units)
        pipeline = self.source.pipeline
        prompts = scoring_prompts(self.model, self.training.data, SCORING["prompts"])
        rule = sampler_rule(sampler_for(type(pipeline.scheduler).__name__))
        scheduler = _scheduler(pipeline, rule)
        run = TorchLatents(
            scheduler,
            _states(pipeline, prompts),
            _states(pipeline, [""]).expand(len(prompts), -1, -1).contiguous(),
            (self.geometry.rows, self.geometry.columns),
            default_guidance(self.model),
            SCORING["steps"],
        )
        with counting("scoring units", len(units) + 3) as advance:
            scores = score_units(
                unet, units, run, self.work / "scores", lambda path, score: advance(f"scored {path}", 1)
            )
        plot_scores(scores, units, self.work / "scores.png")
        return scores

    def _plan(self, scores: Mapping[str, float], budget: dict[str, Any]) -> StudentPlan:
        unet = self.source.pipeline.unet
        allocation: Any = self.allocation
        if self.recipe is not None:
            published = RECIPES[self.recipe]
            smaller = remove_blocks(unet, published.blocks)
            widths = published_widths(published, prunable_units(smaller))
            return StudentPlan(published.blocks, widths, published.parameters, published.parameters, allocation, 0.0)
        if budget["parameters"] is not None:
            return plan_student(unet, scores, budget["parameters"], allocation=allocation)
        if self.profile is None:
            raise RequestError("nothing says how small the student is to be", do="Give --device or --parameters.")
        within = student_within(
            unet,
            scores,
            budget_of(self.profile, step_ms=self.max_step_ms),
            self.geometry,
            allocation=allocation,
            profile=self.profile,
        )
        budget |= {"limited_by": within.admitted.limiting, "parameters": within.admitted.parameters}
        budget["limits"] = [asdict(limit) for limit in within.admitted.limits]
        return within.plan

    def _distil(self, student: StudentUNet2DConditionModel, plan: StudentPlan) -> dict[str, Any]:
        """Train `student` in place; the record of it. Nothing is trained for 0 steps."""
        recipe, losses = self._recipe()
        if recipe.steps == 0:
            return {"distillation": None, "held_out_before": None, "held_out_after": None}
        pipeline = self.source.pipeline
        train, held_out = self._data()
        schedule = NoiseSchedule.of(pipeline.scheduler)
        folder = self.work / "distillation"
        scorer = HeldOut(pipeline.unet, held_out, schedule, folder / "unused.jsonl", losses)
        before = scorer.error(student)
        features = block_map(pipeline.unet, plan.blocks)
        distill_unet(
            student, pipeline.unet, train, schedule, features, recipe, folder,
            losses=losses, held_out=held_out,
            identity={"source": self.source.digest, "widths": dict(plan.widths), "blocks": asdict(plan.blocks)},
        )  # fmt: skip
        best: Any = StudentUNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
        student.load_state_dict(best.state_dict())
        plot_losses(folder, self.work / "losses.png")
        return {
            "distillation": {
                "recipe": asdict(recipe),
                "losses": asdict(losses),
                "features": features,
                "data": train.identity,
                "best_step": json.loads((folder / "unet" / "step.json").read_text())["step"],
            },
            "held_out_before": before,
            "held_out_after": scorer.error(student.eval()),
        }

    def _recipe(self) -> tuple[Recipe, DistilLosses]:
        given = {
            name: value
            for name in ("steps", "batch", "learning_rate")
            if (value := getattr(self.training, name)) is not None
        }
        base, losses = PAPER, DistilLosses(patience=10)
        if self.model == REFERENCE:
            from latentrelay.reference.students import LOSSES, distillation_of

            base = distillation_of(None if self.profile is None else self.profile.student_class)
            losses = DistilLosses(*LOSSES)
        recipe = Recipe(**{**asdict(base), "mixed_precision": self.training.mixed_precision, **given})
        often = max(1, min(recipe.checkpoint_every, recipe.steps // 4))  # a short run is checkpointed too
        return replace(recipe, checkpoint_every=often, log_every=min(recipe.log_every, often)), losses

    def _data(self) -> tuple[LatentData, LatentData]:
        if self.training.data is not None:
            return folder_data(self.source.pipeline, self.training.data, self.work / "data")
        if self.model == REFERENCE:
            return reference_data(self.source.pipeline, self.work / "data", self.training.pictures)
        raise _nothing_to_distil_on()

    # ---- what it leaves --------------------------------------------------------------------------------------------

    def _write(self, folder: Path, student: StudentUNet2DConditionModel) -> None:
        pipeline = self.source.pipeline
        vae = pipeline.vae if self.light_vae is None else load_light_vae(self.light_vae)
        whole: Any = type(pipeline)(
            unet=student, vae=vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer,
            scheduler=pipeline.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        whole.save_pretrained(folder, safe_serialization=True)
        for path in folder.glob("*/config.json"):  # diffusers notes where a part came from: a path of this machine
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2) + "\n")

    def _full_plan(self, document: Mapping[str, Any]) -> Any:
        pipeline = self.source.pipeline
        sampler = sampler_for(type(pipeline.scheduler).__name__)
        rule = sampler_rule(sampler)
        scheduler = _scheduler(pipeline, rule)
        steps = self.profile.defaults.num_steps if self.profile is not None else 25
        return full_plan(
            PlanSource(self.source.model, self.source.digest, self.source.family),
            self.profile.model_dump(mode="json") if self.profile is not None else {},
            sampler,
            rule.scheduler_class,
            scheduler_digest(rule.scheduler_class, dict(scheduler.config)),
            solver_table(scheduler, steps),
            document,
        )


def _nothing_to_distil_on() -> RequestError:
    return RequestError(
        "there is nothing to distil the student on",
        do="Give --data FOLDER (pictures and metadata.jsonl), or --steps 0 to prune only.",
    )


def _scheduler(pipeline: Any, rule: Any) -> Any:
    import diffusers

    return getattr(diffusers, rule.scheduler_class).from_config(pipeline.scheduler.config, **rule.overrides)


@torch.no_grad()
def _states(pipeline: Any, prompts: Sequence[str]) -> torch.Tensor:
    """(n, T, D)."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    states: torch.Tensor = pipeline.text_encoder(tokens.input_ids)[0]
    return states
