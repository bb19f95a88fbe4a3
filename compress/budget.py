"""What a device allows, as a number of U-Net parameters, and the student that keeps to it.

In: a device profile's limits (parameters, largest file, memory of the process; optionally milliseconds a step) and a
pipeline's geometry. Out: `largest_parameters`, the most that each limit admits and which one binds; and
`student_within`, the shape of least expected loss (keep_ratios.py) that keeps to all of them by the footprint's
prediction. Memory does not depend on parameters alone: the scores of the attention with most tokens grow with its
heads, so where memory binds, fewer heads there are weighed against fewer parameters everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffusers import UNet2DConditionModel
from latentrelay.compress.footprint import (
    ACTIVATION_BYTES,
    BRANCHES,
    CALIBRATED,
    MIB,
    RULES,
    WEIGHT_BYTES,
    Footprint,
    MemoryRules,
    Stage,
    footprint,
)
from latentrelay.compress.footprint import unet_stage as measure_unet
from latentrelay.compress.geometry import Geometry, unet_from
from latentrelay.compress.keep_ratios import (
    BudgetError,
    expected_loss,
    saved_parameters,
    sensitive_widths,
    uniform_widths,
)
from latentrelay.compress.plan_student import Allocation, Considered, StudentPlan, plan_student
from latentrelay.compress.prunable_units import PrunableUnit, prunable_units
from latentrelay.compress.remove_blocks import BlockRecipe, parameter_count, removed_config, teacher_path
from latentrelay.compress.step_estimate import estimated_step_ms
from latentrelay.compress.student_unet import WIDTH_FIELDS
from latentrelay.device_profiles import DeviceProfile
from torch import nn

_EVERYTHING = 10**15  # a ceiling above every network
_ROUNDS = 4  # plan, weigh, plan again: the heads that a plan drops leave room for parameters
_BISECTIONS = 7  # a hundredth of the range
_CLOSE = 0.99  # of what is admitted, where the rounds may end


class UnmetBudgetError(BudgetError):
    """No student keeps to the budget. `.limit` names what refuses; `.closest` and `.closest_mib` are the smallest
    student's parameters and the memory it needs."""

    def __init__(self, limit: str, *, got: str, closest: int, closest_mib: float, closest_bytes: int) -> None:
        super().__init__(f"no student of this pipeline keeps to the device's {limit}", got=0, closest=closest)
        self.args = (
            f"no student of this pipeline keeps to the device's {limit}, got {got}; the closest that can be built has "
            f"{closest:,} parameters, {closest_bytes / MIB:,.0f} MiB of files and needs {closest_mib:,.0f} MiB of "
            "memory. Choose a smaller picture, a lighter decoder or another device.",
        )
        self.limit, self.closest_mib, self.closest_bytes = limit, closest_mib, closest_bytes


@dataclass(frozen=True)
class Budget:
    """Ceilings, each None where there is none: U-Net parameters, the largest file, the process's peak memory (MiB)
    and one guided step (ms)."""

    parameters: int | None = None
    largest_file_mib: float | None = None
    peak_memory_mib: float | None = None
    step_ms: float | None = None


def budget_of(profile: DeviceProfile, *, step_ms: float | None = None) -> Budget:
    """A profile's ceilings. `step_ms` is the caller's: a profile's latency target is in its parameters already."""
    memory = profile.memory
    return Budget(
        profile.target_unet_parameters.parameters,
        float(memory.largest_file_mib),
        float(memory.application_ceiling_mib),
        step_ms,
    )


@dataclass(frozen=True)
class Limit:
    """One ceiling and the most U-Net parameters that it admits; `words` say how."""

    name: str
    ceiling: float
    parameters: int
    words: str


@dataclass(frozen=True)
class Admitted:
    """The most U-Net parameters that every ceiling admits, the one that binds, and each by itself."""

    parameters: int
    limiting: str
    limits: tuple[Limit, ...]
    precision: str


@dataclass(frozen=True)
class BudgetedStudent:
    """A student's shape within a budget.

    `heads`: the most heads that the attention with most tokens was allowed (None: all). `considered`: that number and
    the expected loss of the best shape with it, None where there is none. `peak_memory_mib` and `file_bytes` are
    predicted.
    """

    plan: StudentPlan
    admitted: Admitted
    peak_memory_mib: float
    file_bytes: int
    heads: int | None
    considered: tuple[tuple[int | None, float | None], ...]


