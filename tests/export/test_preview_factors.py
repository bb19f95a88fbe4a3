"""Preview factors: what least squares finds, and that a bundle's are its own decoder's, as the runtime runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from latentrelay.export import export
from latentrelay.export.preview_factors import FIT, HELD_OUT, fit_preview, random_latents
from latentrelay.runtime import Bundle, Session
from latentrelay.runtime.preview import project

WEIGHTS = np.array([[0.08, 0.0, -0.04, 0.02], [0.0, 0.06, 0.04, 0.0], [-0.02, 0.04, 0.0, 0.08]])
BIAS = np.array([0.5, 0.45, 0.4])


def linear(latents: np.ndarray) -> np.ndarray:
    return np.einsum("kc,chw->hwk", WEIGHTS, latents[0]) + BIAS


def draws(count: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 4, 6, 5)).astype(np.float32) for _ in range(count)]


def test_a_linear_decoder_is_found_and_another_one_as_well_as_can_be() -> None:
    spec, report = fit_preview(linear, draws(4, 0), draws(2, 1))
    np.testing.assert_allclose(spec.factors, WEIGHTS, atol=1e-3)
    np.testing.assert_allclose(spec.bias, BIAS, atol=1e-3)
    assert report["psnr_db"] > 60 > 25 > report["mean_colour_psnr_db"]
    noise = np.random.default_rng(2)
    _, rough = fit_preview(lambda x: linear(x) + 0.1 * noise.standard_normal((6, 5, 3)), draws(4, 0), draws(2, 1))
    assert rough["psnr_db"] == pytest.approx(20.0, abs=1.0)  # the noise is left, and held-out pictures say so
    flat, _ = fit_preview(lambda x: np.full((6, 5, 3), 0.25), draws(2, 0), draws(1, 1))
    np.testing.assert_allclose(flat.factors, 0.0, atol=1e-6)
    np.testing.assert_allclose(flat.bias, 0.25, atol=1e-6)


def test_a_channel_that_never_moves_has_no_factor() -> None:
    still = [each * np.array([1, 1, 0, 1], np.float32).reshape(1, 4, 1, 1) for each in draws(4, 0)]
    spec, _ = fit_preview(linear, still, still)
    assert all(np.isfinite(value) for row in spec.factors for value in row)
    np.testing.assert_allclose([row[2] for row in spec.factors], 0.0, atol=1e-9)


def test_random_latents_are_the_same_each_time_and_never_the_same_twice() -> None:
    first, again = list(random_latents((1, 4, 9, 6), 5)), list(random_latents((1, 4, 9, 6), 5))
    np.testing.assert_array_equal(first, again)
    assert len({each.tobytes() for each in first}) == 5
    np.testing.assert_array_equal(next(iter(random_latents((1, 4, 9, 6), 1, 3))), first[3])
    assert {(each.shape, each.dtype) for each in first} == {((1, 4, 9, 6), np.dtype(np.float32))}


@pytest.fixture(scope="module", params=["light", "few steps"])
def bundle(request: pytest.FixtureRequest, tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder, light = tmp_path_factory.mktemp("preview") / "bundle", None
    if request.param == "light":  # whose scaling is not the source's
        torch.manual_seed(1)
        light = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(0, 1),
            num_decoder_blocks=(1, 0), scaling_factor=0.5,
        ).eval()  # fmt: skip
    few = {"sampler": "lcm", "few_step": True} if request.param == "few steps" else {}
    export(tiny_pipeline, "pixel-8", folder, num_steps=2, light_vae=light, **few)
    return Bundle.open(folder)


def test_a_bundle_without_recorded_runs_has_the_factors_of_its_own_decoder(bundle: Bundle) -> None:
    spec, report = bundle.manifest.preview, bundle.manifest.quality["preview"]
    assert spec is not None
    assert report["fitted_on"] == "random latents"
    assert again(bundle, list(random_latents((1, *latent(bundle)), HELD_OUT, FIT))) == pytest.approx(
        report["psnr_db"], abs=0.02
    )
    assert report["psnr_db"] > report["mean_colour_psnr_db"] - 0.5  # a decoder of random weights is hardly linear


def latent(bundle: Bundle) -> tuple[int, int, int]:
    spec = bundle.manifest.latent
    return spec.channels, spec.height, spec.width


def again(bundle: Bundle, held_out: list[np.ndarray]) -> float:
    """The report's figure by the runtime: `project` against `Session.decode` averaged."""
    spec, size = bundle.manifest.preview, bundle.manifest.latent.downscale
    assert spec is not None
    errors = []
    with Session(bundle, threads=1) as session:
        for latents in held_out:
            pixels = session.decode(latents)
            wanted = pixels.reshape(latents.shape[2], size, latents.shape[3], size, 3).mean(axis=(1, 3))
            rgb = np.einsum("kc,chw->hwk", np.array(spec.factors), latents[0]) + spec.bias
            errors.append(np.mean((np.clip(rgb, 0, 1) - wanted) ** 2))
            np.testing.assert_allclose(project(latents, spec.factors, spec.bias) / 255, np.clip(rgb, 0, 1), atol=3e-3)
    return float(-10 * np.log10(np.mean(errors)))
