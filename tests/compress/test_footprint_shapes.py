"""Footprints from configurations alone: counts equal the networks', and every figure moves the way it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from latentrelay.compress.footprint import WITH_ARENA, WITHOUT_ARENA, FootprintError, footprint
from latentrelay.compress.geometry import Geometry, GeometryError, from_folder, named, sd14

TINY: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
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


def tiny() -> Geometry:
    return Geometry("tiny", TINY, VAE, TEXT, 16, 16, 8)


def count(module: Any) -> int:
    return sum(each.numel() for each in module.parameters())


def test_parameters_are_the_networks_and_the_decoder_counts_without_its_encoder() -> None:
    geometry = tiny()
    result = footprint(geometry)
    vae = geometry.build_vae()
    assert result.parameters == count(geometry.build_unet())
    assert result.stage("text_encoder").parameters == count(geometry.build_text_encoder())
    assert result.stage("vae_decoder").parameters == count(vae.decoder) + count(vae.post_quant_conv)
    assert result.largest_file == "unet/model.onnx_data"
    assert result.largest_file_bytes == 4 * result.parameters
    assert result.bytes > 4 * result.all_parameters


def test_sd14_is_what_its_card_says() -> None:
    geometry = sd14()
    assert count(geometry.build_unet()) == 859_520_964
    assert count(geometry.build_vae()) == 83_653_863
    assert count(geometry.build_text_encoder()) == 123_060_480
    assert geometry.downscale == 8
    assert geometry.at(256, None).rows == 32


def test_memory_grows_with_the_picture_and_shrinks_without_the_arena() -> None:
    small, large = footprint(tiny()), footprint(tiny().at(64, 64))
    assert large.parameters == small.parameters
    assert large.stage("steps").activation_bytes > 4 * small.stage("steps").activation_bytes
    kept = footprint(tiny(), rules=WITH_ARENA).stage("steps").activation_bytes
    given_back = footprint(tiny(), rules=WITHOUT_ARENA).stage("steps").activation_bytes
    assert kept == pytest.approx(given_back * 2.1 / 1.06, rel=1e-3)


def test_scores_of_the_largest_attention_are_named() -> None:
    words = footprint(tiny().at(64, 64)).stage("steps").largest_activation
    assert words == "attention scores 2 x 2 x 1024 x 1024, 16 MiB"


def test_other_precisions_are_estimates_and_unknown_ones_refused() -> None:
    whole, half = footprint(tiny()), footprint(tiny(), "fp16")
    assert (whole.calibrated, half.calibrated) == (True, False)
    assert half.largest_file_bytes * 2 == whole.largest_file_bytes
    with pytest.raises(FootprintError, match="fp32"):
        footprint(tiny(), "w3")


def test_a_folder_gives_the_geometry_of_its_configurations(tmp_path: Path) -> None:
    for part, config in (("unet", TINY), ("vae", VAE), ("text_encoder", TEXT)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    assert footprint(from_folder(tmp_path)) == footprint(tiny())
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(GeometryError, match=r"vae/config\.json"):
        from_folder(tmp_path)


def test_what_is_not_served_is_refused() -> None:
    with pytest.raises(GeometryError, match="Transformer"):
        tiny().with_unet({**TINY, "_class_name": "Transformer2DModel"}).build_unet()
    with pytest.raises(GeometryError, match="sd14"):
        named("sdxl")
    with pytest.raises(GeometryError, match="multiple of 2"):
        tiny().at(33, None)