def largest_parameters(
    budget: Budget,
    geometry: Geometry,
    precision: str = CALIBRATED,
    *,
    unet: nn.Module | None = None,
    rules: MemoryRules = RULES,
) -> Admitted:
    """The most U-Net parameters within `budget`, with the activations of `unet` (by default the geometry's own).

    A limit that admits none counts 0. The text encoder's and the decoder's own needs are `student_within`'s to check.
    """
    unet = geometry.build_unet() if unet is None else unet
    return _admitted(budget, measure_unet(geometry, unet, precision, rules=rules), precision, rules)


def _admitted(budget: Budget, stage: Stage, precision: str, rules: MemoryRules) -> Admitted:
    each = WEIGHT_BYTES[precision]
    limits = []
    if budget.parameters is not None:
        limits.append(Limit("parameters", budget.parameters, budget.parameters, "the profile's target for its U-Net"))
    if budget.largest_file_mib is not None:
        fits = int(budget.largest_file_mib * MIB / each)
        limits.append(Limit("largest file", budget.largest_file_mib, fits, f"{each:g} bytes a weight in one file"))
    if budget.peak_memory_mib is not None:
        left = (budget.peak_memory_mib - rules.baseline_mib) * MIB - stage.activation_bytes
        words = (
            f"{rules.baseline_mib:.0f} MiB for the process and {stage.activation_bytes / MIB:,.0f} MiB of activations "
            f"(largest: {stage.largest_activation})"
        )
        fits = max(0, int(left / (rules.external * each)))
        limits.append(Limit("memory", budget.peak_memory_mib, fits, words))
    if not limits:
        return Admitted(_EVERYTHING, "none", (), precision)
    binding = min(limits, key=lambda limit: limit.parameters)
    return Admitted(binding.parameters, binding.name, tuple(limits), precision)


def student_within(
    unet: UNet2DConditionModel,
    scores: Mapping[str, float],
    budget: Budget,
    geometry: Geometry,
    precision: str = CALIBRATED,
    *,
    blocks: BlockRecipe | None = None,
    allocation: Allocation = "sensitivity",
    rules: MemoryRules = RULES,
    profile: DeviceProfile | None = None,
) -> BudgetedStudent:
    """The shape that is expected to lose least within `budget`; `unet` may be on the meta device.

    `budget.step_ms` needs the `profile` whose milliseconds they are: the ceiling on parameters is then lowered, by
    bisection, until the estimated step keeps to it. Raises UnmetBudgetError, with the closest that can be built, when
    no student keeps to the budget.
    """
    within = _within(unet, scores, budget, geometry, precision, blocks, allocation, rules)
    if budget.step_ms is None or profile is None:
        return within

    def step_ms(student: BudgetedStudent) -> float:
        shape = geometry.with_unet(dict(planned_unet(unet, student.plan).config))
        return estimated_step_ms(shape, profile)[0] or 0.0

    if step_ms(within) <= budget.step_ms:
        return within
    low, high = 0, within.plan.parameters
    best: BudgetedStudent | None = None
    for _ in range(_BISECTIONS):
        middle = (low + high) // 2
        try:
            tried = _within(
                unet, scores, replace(budget, parameters=middle), geometry, precision, blocks, allocation, rules
            )
        except BudgetError:
            low = middle
            continue
        if step_ms(tried) <= budget.step_ms:
            best, low = tried, middle
        else:
            high = middle
    if best is None:
        whole = footprint(geometry.with_unet(dict(planned_unet(unet, within.plan).config)), precision, rules=rules)
        raise UnmetBudgetError(
            "step latency",
            got=f"{budget.step_ms:,.0f} ms",
            closest=whole.parameters,
            closest_mib=whole.peak_memory_mib,
            closest_bytes=whole.bytes,
        )
    limit = Limit("latency", budget.step_ms, best.plan.parameters, "the estimated milliseconds of a guided step")
    admitted = Admitted(best.plan.parameters, "latency", (*best.admitted.limits, limit), precision)
    return replace(best, admitted=admitted)


def _within(
    unet: UNet2DConditionModel,
    scores: Mapping[str, float],
    budget: Budget,
    geometry: Geometry,
    precision: str,
    blocks: BlockRecipe | None,
    allocation: Allocation,
    rules: MemoryRules,
) -> BudgetedStudent:
    search = _Search(unet, scores, budget, geometry, precision, allocation, rules, _recipes(unet, scores, blocks))
    search.check_other_stages()
    found: list[BudgetedStudent] = []
    considered: list[tuple[int | None, float | None]] = []
    for heads in search.head_caps():
        settled = search.settle(heads)
        considered.append((heads, None if settled is None else settled.plan.expected_loss))
        if settled is not None:
            worse = bool(found) and settled.plan.expected_loss > found[-1].plan.expected_loss
            found.append(settled)
            if worse or settled.admitted.limiting != "memory":
                break  # still fewer heads would gain nothing
    if not found:
        raise search.unmet()
    best = min(found, key=lambda each: (each.plan.expected_loss, -each.plan.parameters))
    return replace(best, considered=tuple(considered))


