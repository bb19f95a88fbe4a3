"""Every network trains two steps on its real data and comes back from disk; the cache resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from latentrelay.compress.training import Recipe
from latentrelay.reference import judge, pipeline, text_encoder, train, unet, vae
from latentrelay.reference.captions import write_tokenizer
from latentrelay.reference.curve import plot, rows_of
from transformers import CLIPTokenizer

RECIPE = Recipe(steps=2, batch=4, learning_rate=1e-4, warmup=1, checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training folder after two steps of every stage."""
    folder = tmp_path_factory.mktemp("training")
    autoencoder = vae.train(RECIPE, folder / "vae")
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = text_encoder.train(tokenizer, RECIPE, folder / "text").eval()
    encoder.save_pretrained(folder / "text_encoder")
    for _ in range(2):  # the second time everything is there already
        unet.cache_latents(autoencoder, 0.5, folder / "cache", 64, 8, shard_size=4)
        unet.cache_embeddings(tokenizer, encoder, folder / "cache", 64, 8, 2, shard_size=4)
    unet.train(unet.new_unet((8, 8, 16, 16)), unet.load_cache(folder / "cache", 64), RECIPE, folder / "unet-64")
    judge.train(RECIPE, folder / "judge", vae.autoencoder(autoencoder))
    return folder


def test_the_cache_holds_what_the_encoders_say(trained: Path) -> None:
    cached = unet.load_cache(trained / "cache", 64)
    assert cached.latents.shape == (8, 4, 8, 8)
    assert cached.embeddings.shape == (16, 32, 128)
    assert cached.captions == 2
    found = AutoencoderKL.from_pretrained(trained / "vae" / "vae")
    scenes = unet.sample_scenes("train", 8, seed=64)
    expected = vae.encode_scenes(found, scenes, 64) * 0.5
    assert np.abs(cached.latents - expected.numpy()).max() < 0.02


def test_an_incomplete_cache_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "latents-64-000.npy").write_bytes((trained / "cache" / "latents-64-000.npy").read_bytes())
    with pytest.raises(FileNotFoundError, match="no complete cache for 64 pixels"):
        unet.load_cache(tmp_path, 64)


def test_the_parts_assemble_into_a_pipeline_folder(trained: Path, tmp_path: Path) -> None:
    whole = pipeline.assemble(
        UNet2DConditionModel.from_pretrained(trained / "unet-64" / "unet"),
        AutoencoderKL.from_pretrained(trained / "vae" / "vae"),
        text_encoder.CLIPTextModel.from_pretrained(trained / "text_encoder"),
        CLIPTokenizer.from_pretrained(trained / "tokenizer"),
        0.4,
    )
    pipeline.save(whole, tmp_path)
    assert isinstance(whole, StableDiffusionPipeline)
    loaded = pipeline.load(tmp_path)
    assert loaded.vae.config.scaling_factor == 0.4
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    for mine, theirs in zip(whole.unet.parameters(), loaded.unet.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-3)


def test_the_judge_is_saved_as_it_was_trained(trained: Path) -> None:
    assert judge.load_judge(trained / "judge").features(torch.zeros(1, 3, 128, 128)).shape == (1, judge.FEATURES)


def test_curves_are_plotted_from_logs(trained: Path, tmp_path: Path) -> None:
    assert [row["step"] for row in rows_of(trained / "vae" / "log.jsonl")] == [1, 2]
    plot(trained, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    with pytest.raises(FileNotFoundError, match="no logs"):
        plot(tmp_path, tmp_path / "other.png")


def test_recipes_share_their_code_and_differ_in_size() -> None:
    assert set(train.RECIPES) == {"cpu", "gpu"}
    sizes = {
        name: sum(value.numel() for value in unet.new_unet(recipes.widths).parameters())
        for name, recipes in train.RECIPES.items()
    }
    assert 8e6 < sizes["cpu"] < 10e6
    assert 12e6 < sizes["gpu"] < 15e6


def test_done_stages_are_skipped(tmp_path: Path) -> None:
    from rich.console import Console

    training = train.Training(tmp_path, replace(train.CPU), Console(quiet=True))
    training.run("tokenizer")
    written = (tmp_path / "tokenizer" / "vocab.json").stat().st_mtime_ns
    training.run("tokenizer")
    assert (tmp_path / "tokenizer" / "vocab.json").stat().st_mtime_ns == written
