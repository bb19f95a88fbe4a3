"""A bundle that decodes with a light autoencoder: its own scaling on the device, the source's on the wire."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from latentrelay.compress.light_vae import decode_scaled
from latentrelay.export import export
from latentrelay.export.errors import SourceError, UnsupportedSourceError
from latentrelay.export.light_decoder import checked_light_vae, decoder_spec
from latentrelay.export.onnx_graphs import LightDecoderGraph
from latentrelay.export.parity import snr_db
from latentrelay.export.source import model_digest
from latentrelay.runtime import Bundle, Session, generate

STEPS, FACTOR = 4, 0.5  # the source's factor is 0.18215; a third one shows a wrong division


def light_vae(**changes: Any) -> AutoencoderTiny:
    torch.manual_seed(1)
    arguments: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (0, 1),
        "num_decoder_blocks": (1, 0),
        "scaling_factor": FACTOR,
    }
    return AutoencoderTiny(**{**arguments, **changes}).eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    return light_vae()


@pytest.fixture(scope="module")
def bundle(tiny_pipeline: Any, vae: AutoencoderTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("light") / "bundle"
    result = export(tiny_pipeline, "pixel-8", folder, num_steps=STEPS, light_vae=vae)
    assert result.parity_db["vae_decoder"] >= 60.0
    return result.bundle


def test_the_manifest_keeps_both_scalings(bundle: Path, tiny_pipeline: Any) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.schema_version == "1.4"
    assert manifest.latent.scaling_factor == tiny_pipeline.vae.config.scaling_factor == 0.18215
    assert manifest.decoder is not None
    assert (manifest.decoder.class_name, manifest.decoder.scaling_factor) == ("AutoencoderTiny", FACTOR)
    assert manifest.decoder_scaling == (FACTOR, 0.0)
    assert manifest.source.digest == model_digest(tiny_pipeline)  # the cloud's model is the whole source


def test_the_picture_is_the_light_decoders(bundle: Path, vae: AutoencoderTiny) -> None:
    result = generate(bundle, "a red cat", seed=5)
    with torch.no_grad():
        expected = decode_scaled(vae, torch.from_numpy(result.latents))[0].permute(1, 2, 0).numpy()
    pixels = np.clip(expected / 2 + 0.5, 0, 1)
    assert pixels.std() > 1e-3
    with Session(Bundle.open(bundle)) as session:
        np.testing.assert_allclose(session.decode(result.latents), pixels, atol=1e-5)
        assert session.selftest().ok


def test_a_source_cloud_starts_what_a_light_bundle_finishes(bundle: Path, tiny_cloud: str) -> None:
    whole = generate(bundle, "a red cat", seed=5)
    hybrid = generate(bundle, "a red cat", seed=5, cloud=tiny_cloud, split=2)
    assert snr_db(whole.latents, hybrid.latents) >= 50.0  # float16 on the wire


def test_optimum_decodes_the_same_picture(bundle: Path, tiny_pipeline: Any, vae: AutoencoderTiny) -> None:
    import warnings

    from diffusers import StableDiffusionPipeline

    config = json.loads((bundle / "vae_decoder" / "config.json").read_text())
    assert (config["_class_name"], config["scaling_factor"]) == ("AutoencoderTiny", FACTOR)
    request: dict[str, Any] = {
        "prompt": "a red cat",
        "latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)),
        "num_inference_steps": STEPS,
        "output_type": "np",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optimum pulls in torch.jit and reads configurations in deprecated ways
        from optimum.onnxruntime import ORTStableDiffusionPipeline

        other = ORTStableDiffusionPipeline.from_pretrained(str(bundle))
        light = StableDiffusionPipeline(**{**tiny_pipeline.components, "vae": vae}, requires_safety_checker=False)
        for pipeline in (other, light):
            pipeline.set_progress_bar_config(disable=True)
        got, expected = other(**request).images[0], light(**request).images[0]
    assert expected.std() > 1e-3
    assert -10 * np.log10(np.mean((got - expected) ** 2)) >= 60.0


def test_a_decoder_that_does_not_fold_is_exported_as_it_is() -> None:
    vae = light_vae(num_decoder_blocks=(1, 1))
    graph = LightDecoderGraph(vae)
    assert graph.decoder is vae.decoder
    latents = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(graph(latents), vae.decode(latents).sample)


def test_a_folder_will_do_and_an_empty_one_is_named(tiny_pipeline: Any, vae: AutoencoderTiny, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path / "light")
    found = checked_light_vae(tmp_path / "light", tiny_pipeline)
    assert decoder_spec(found) == decoder_spec(vae)
    with pytest.raises(SourceError, match="nowhere"):
        checked_light_vae(tmp_path / "nowhere", tiny_pipeline)


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (lambda: AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4), "light decoder"),
        (lambda: light_vae(latent_channels=8), "latent channels"),
        (
            lambda: light_vae(
                encoder_block_out_channels=(8,) * 3,
                decoder_block_out_channels=(8,) * 3,
                num_encoder_blocks=(0, 1, 1),
                num_decoder_blocks=(1, 1, 0),
            ),
            "pixels a latent",
        ),
        (lambda: light_vae(shift_factor=0.1), "shift factor"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused_by_name(tiny_pipeline: Any, other: Any, part: str) -> None:
    with pytest.raises(UnsupportedSourceError, match=part) as caught:
        checked_light_vae(other(), tiny_pipeline)
    assert caught.value.exit_status == 3
