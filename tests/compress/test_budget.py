"""Budgets: each limit admits what a sum by hand says, students keep to it, and what cannot be met is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.budget import (
    Budget,
    BudgetedStudent,
    UnmetBudgetError,
    budget_of,
    largest_parameters,
    planned_unet,
    student_within,
)
from latentrelay.compress.footprint import WITHOUT_ARENA, footprint, unet_stage
from latentrelay.compress.geometry import Geometry
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.step_estimate import estimated_step_ms
from latentrelay.device_profiles import load_profile

MIB = 2**20
UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
GEOMETRY = Geometry("small", UNET, VAE, TEXT, 32, 32, 8)
RULES = WITHOUT_ARENA


def network() -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config({key: value for key, value in UNET.items() if key != "_class_name"})


def count(module: Any) -> int:
    return sum(each.numel() for each in module.parameters())


def scores(unet: Any) -> dict[str, float]:
    return {unit.path: 1.0 + index / 10 for index, unit in enumerate(prunable_units(unet))}


def within(budget: Budget, **more: Any) -> Any:
    unet = network()
    return student_within(unet, scores(unet), budget, GEOMETRY, rules=RULES, **more)


def test_every_limit_admits_what_a_sum_by_hand_says() -> None:
    stage = unet_stage(GEOMETRY, network(), rules=RULES)
    ceiling = RULES.baseline_mib + stage.activation_bytes / MIB + 10.0
    admitted = largest_parameters(Budget(10**9, 5.0, ceiling), GEOMETRY, rules=RULES)
    found = {limit.name: limit.parameters for limit in admitted.limits}
    assert found["parameters"] == 10**9
    assert found["largest file"] == 5 * MIB // 4
    assert found["memory"] == pytest.approx(10 * MIB / (RULES.external * 4), abs=2)
    assert (admitted.limiting, admitted.parameters) == ("largest file", 5 * MIB // 4)
    assert largest_parameters(Budget(peak_memory_mib=1.0), GEOMETRY, rules=RULES).parameters == 0


def test_a_profile_s_ceilings_are_its_budget() -> None:
    assert budget_of(load_profile("galaxy-s24")) == Budget(580_000_000, 2047.0, 3072.0, None)


@pytest.mark.parametrize("allocation", ["sensitivity", "uniform"])
def test_a_student_fills_its_parameters_and_never_exceeds_them(allocation: str) -> None:
    whole = count(network())
    target = int(whole * 0.6)
    student = within(Budget(parameters=target), allocation=allocation)
    assert 0.97 * target <= student.plan.parameters <= target
    assert student.admitted.limiting == "parameters"
    assert count(planned_unet(network(), student.plan)) == student.plan.parameters


def test_what_fits_already_is_kept_whole() -> None:
    student = within(Budget(10**9, 1e6, 1e6))
    assert student.plan.parameters == count(network())
    assert student.heads is None


def test_where_memory_binds_the_student_keeps_to_it_with_fewer_heads_if_that_loses_less() -> None:
    whole = unet_stage(GEOMETRY, network(), rules=RULES)
    scores_mib = 2 * 8 * 1024**2 * 4 / MIB  # eight heads over 32 x 32 tokens, two branches: 64 MiB
    assert whole.activation_bytes / MIB > scores_mib
    ceiling = whole.peak_mib - scores_mib / 2
    student = within(Budget(peak_memory_mib=ceiling))
    assert student.admitted.limiting == "memory"
    assert student.heads is not None
    widest = max(unit.width for unit in prunable_units(planned_unet(network(), student.plan))
                 if unit.kind == "self_attention" and unit.path.startswith("down_blocks.0"))  # fmt: skip
    assert widest <= student.heads
    config = dict(planned_unet(network(), student.plan).config)
    assert footprint(GEOMETRY.with_unet(config), rules=RULES).peak_memory_mib <= ceiling
    assert student.considered[0] == (None, None)  # with every head nothing fits


def test_an_impossible_budget_is_refused_with_the_closest() -> None:
    with pytest.raises(UnmetBudgetError) as caught:
        within(Budget(parameters=1000))
    error = caught.value
    assert error.exit_status == 3
    assert error.limit == "parameters"
    smallest = {unit.path: unit.minimum for unit in prunable_units(network())}
    assert error.closest < count(network()) - sum(smallest.values())
    assert f"{error.closest:,} parameters" in str(error)
    within(Budget(parameters=error.closest))  # the closest is met


def test_a_decoder_that_does_not_fit_is_named() -> None:
    with pytest.raises(UnmetBudgetError, match="vae decoder alone needs"):
        student_within(network(), scores(network()), Budget(peak_memory_mib=100.0), GEOMETRY.at(512, 512), rules=RULES)


def test_milliseconds_bind_where_they_are_asked_for() -> None:
    profile, source = load_profile("galaxy-s24"), network()

    def step_ms(student: BudgetedStudent) -> float:
        shape = GEOMETRY.with_unet(dict(planned_unet(source, student.plan).config))
        return estimated_step_ms(shape, profile)[0] or 0.0

    def within(limit: float | None) -> BudgetedStudent:
        return student_within(source, scores(source), Budget(step_ms=limit), GEOMETRY, profile=profile)

    free = within(None)
    limit = 0.8 * step_ms(free)
    bound = within(limit)
    assert 0.7 * limit < step_ms(bound) <= limit
    assert bound.admitted.limiting == "latency"
    assert bound.plan.parameters < free.plan.parameters
    with pytest.raises(UnmetBudgetError, match="step latency"):
        within(1e-9)
