"""Pruning: what torch-pruning gets wrong on diffusers' U-Nets is right here, and nothing changes that was kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.prune_unet import head_norms, prune_unet
from latentrelay.compress.remove_blocks import parameter_count
from latentrelay.compress.student_unet import WIDTH_FIELDS, StudentUNet2DConditionModel, widths_of


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def run(network: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    states = torch.randn(2, 5, 12, generator=generator)
    return network(latents, torch.tensor([7, 900]), states).sample


def path_of(unet: Any, kind: str) -> str:
    return next(unit.path for unit in prunable_units(unet) if unit.kind == kind)


def test_all_widths_kept_change_nothing(unet: Any) -> None:
    student = prune_unet(unet, {unit.path: unit.width for unit in prunable_units(unet)})
    assert parameter_count(student) == parameter_count(unet)
    assert torch.equal(run(student), run(unet))


def test_units_count_their_parameters_right(unet: Any) -> None:
    for unit in prunable_units(unet):
        kept = unit.kept(0.5)
        saved = parameter_count(unet) - parameter_count(prune_unet(unet, {unit.path: kept}))
        assert saved == (unit.width - kept) * unit.parameters_per_width, unit.path


def test_heads_that_go_are_the_ones_that_write_least_and_the_rest_compute_the_same(unet: Any) -> None:
    """The trap: a stale head count computes another attention without an error."""
    for kind in ("self_attention", "cross_attention"):
        path = path_of(unet, kind)
        student = prune_unet(unet, {path: 2})
        attention: Any = student.get_submodule(path)
        assert attention.heads == 2
        assert attention.sliceable_head_dim == 2
        assert attention.to_q.out_features == attention.inner_dim == 2 * 4
        # The same network with the two weakest heads' output columns at zero must give the same picture.
        masked = prune_unet(unet, {})
        theirs: Any = masked.get_submodule(path)
        weakest = head_norms(theirs).argsort()[:2]
        with torch.no_grad():
            theirs.to_out[0].weight.unflatten(1, (theirs.heads, -1))[:, weakest] = 0
        assert (run(student) - run(masked)).abs().max() < 1e-5
        assert (run(student) - run(unet)).abs().max() > 1e-4


def test_geglu_keeps_the_asked_width_in_both_halves(unet: Any) -> None:
    """The trap: torch-pruning keeps a few per cent of a GEGLU where half was asked for."""
    path = path_of(unet, "feed_forward")
    inner = 16 * 4
    student = prune_unet(unet, {path: inner // 2})
    feed_forward: Any = student.get_submodule(path)
    assert feed_forward.net[0].proj.out_features == 2 * inner // 2
    assert feed_forward.net[2].in_features == inner // 2
    masked = prune_unet(unet, {})
    theirs: Any = masked.get_submodule(path)
    value, gate = theirs.net[0].proj.weight.detach().chunk(2)
    strength = value.norm(dim=1) * gate.norm(dim=1) * theirs.net[2].weight.detach().norm(dim=0)
    with torch.no_grad():
        theirs.net[2].weight[:, strength.argsort()[: inner // 2]] = 0
    assert (run(student) - run(masked)).abs().max() < 1e-5


def test_resnets_keep_their_strongest_filters_and_every_coupled_layer_follows(unet: Any) -> None:
    """The trap: conv1 is coupled with the time embedding, the second norm and conv2."""
    path = "down_blocks.0.resnets.0"
    before: Any = unet.get_submodule(path)
    after: Any = prune_unet(unet, {path: 8}).get_submodule(path)
    kept = before.conv1.weight.detach().flatten(1).norm(dim=1).argsort(descending=True)[:8].sort().values
    assert torch.equal(after.conv1.weight, before.conv1.weight[kept])
    assert torch.equal(after.time_emb_proj.weight, before.time_emb_proj.weight[kept])
    assert torch.equal(after.norm2.weight, before.norm2.weight[kept])
    assert torch.equal(after.conv2.weight, before.conv2.weight[:, kept])
    assert after.norm2.num_channels == after.conv1.out_channels == after.time_emb_proj.out_features == 8
    assert after.conv2.out_channels == before.conv2.out_channels


def test_samplers_and_the_last_convolution_stay_as_they_are(unet: Any) -> None:
    """The traps: conv_out narrowed, and samplers whose `channels` no longer match their convolution."""
    student = prune_unet(unet, {unit.path: unit.kept(0.25) for unit in prunable_units(unet)})
    assert student.conv_out.weight.shape == unet.conv_out.weight.shape
    samplers = [m for m in student.modules() if type(m).__name__ in ("Downsample2D", "Upsample2D")]
    assert len(samplers) == 2
    for sampler in samplers:
        assert sampler.channels == sampler.conv.in_channels
        assert sampler.out_channels == sampler.conv.out_channels
    assert torch.isfinite(run(student)).all()


def test_a_student_is_its_config_and_weights(unet: Any, tmp_path: Path) -> None:
    student = prune_unet(unet, {unit.path: unit.kept(0.5) for unit in prunable_units(unet)})
    student.save_pretrained(tmp_path, safe_serialization=True)
    again = StudentUNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(run(again), run(student))
    assert widths_of(again) == widths_of(student)
    units = {unit.path: unit for unit in prunable_units(unet)}
    for kind, field in WIDTH_FIELDS.items():
        named = getattr(again.config, field)
        assert named == {path: unit.kept(0.5) for path, unit in units.items() if unit.kind == kind}


def test_a_pruned_student_can_be_pruned_again(unet: Any) -> None:
    once = prune_unet(unet, {unit.path: unit.kept(0.5) for unit in prunable_units(unet)})
    twice = prune_unet(once, {"down_blocks.0.resnets.0": 4})
    assert twice.config.resnet_mid_channels["down_blocks.0.resnets.0"] == 4
    assert parameter_count(twice) < parameter_count(once)


def test_widths_that_cannot_be_are_refused(unet: Any) -> None:
    with pytest.raises(UnitError, match="no such unit"):
        prune_unet(unet, {"down_blocks.9.resnets.0": 8})
    with pytest.raises(UnitError, match="multiple of 4"):
        prune_unet(unet, {"down_blocks.0.resnets.0": 6})
    with pytest.raises(UnitError, match=r"multiple of 4 in 4\.\.16"):
        prune_unet(unet, {"down_blocks.0.resnets.0": 20})
    config = dict(unet.config) | {"resnet_mid_channels": {"nowhere": 8}}
    with pytest.raises(UnitError, match="no such unit"):
        StudentUNet2DConditionModel.from_config(config)


def test_the_original_is_left_alone(unet: Any) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    prune_unet(unet, {unit.path: unit.kept(0.25) for unit in prunable_units(unet)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