def planned_unet(unet: UNet2DConditionModel, plan: StudentPlan) -> Any:
    """The student of a plan on the meta device: shapes without weights."""
    return _narrowed(removed_config(unet, plan.blocks), plan.widths)


def _narrowed(config: Mapping[str, Any], widths: Mapping[str, int]) -> Any:
    stock = unet_from({**config, "_class_name": "UNet2DConditionModel"})
    fields: dict[str, dict[str, int]] = {field: {} for field in WIDTH_FIELDS.values()}
    for unit in prunable_units(stock):
        fields[WIDTH_FIELDS[unit.kind]][unit.path] = widths.get(unit.path, unit.width)
    return unet_from({**config, **fields, "_class_name": "StudentUNet2DConditionModel"})


def _recipes(
    unet: UNet2DConditionModel, scores: Mapping[str, float], blocks: BlockRecipe | None
) -> tuple[Considered, ...]:
    """Every block recipe with what its removals alone are expected to cost."""
    return plan_student(unet, scores, _EVERYTHING, blocks=blocks).considered


@dataclass(frozen=True)
class _Search:
    unet: UNet2DConditionModel
    scores: Mapping[str, float]
    budget: Budget
    geometry: Geometry
    precision: str
    allocation: Allocation
    rules: MemoryRules
    recipes: tuple[Considered, ...]
    stock: dict[BlockRecipe, tuple[tuple[PrunableUnit, ...], int, int]] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)

    def check_other_stages(self) -> None:
        """The text encoder and the decoder are not pruned here: they must fit as they are."""
        whole = footprint(self.geometry, self.precision, rules=self.rules)
        budget = self.budget
        for stage in whole.stages:
            if stage.name == "steps":
                continue
            words = f"{stage.name.replace('_', ' ')} alone needs {stage.peak_mib:,.0f} MiB"
            if budget.peak_memory_mib is not None and stage.peak_mib > budget.peak_memory_mib:
                raise self._refused("memory", f"{budget.peak_memory_mib:,.0f} MiB where the {words}", whole)
            if budget.largest_file_mib is not None and stage.weight_bytes > budget.largest_file_mib * MIB:
                size = f"{budget.largest_file_mib:,.0f} MiB where the {stage.name} has {stage.weight_bytes / MIB:,.0f}"
                raise self._refused("largest file", size, whole)

    def head_caps(self) -> list[int | None]:
        """None first (every head), then fewer and fewer in the attention with most tokens."""
        widest = max((unit.width for unit in prunable_units(self.unet) if unit.kind == "self_attention"), default=1)
        return [None, *(heads for heads in (12, 8, 6, 5, 4, 3, 2, 1) if heads < widest)]

    def settle(self, heads: int | None) -> BudgetedStudent | None:
        """Plan, weigh the plan's own activations, plan again with what they leave; the best that keeps to all."""
        ceiling = _admitted(self.budget, self._guessed(heads), self.precision, self.rules)
        best: BudgetedStudent | None = None
        for _ in range(_ROUNDS):
            plan = self.plan(ceiling.parameters, heads)
            if plan is None:
                break
            student = planned_unet(self.unet, plan)
            stage = measure_unet(self.geometry, student, self.precision, rules=self.rules)
            ceiling = _admitted(self.budget, stage, self.precision, self.rules)
            if plan.parameters > ceiling.parameters:
                continue
            if best is None or plan.expected_loss < best.plan.expected_loss:
                best = BudgetedStudent(plan, ceiling, stage.peak_mib, stage.weight_bytes, heads, ())
            if plan.parameters >= _CLOSE * min(ceiling.parameters, parameter_count(self.unet)):
                break
        return best

    def _guessed(self, heads: int | None) -> Stage:
        """The source's stage with the scores of fewer heads taken off: where the rounds begin."""
        if "source" not in self.stages:
            self.stages["source"] = measure_unet(self.geometry, self.unet, self.precision, rules=self.rules)
        stage, units = self.stages["source"], self._stock(BlockRecipe())[0]
        own = max((unit.width for unit in units if unit.kind == "self_attention"), default=0)
        if heads is None or heads >= own:
            return stage
        scores = BRANCHES * (self.geometry.rows * self.geometry.columns) ** 2 * ACTIVATION_BYTES[self.precision]
        less = min(stage.activation_bytes, int(scores * (own - heads) * self.rules.unet_calls[1]))
        return replace(stage, activation_bytes=stage.activation_bytes - less)

    def plan(self, ceiling: int, heads: int | None) -> StudentPlan | None:
        """The best shape of at most `ceiling` parameters and `heads` heads, over the block recipes; None for none."""
        plans = []
        for each in self.recipes:
            try:
                plans.append(self._plan(ceiling, heads, each))
            except BudgetError:
                continue
        return min(plans, key=lambda plan: (plan.expected_loss, -plan.parameters)) if plans else None

    def _plan(self, ceiling: int, heads: int | None, recipe: Considered) -> StudentPlan:
        units, parameters, levels = self._stock(recipe.blocks)
        scores = {unit.path: self.scores[teacher_path(self.unet, recipe.blocks, unit.path)] for unit in units}
        widest = _head_limits(units, levels, heads)
        capped = [replace(unit, width=widest.get(unit.path, unit.width)) for unit in units]
        already = saved_parameters(units, widest)
        if self.allocation == "uniform":
            widths = uniform_widths(capped, parameters - already, ceiling)
        else:
            rescored = {unit.path: _score_from(unit, scores[unit.path], widest.get(unit.path)) for unit in units}
            widths = sensitive_widths(capped, rescored, parameters - already, ceiling)
        lost = sum(expected_loss(unit, scores[unit.path], widths[unit.path]) for unit in units)
        left = parameters - saved_parameters(units, widths)
        total = lost + (recipe.expected_loss or 0.0)
        return StudentPlan(recipe.blocks, widths, left, ceiling, self.allocation, total, self.recipes)

    def _stock(self, recipe: BlockRecipe) -> tuple[tuple[PrunableUnit, ...], int, int]:
        """Units, parameters and levels of the network that a block recipe leaves."""
        if recipe not in self.stock:
            config = removed_config(self.unet, recipe)
            smaller = unet_from({**config, "_class_name": "UNet2DConditionModel"})
            levels = len(config["block_out_channels"])
            self.stock[recipe] = (prunable_units(smaller), parameter_count(smaller), levels)
        return self.stock[recipe]

    def unmet(self) -> UnmetBudgetError:
        """The refusal, with the smallest student: fewest heads, narrowest widths, most blocks removed."""
        smallest = None
        for each in self.recipes:
            narrowest = {unit.path: unit.minimum for unit in self._stock(each.blocks)[0]}
            student = _narrowed(removed_config(self.unet, each.blocks), narrowest)
            whole = footprint(self.geometry.with_unet(dict(student.config)), self.precision, rules=self.rules)
            if smallest is None or whole.parameters < smallest.parameters:
                smallest = whole
        if smallest is None:
            raise ValueError("a search needs at least one block recipe")
        binding = largest_parameters(self.budget, self.geometry, self.precision, rules=self.rules)
        ceiling = next(limit.ceiling for limit in binding.limits if limit.name == binding.limiting)
        unit = "" if binding.limiting == "parameters" else " MiB"
        return self._refused(binding.limiting, f"{ceiling:,.0f}{unit}", smallest)

    @staticmethod
    def _refused(limit: str, got: str, closest: Footprint) -> UnmetBudgetError:
        return UnmetBudgetError(
            limit,
            got=got,
            closest=closest.parameters,
            closest_mib=closest.peak_memory_mib,
            closest_bytes=closest.bytes,
        )


def _head_limits(units: tuple[PrunableUnit, ...], levels: int, heads: int | None) -> dict[str, int]:
    """Most heads of every self-attention when the outermost level is allowed `heads`: scores of equal size, so four
    times as many a level further in."""
    if heads is None:
        return {}
    limits = {}
    for unit in units:
        if unit.kind == "self_attention":
            most = heads * 4 ** _level(unit.path, levels)
            if most < unit.width:
                limits[unit.path] = most
    return limits


def _level(path: str, levels: int) -> int:
    """0 for the level of the full latent size."""
    part = path.split(".")
    if part[0] == "mid_block":
        return levels - 1
    return int(part[1]) if part[0] == "down_blocks" else levels - 1 - int(part[1])


def _score_from(unit: PrunableUnit, score: float, widest: int | None) -> float:
    """The score of a unit that starts at `widest`: what halving it from there adds to the expected loss."""
    if widest is None or not math.isfinite(score):
        return score
    half = max(unit.minimum, widest // 2)
    return max(1e-12, expected_loss(unit, score, half) - expected_loss(unit, score, widest))
