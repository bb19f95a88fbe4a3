"""The folded tail equals the two convolutions it stands for, borders and odd sizes too, and gradients reach both."""

import pytest
import torch
from latentrelay.compress.folded_tail import FoldedDecoder, FoldedTail, folded_kernel, folds
from latentrelay.compress.light_vae import LightVaeSpec, new_light_vae
from torch import nn


def tail(channels: int = 5, outputs: int = 3) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(0)
    first = nn.Conv2d(channels, channels, 3, padding=1, bias=False).double()
    return first, nn.Conv2d(channels, outputs, 3, padding=1).double()


@pytest.mark.parametrize("size", [(8, 8), (3, 7), (2, 2), (1, 4)])
def test_the_fold_is_exact_up_to_the_border(size: tuple[int, int]) -> None:
    first, second = tail()
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = second(first(nn.functional.interpolate(x, scale_factor=2, mode="nearest")))
    torch.testing.assert_close(FoldedTail(first, second)(x), expected, atol=1e-12, rtol=0)


def test_one_tap_lands_where_it_should_by_hand() -> None:
    first, second = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    first[0, 0, 1, 1] = second[0, 0, 1, 2] = 1  # look one pixel to the right
    kernel = folded_kernel(first, second)
    assert kernel.shape == (4, 1, 3, 3)
    for position in (0, 2):  # the left pixel of a pair looks at its own source pixel
        assert kernel[position, 0].nonzero().tolist() == [[1, 1]]
    for position in (1, 3):  # the right one at its neighbour's
        assert kernel[position, 0].nonzero().tolist() == [[1, 2]]


def test_gradients_are_those_of_the_plain_tail_and_freezing_ends_them() -> None:
    first, second = tail()
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    second(first(nn.functional.interpolate(x, scale_factor=2))).square().sum().backward()
    expected = [each.grad.clone() for each in (first.weight, second.weight, second.bias) if each.grad is not None]
    for module in (first, second):
        module.zero_grad()
    folded = FoldedTail(first, second)
    folded(x).square().sum().backward()
    for parameter, wanted in zip((first.weight, second.weight, second.bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-8, rtol=1e-8)
    folded.freeze()
    assert folded.frozen is not None
    assert not folded.frozen.requires_grad


def test_a_whole_decoder_keeps_its_pictures_and_its_parameters() -> None:
    decoder = new_light_vae(LightVaeSpec(8, (1, 1, 1, 0), (0, 1, 1, 1))).decoder
    folded = FoldedDecoder(decoder)
    latents = torch.randn(2, 4, 4, 6)
    torch.testing.assert_close(folded(latents), decoder(latents), atol=1e-6, rtol=0)
    assert {id(each) for each in folded.parameters()} == {id(each) for each in decoder.parameters()}


def test_what_does_not_end_so_is_left_alone() -> None:
    assert folds(new_light_vae(LightVaeSpec(8, (1, 1, 1, 0), (0, 1, 1, 1))).decoder)
    assert not folds(new_light_vae(LightVaeSpec(8, (1, 1, 1, 1), (0, 1, 1, 1))).decoder)
