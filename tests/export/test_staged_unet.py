"""A U-Net in stages: over its own feature the shallow path is the network, bit for bit; what has none is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.export.errors import UnsupportedSourceError
from latentrelay.export.staged_torch import StagedTorch
from latentrelay.export.staged_unet import FullUNet, ProbeUNet, ShallowUNet, check_stages, probes_of
from latentrelay.reference import students
from torch import Tensor

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def stock(**other: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **other}).eval()


def inputs(unet: Any, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One step of two branches at the network's own size."""
    generator = torch.Generator().manual_seed(seed)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    sample = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    return sample, torch.tensor(481.0), torch.randn(2, 7, width, generator=generator)


def student(name: str) -> UNet2DConditionModel:
    folder = students.student_path(name) / "unet"
    return StudentUNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32).eval()


NETWORKS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "two layers": stock,
    "one layer": lambda: stock(layers_per_block=1),
    "no attention outside": lambda: stock(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    ),
    "no mid block": lambda: stock(mid_block_type=None),
    **{f"released student {name}": partial(student, name) for name in sorted(set(students.RELEASED_FOR.values()))},
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_the_stages_are_the_network_bit_for_bit(name: str) -> None:
    unet: Any = NETWORKS[name]()
    case = inputs(unet)
    expected = unet(*case, return_dict=False)[0]
    for probe in probes_of(unet):
        out, deep, seen = FullUNet(unet, probe)(*case)
        assert torch.equal(out, expected)
        again, probed = ShallowUNet(unet, probe)(*case, deep)
        assert torch.equal(again, expected)
        assert torch.equal(probed, seen)
        assert torch.equal(ProbeUNet(unet, probe)(*case), seen)
    without = FullUNet(unet)(*case)
    assert len(without) == 2
    assert torch.equal(ShallowUNet(unet)(*case, without[1]), expected)


@torch.no_grad()
def test_the_shallow_path_follows_the_feature_that_it_is_given() -> None:
    unet = stock()
    case, other = inputs(unet), inputs(unet, seed=2)
    deep = FullUNet(unet)(*other)[1]
    shallow = ShallowUNet(unet)(*case, deep)
    assert not torch.equal(shallow, unet(*case, return_dict=False)[0])
    assert not torch.equal(shallow, unet(*other, return_dict=False)[0])


@torch.no_grad()
def test_cut_values_are_those_of_the_layers_that_they_are_named_after() -> None:
    unet = stock()
    case = inputs(unet)
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, arguments, result: read.__setitem__(name, arguments[0])

    handles = [
        unet.down_blocks[0].resnets[0].norm1.register_forward_hook(keep("P0")),
        unet.down_blocks[0].resnets[0].norm2.register_forward_hook(keep("P1")),
        unet.down_blocks[0].attentions[0].register_forward_hook(keep("P2")),
        unet.down_blocks[0].resnets[1].register_forward_hook(keep("P3")),
        unet.up_blocks[-1].resnets[-1].register_forward_hook(keep("joined")),
    ]
    _, deep = FullUNet(unet)(*case)
    for handle in handles:
        handle.remove()
    for probe in ("P0", "P1", "P2", "P3"):
        assert torch.equal(ProbeUNet(unet, probe)(*case), read[probe]), probe
    assert torch.equal(torch.cat([deep, read["P0"]], dim=1), read["joined"])


def test_the_modules_hold_the_networks_own_weights_and_leave_no_hook() -> None:
    unet = stock()
    full = FullUNet(unet, "P1")
    assert {id(each) for each in full.parameters()} == {id(each) for each in unet.parameters()}
    with torch.no_grad():
        full(*inputs(unet))
    assert not any(module._forward_hooks for module in unet.modules())


def test_the_probe_of_attention_is_absent_where_the_first_block_has_none() -> None:
    unet = NETWORKS["no attention outside"]()
    assert probes_of(unet) == ("P0", "P1", "P2")
    with pytest.raises(UnsupportedSourceError, match=r"first down block, for a probe.*P3.*P0 \| P1 \| P2"):
        ProbeUNet(unet, "P3")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"center_input_sample": True}, "center_input_sample"),
        ({"class_embed_type": "timestep"}, "class_embedding"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "last up block"),
    ],
)
def test_a_structure_without_a_shallow_path_is_refused_by_name(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedSourceError, match=part):
        check_stages(stock(**change))


def test_free_u_and_a_scaled_shift_are_refused_by_name() -> None:
    unet = stock()
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(UnsupportedSourceError, match="FreeU"):
        ShallowUNet(unet)
    shifted = stock(resnet_time_scale_shift="scale_shift")
    ShallowUNet(shifted, "P0")
    with pytest.raises(UnsupportedSourceError, match="first resnet, for a probe"):
        ShallowUNet(shifted, "P1")


def test_the_staged_denoiser_scales_its_input_and_looks_the_timestep_up() -> None:
    unet: Any = stock()
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    table = solver_table(scheduler, 6)
    staged = StagedTorch(unet, table, "P2")
    rng = np.random.default_rng(0)
    latents, states = (rng.standard_normal(shape, dtype=np.float32) for shape in ((1, 4, 8, 8), (2, 7, 24)))
    step = 3
    assert table.rows[step].s != 1.0
    sample = torch.from_numpy(latents * np.float32(table.rows[step].s)).repeat(2, 1, 1, 1)
    with torch.no_grad():
        timestep = torch.tensor(table.timesteps[step], dtype=torch.float32)
        expected = unet(sample, timestep, torch.from_numpy(states), return_dict=False)[0].numpy()
    made = staged.full(latents, step, states)
    np.testing.assert_array_equal(made.noise_pred, expected)
    np.testing.assert_array_equal(staged.shallow(latents, step, states, made.feature), expected)
    np.testing.assert_array_equal(staged.probe(latents, step, states), made.probe)
    without = StagedTorch(unet, table, None)
    assert without.full(latents, step, states).probe is None
    with pytest.raises(ValueError, match="without a probe"):
        without.probe(latents, step, states)
