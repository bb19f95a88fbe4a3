"""Block removal: BK-SDM's published counts, weights of what stays, the block map, and what cannot be removed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from latentrelay.compress.keep_ratios import BudgetError
from latentrelay.compress.plan_student import build_student, plan_student
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.published_recipes import RECIPES, published_widths
from latentrelay.compress.remove_blocks import (
    BLOCK_RECIPES,
    BlockRecipe,
    block_map,
    parameter_count,
    remove_blocks,
    removed_config,
    teacher_path,
)
from latentrelay.compress.sensitivity import score_prior
from latentrelay.compress.student_unet import StudentUNet2DConditionModel, widths_of


@pytest.fixture(scope="module")
def sd14() -> Any:
    """Stable Diffusion 1.4's U-Net without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize(
    ("name", "count"),
    [("none", 859_520_964), ("bk-sdm-base", 579_384_964), ("bk-sdm-small", 482_346_884), ("bk-sdm-tiny", 323_384_964)],
)
def test_published_counts(sd14: Any, name: str, count: int) -> None:
    with torch.device("meta"):
        smaller = UNet2DConditionModel.from_config(removed_config(sd14, BLOCK_RECIPES[name]))
    assert parameter_count(smaller) == count


def test_the_published_224m_shape(sd14: Any) -> None:
    recipe = RECIPES["hybrid-sd-224m"]
    config = removed_config(sd14, recipe.blocks)
    with torch.device("meta"):
        stock: Any = UNet2DConditionModel.from_config(config)
        fields = widths_of(stock)
        for path, width in published_widths(recipe, prunable_units(stock)).items():
            next(widths for widths in fields.values() if path in widths)[path] = width
        student: Any = StudentUNet2DConditionModel.from_config({**config, **fields})
    assert parameter_count(student) == recipe.parameters == 224_492_676
    assert list(student.config.resnet_mid_channels.values()) == [256, 480, 960, 320, 320, 160, 160, 96, 256]
    assert list(student.config.self_attention_heads.values()) == [8, 4, 6, 6, 8, 8, 4, 8, 8]
    assert set(student.config.cross_attention_heads.values()) == {8}
    with pytest.raises(UnitError, match="another network"):
        published_widths(recipe, prunable_units(sd14))


@pytest.mark.parametrize("name", ["none", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"])
def test_what_stays_keeps_its_weights_and_runs(small: Any, name: str) -> None:
    recipe = BLOCK_RECIPES[name]
    smaller = remove_blocks(small, recipe).eval()
    theirs = small.state_dict()
    for ours, tensor in smaller.state_dict().items():
        module, _, leaf = ours.rpartition(".")
        assert torch.equal(tensor, theirs[f"{teacher_path(small, recipe, module)}.{leaf}"]), ours
    generator = torch.Generator().manual_seed(0)
    latents, states = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        assert torch.isfinite(smaller(latents, torch.tensor([9]), states).sample).all()
    if name == "none":
        with torch.no_grad():
            assert torch.equal(
                smaller(latents, torch.tensor([9]), states).sample, small(latents, torch.tensor([9]), states).sample
            )


def test_the_block_map_pairs_equal_shapes(small: Any) -> None:
    recipe = BLOCK_RECIPES["bk-sdm-tiny"]
    assert block_map(small, recipe) == {
        "down_blocks.0.attentions.0": "down_blocks.0.attentions.1",
        "down_blocks.1.attentions.0": "down_blocks.1.attentions.1",
        "up_blocks.0.attentions.1": "up_blocks.1.attentions.2",
        "up_blocks.1.attentions.1": "up_blocks.2.attentions.2",
    }
    whole = block_map(small, BlockRecipe())
    assert all(ours == theirs for ours, theirs in whole.items())
    assert "mid_block" in whole
    assert len(whole) == 7


def test_what_cannot_be_removed_is_refused(small: Any) -> None:
    for recipe, words in (
        (BlockRecipe(levels_removed=2), "levels"),
        (BlockRecipe(layers=3), "layers a block"),
        (BlockRecipe(layers=0), "layers a block"),
    ):
        with pytest.raises(UnitError, match=words):
            remove_blocks(small, recipe)
    uneven = UNet2DConditionModel(
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    with pytest.raises(UnitError, match="different widths"):
        remove_blocks(uneven, BlockRecipe(levels_removed=1))


def test_a_plan_chooses_blocks_and_widths_within_its_ceiling(small: Any) -> None:
    scores = score_prior(prunable_units(small))
    for ceiling in (parameter_count(small), 60_000, 30_000):
        plan = plan_student(small, scores, ceiling)
        student = build_student(small, plan)
        assert parameter_count(student) == plan.parameters <= ceiling
        losses = [each.expected_loss for each in plan.considered if each.expected_loss is not None]
        assert plan.expected_loss == min(losses)
    assert plan_student(small, scores, 10**9).expected_loss == 0
    worthless_blocks = {**scores, "blocks:layers": 0.0, "blocks:innermost": 0.0, "blocks:mid": 0.0}
    assert plan_student(small, worthless_blocks, 30_000).blocks == BLOCK_RECIPES["bk-sdm-tiny"]
    with pytest.raises(BudgetError):
        plan_student(small, scores, 1000)
