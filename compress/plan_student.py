"""The student's shape for a number of parameters: which blocks go and what width every unit keeps.

In: the source U-Net, its scores (sensitivity.py; units and "blocks:..." removals) and a ceiling on parameters. Out: a
`StudentPlan` with the block recipe and the widths of least expected loss, and what every other block recipe would have
cost. Scores of blocks and units are added up, which is a guess: removals interact. `build_student` makes the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from latentrelay.compress.keep_ratios import BudgetError, expected_loss, sensitive_widths, uniform_widths
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.prune_unet import prune_unet
from latentrelay.compress.remove_blocks import (
    BLOCK_RECIPES,
    BlockRecipe,
    check_recipe,
    parameter_count,
    remove_blocks,
    removed_config,
    teacher_path,
)
from latentrelay.compress.student_unet import StudentUNet2DConditionModel

Allocation = Literal["sensitivity", "uniform"]


@dataclass(frozen=True)
class Considered:
    """One block recipe: its expected loss at the ceiling, or None where it cannot come down to it."""

    blocks: BlockRecipe
    expected_loss: float | None


@dataclass(frozen=True)
class StudentPlan:
    """A student's shape. `widths` names every unit of the network that `blocks` leaves."""

    blocks: BlockRecipe
    widths: Mapping[str, int]
    parameters: int
    ceiling: int
    allocation: Allocation
    expected_loss: float
    considered: tuple[Considered, ...] = ()


def plan_student(
    unet: UNet2DConditionModel,
    scores: Mapping[str, float],
    ceiling: int,
    *,
    blocks: BlockRecipe | None = None,
    allocation: Allocation = "sensitivity",
) -> StudentPlan:
    """The shape that is expected to lose least with at most `ceiling` parameters.

    `blocks` fixes the block recipe; otherwise every one whose removals have scores is considered. A ceiling above the
    source's own count keeps everything. Raises BudgetError, with the closest count, when none comes down to it.
    """
    recipes = [blocks] if blocks is not None else _recipes(unet, scores)
    plans: list[StudentPlan] = []
    refusals: list[BudgetError] = []
    considered: list[Considered] = []
    for recipe in recipes:
        try:
            plans.append(_plan(unet, scores, ceiling, recipe, allocation))
            considered.append(Considered(recipe, plans[-1].expected_loss))
        except BudgetError as error:
            refusals.append(error)
            considered.append(Considered(recipe, None))
    if not plans:
        raise min(refusals, key=lambda error: error.closest)
    best = min(plans, key=lambda plan: (plan.expected_loss, -plan.parameters))
    return StudentPlan(**{**best.__dict__, "considered": tuple(considered)})


def build_student(unet: UNet2DConditionModel, plan: StudentPlan) -> StudentUNet2DConditionModel:
    """The student with the source's weights where they stay; not trained yet."""
    return prune_unet(remove_blocks(unet, plan.blocks), plan.widths)


def _plan(
    unet: UNet2DConditionModel, scores: Mapping[str, float], ceiling: int, recipe: BlockRecipe, allocation: Allocation
) -> StudentPlan:
    config: Any = removed_config(unet, recipe)
    with torch.device("meta"):
        smaller: Any = UNet2DConditionModel.from_config(config)
    units, parameters = prunable_units(smaller), parameter_count(smaller)
    mine = {unit.path: scores[teacher_path(unet, recipe, unit.path)] for unit in units}
    if allocation == "uniform":
        widths = uniform_widths(units, parameters, ceiling)
    else:
        widths = sensitive_widths(units, mine, parameters, ceiling)
    lost = sum(expected_loss(unit, mine[unit.path], widths[unit.path]) for unit in units)
    left = parameters - sum((unit.width - widths[unit.path]) * unit.parameters_per_width for unit in units)
    return StudentPlan(recipe, widths, left, ceiling, allocation, lost + _blocks_score(scores, recipe))


def _blocks_score(scores: Mapping[str, float], recipe: BlockRecipe) -> float:
    lost = 0.0
    if recipe.levels_removed:
        lost += scores["blocks:innermost"]  # scored with the mid block gone too
    elif not recipe.mid:
        lost += scores["blocks:mid"]
    return lost + (scores["blocks:layers"] if recipe.layers is not None else 0.0)


def _recipes(unet: Any, scores: Mapping[str, float]) -> list[BlockRecipe]:
    depths = [BlockRecipe()]
    if "blocks:mid" in scores:
        depths.append(BlockRecipe(mid=False))
    if "blocks:innermost" in scores:
        depths.append(BlockRecipe(mid=False, levels_removed=1))
    found = list(depths)
    if "blocks:layers" in scores:
        found += [BlockRecipe(each.mid, each.levels_removed, BLOCK_RECIPES["bk-sdm-base"].layers) for each in depths]
    return [each for each in found if _possible(unet, each)]


def _possible(unet: Any, recipe: BlockRecipe) -> bool:
    try:
        check_recipe(unet, recipe)
    except UnitError:
        return False
    return True
