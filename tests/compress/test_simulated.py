"""The w4a4 simulation: its grid by hand, what is left alone, and that nothing is left behind."""

import pytest
import torch
from latentrelay.compress.simulated import LABEL, rounded, simulated_w4a4


def test_grid_by_hand():
    values = torch.tensor([[7.0, -3.4, 0.4, 0.0], [70.0, -34.0, 4.0, 5.0]])
    assert rounded(values).tolist() == [[7.0, -3.0, 0.0, 0.0], [70.0, -30.0, 0.0, 0.0]]  # scales 1 and 10; 5/10 to even


def test_groups_have_their_own_scale_and_the_last_may_be_short():
    values = torch.cat([torch.full((1, 64), 0.07), torch.full((1, 36), 7.0)], dim=1)
    torch.testing.assert_close(rounded(values), values)
    assert rounded(torch.zeros(2, 10)).abs().sum() == 0
    image = torch.randn(2, 70, 3, 5)
    per_pixel = rounded(image.movedim(1, -1), axis=3).movedim(-1, 1)
    torch.testing.assert_close(rounded(image), per_pixel)


def test_unet_is_rounded_inside_and_itself_afterwards(tiny):
    torch.manual_seed(0)
    unet = tiny.make_unet(widths=(8, 16)).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(7.0), torch.randn(2, 5, 16))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.no_grad():
        want = unet(*inputs).sample
        with simulated_w4a4(unet, keep=["mid_block.resnets.0.conv1"]):
            got = unet(*inputs).sample
            layer = unet.down_blocks[0].resnets[0].conv1.weight
            assert layer[0, :, 0, 0].unique().numel() <= 15
            for name in ("conv_in", "conv_out", "time_embedding.linear_1", "mid_block.resnets.0.conv1"):
                torch.testing.assert_close(unet.get_submodule(name).weight, before[f"{name}.weight"], rtol=0, atol=0)
        after = unet(*inputs).sample
    snr_db = 10 * torch.log10(want.square().sum() / (got - want).square().sum())
    assert 3 < snr_db < 40
    torch.testing.assert_close(after, want, rtol=0, atol=0)
    assert "simulated" in LABEL


def test_an_exception_inside_restores(tiny):
    unet = tiny.make_unet(widths=(8, 16))
    before = unet.down_blocks[0].resnets[0].conv1.weight.clone()
    with pytest.raises(KeyError), simulated_w4a4(unet):
        raise KeyError("x")
    torch.testing.assert_close(unet.down_blocks[0].resnets[0].conv1.weight, before, rtol=0, atol=0)
    assert not unet.down_blocks[0].resnets[0].conv1._forward_pre_hooks
