"""Distilling a light autoencoder: the losses by hand, and a run of some steps that gets nearer to its teacher."""

from pathlib import Path

import pytest
import torch
from latentrelay.compress.distill_vae import (
    DecodePairs,
    LossWeights,
    decoder_losses,
    distil_decoder,
    distil_encoder,
    feature_error,
    gradient_error,
)
from latentrelay.compress.light_vae import LightVaeSpec, new_light_vae
from latentrelay.compress.training import BatchRng, Recipe

SPEC = LightVaeSpec(width=8, decoder_blocks=(1, 1, 1, 0), encoder_blocks=(0, 1, 1, 1))


def flat_pairs(rng: BatchRng, count: int) -> DecodePairs:
    """Pictures of one grey each, whose latents are the grey."""
    grey = torch.rand(count, 1, 1, 1, generator=rng.torch) * 2 - 1
    picture = grey.expand(count, 3, 32, 32).contiguous()
    return DecodePairs(grey.expand(count, 4, 4, 4).contiguous(), picture, picture)


def test_the_losses_by_hand() -> None:
    latents = torch.zeros(1, 4, 1, 1)
    zeros, ones = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    pairs = DecodePairs(latents, zeros, ones)
    weights = LossWeights(squared=2.0, absolute=3.0, gradient=1.0, perceptual=10.0, truth=0.5)
    losses = decoder_losses(ones, pairs, weights, None)
    assert losses["mse"] == pytest.approx(0.25)  # against the reconstruction alone, at peak 1
    assert losses["loss"] == pytest.approx(2 * 0.25 + 3 * 0.5)  # the target is half way; no gradients, no features
    with_features = decoder_losses(ones, pairs, weights, lambda pictures: [pictures])
    assert with_features["perceptual"] == pytest.approx(1.0)  # (1 - 0.5)^2 relative to 0.5^2
    assert with_features["loss"] == pytest.approx(losses["loss"].item() + 10.0)


def test_gradients_are_compared_at_three_scales() -> None:
    target, edge = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    edge[..., 4:] = 1
    assert gradient_error(edge, target) == pytest.approx((1 / 7 + 1 / 3 + 1 / 1) / 3)
    assert gradient_error(edge + 2, edge) == 0.0


def test_features_are_compared_layer_by_layer() -> None:
    one, two = torch.ones(1, 2), torch.full((1, 3), 2.0)
    assert feature_error([one * 3, two], [one, two]) == pytest.approx(4 / 2)


def test_both_halves_learn_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    recipe = Recipe(steps=40, batch=8, learning_rate=5e-3, warmup=2, ema_decay=0.5, checkpoint_every=20, log_every=20)
    student = new_light_vae(SPEC)
    probe = flat_pairs(BatchRng.of(9, 9), 8)

    def errors() -> tuple[float, float]:
        with torch.no_grad():
            picture = (student.decode(probe.latents).sample - probe.pictures).square().mean()
            return float(picture), float((student.encode(probe.pictures).latents - probe.latents).square().mean())

    before, seen = errors(), []
    distil_decoder(student, flat_pairs, recipe, tmp_path / "decoder", on_checkpoint=seen.append)
    distil_encoder(student, flat_pairs, recipe, tmp_path / "encoder")
    after = errors()
    assert seen == [20, 40]
    assert after[0] < before[0] / 10
    assert after[1] < before[1] / 4
    again = new_light_vae(SPEC)
    distil_decoder(again, flat_pairs, recipe, tmp_path / "decoder")  # finished: nothing left to do
    for one, other in zip(again.decoder.parameters(), student.decoder.parameters(), strict=True):
        torch.testing.assert_close(one, other)
