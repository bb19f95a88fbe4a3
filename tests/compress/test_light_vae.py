"""Sizes of light autoencoders, and the two scaling conventions side by side."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from latentrelay.compress.light_vae import (
    SD,
    LightVaeSpec,
    decode_scaled,
    load_light_vae,
    new_light_vae,
    sd_light_decoder,
)
from latentrelay.compress.remove_blocks import parameter_count

TINY = LightVaeSpec(width=8, decoder_blocks=(1, 1, 1, 0), encoder_blocks=(0, 1, 1, 1))


def test_sd_geometry_is_the_published_one_to_the_parameter() -> None:
    assert parameter_count(sd_light_decoder()) == 1_222_531
    vae = new_light_vae(SD)
    assert parameter_count(vae.encoder) == 1_222_532
    assert tuple(vae.config.decoder_block_out_channels) == (64, 64, 64, 64)


def test_a_light_decoder_takes_scaled_latents_and_a_large_one_does_not() -> None:
    latents = torch.randn(1, 4, 4, 4)
    light = new_light_vae(TINY)
    assert light.config.scaling_factor == 1.0
    torch.testing.assert_close(decode_scaled(light, latents), light.decode(latents).sample)
    large = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, scaling_factor=0.5).eval()
    with torch.no_grad():
        torch.testing.assert_close(decode_scaled(large, latents), large.decode(latents * 2).sample)


def test_pictures_are_minus_one_to_one_on_both_sides() -> None:
    vae = new_light_vae(TINY)
    with torch.no_grad():
        for parameter in vae.decoder.layers[-1].parameters():
            parameter.zero_()
        assert torch.equal(vae.decode(torch.zeros(1, 4, 2, 2)).sample, torch.full((1, 3, 16, 16), -1.0))  # 0 inside
        black = vae.encoder.layers(torch.zeros(1, 3, 16, 16))
        torch.testing.assert_close(vae.encode(torch.full((1, 3, 16, 16), -1.0)).latents, black)


def test_the_seed_makes_the_weights_and_nothing_else_changes() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second = new_light_vae(TINY, seed=5), new_light_vae(TINY, seed=5)
    assert torch.equal(torch.rand(1), expected)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_stored_and_read_like_any_of_diffusers(tmp_path: object) -> None:
    vae = new_light_vae(TINY)
    vae.half().save_pretrained(str(tmp_path))
    loaded = load_light_vae(str(tmp_path))
    assert isinstance(loaded, AutoencoderTiny)
    assert next(loaded.parameters()).dtype == torch.float32
    assert tuple(loaded.config.num_decoder_blocks) == (1, 1, 1, 0)
