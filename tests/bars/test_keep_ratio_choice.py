"""Sensitivity-chosen widths against one ratio for all, at equal parameters: before and after the same distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from latentrelay.compress.distill_unet import DistilLosses, HeldOut, NoiseSchedule, distill_unet
from latentrelay.compress.plan import Plan
from latentrelay.compress.plan_student import build_student, plan_student
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.remove_blocks import BlockRecipe, block_map
from latentrelay.reference.students import LOSSES, distillation_of, student_path
from latentrelay.tools.compress_data import reference_data

pytestmark = pytest.mark.slow

SCENES, STEPS = 1024, 60


def test_sensitivity_beats_uniform(
    reference_pipeline: Any, tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]
) -> None:
    unet, record = reference_pipeline.unet, Plan.load(student_path("phone-mid")).recipe.compression
    scores = {unit.path: float("inf") for unit in prunable_units(unet)} | record["scores"]
    blocks = BlockRecipe(**record["shape"]["blocks"])
    train, held_out = reference_data(reference_pipeline, tmp_path / "data", SCENES)
    schedule, losses = NoiseSchedule.of(reference_pipeline.scheduler), DistilLosses(*LOSSES)
    recipe = replace(distillation_of("phone-mid"), steps=STEPS, checkpoint_every=STEPS, warmup=10)
    scorer = HeldOut(unet, held_out, schedule, tmp_path / "none.jsonl", losses)
    found: dict[str, dict[str, float]] = {}
    for allocation in ("sensitivity", "uniform"):
        plan = plan_student(unet, scores, record["target_parameters"], blocks=blocks, allocation=allocation)  # type: ignore[arg-type]
        student = build_student(unet, plan)
        before = scorer.error(student)
        distill_unet(
            student, unet, train, schedule, block_map(unet, blocks), recipe, tmp_path / allocation, losses=losses
        )
        found[allocation] = {"parameters": plan.parameters, "before": before, "after": scorer.error(student)}
    counts = [each["parameters"] for each in found.values()]
    assert max(counts) <= 1.01 * min(counts)
    for when in ("before", "after"):
        assert found["sensitivity"][when] < found["uniform"][when], found
    measured("keep_ratio_choice", {"held_out_error": found, "recipe": asdict(recipe), "scenes": SCENES})
