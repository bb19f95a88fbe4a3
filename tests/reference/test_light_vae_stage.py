"""The light autoencoder's data and stage: cached pairs are the teacher's, a draw its step's own, both halves train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from latentrelay.compress.light_vae import decode_scaled, load_light_vae
from latentrelay.compress.remove_blocks import parameter_count
from latentrelay.compress.training import BatchRng, Recipe
from latentrelay.reference import judge, light_vae, unet, vae
from latentrelay.reference.scenes import render, sample_scenes

RECIPE = Recipe(steps=2, batch=2, learning_rate=1e-4, warmup=1, checkpoint_every=2, log_every=1)
SCALE = 0.5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two scenes, by an untrained teacher."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = vae.new_vae().eval()
    unet.cache_latents(teacher, SCALE, folder, 128, 4, shard_size=2)
    for _ in range(2):  # the second time everything is there already
        light_vae.cache_pictures(teacher, SCALE, folder, 4, shard_size=2, batch=2)
    return folder


def test_pairs_are_the_teachers_decodes_beside_the_truth(cache: Path) -> None:
    pairs = np.load(cache / "pictures-128-001.npy")
    assert (pairs.shape, pairs.dtype) == ((2, 2, 128, 128, 3), np.uint8)
    truth = render(sample_scenes("train", 4, seed=128), 128)[2:]
    assert np.abs(pairs[:, 1] / 255 - truth).max() <= 0.5 / 255 + 1e-6
    latents = torch.from_numpy(np.load(cache / "latents-128-001.npy").astype(np.float32))
    with torch.no_grad():
        decoded = vae.new_vae().eval().decode(latents / SCALE).sample.clamp(-1, 1)
    expected = decoded.permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert np.abs(pairs[:, 0] / 255 - expected).mean() < 0.01  # bfloat16 and a byte


def test_a_draw_depends_on_its_step_alone_and_keeps_pairs_together(cache: Path) -> None:
    source = light_vae.CachedPairs.of(cache)
    first, again = source(BatchRng.of(0, 3), 6), source(BatchRng.of(0, 3), 6)
    assert torch.equal(first.latents, again.latents)
    assert first.latents.shape == (6, 4, 16, 16)
    assert first.reconstructions.shape == first.pictures.shape == (6, 3, 128, 128)
    known = np.concatenate([np.load(cache / f"latents-128-00{i}.npy") for i in (0, 1)]).astype(np.float32)
    truth = torch.from_numpy(render(sample_scenes("train", 4, seed=128), 128)).permute(0, 3, 1, 2) * 2 - 1
    for latents, picture in zip(first.latents, first.pictures, strict=True):
        row = int(np.abs(known - latents.numpy()).reshape(4, -1).max(1).argmin())
        assert (truth[row] - picture).abs().max() < 0.01
    with pytest.raises(FileNotFoundError, match="light_vae"):
        light_vae.CachedPairs.of(cache.parent / "nowhere")


def test_both_halves_train_and_are_stored_in_half_precision(cache: Path, tmp_path: Path) -> None:
    student = light_vae.train(cache, judge.Judge(), RECIPE, RECIPE, tmp_path)
    fresh = light_vae.new_light_vae(light_vae.SPEC, RECIPE.seed)
    for part in ("decoder", "encoder"):
        pairs = zip(getattr(student, part).parameters(), getattr(fresh, part).parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in pairs)
    assert (tmp_path / "decoder" / "log.jsonl").read_text().count("perceptual") == 2
    light_vae.save(student, tmp_path / "saved")
    loaded = load_light_vae(tmp_path / "saved")
    assert loaded.config.get("_name_or_path") != str(tmp_path)
    for one, other in zip(loaded.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_the_size_stays_below_a_tenth_of_the_sources_decoder() -> None:
    student = light_vae.new_light_vae(light_vae.SPEC)
    assert parameter_count(student.decoder) == 168_419
    assert parameter_count(student.decoder) <= 0.1 * parameter_count(vae.new_vae().decoder)


def test_the_shipped_weights_are_small_and_near_their_teacher() -> None:
    from latentrelay.reference import pipeline

    try:
        student, teacher = light_vae.load_reference_light_vae(), pipeline.load().vae
    except (FileNotFoundError, OSError) as error:
        pytest.skip(str(error))
    files = [pipeline.reference_path() / part / "diffusion_pytorch_model.safetensors" for part in ("vae", "light_vae")]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert student.config.scaling_factor == 1.0
    truth = torch.from_numpy(render(sample_scenes("gate", 4, seed=5), 128)).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        latents = teacher.encode(truth).latent_dist.mean * teacher.config.scaling_factor
        wanted, got = decode_scaled(teacher, latents), decode_scaled(student, latents)
        guessed = student.encode(truth).latents
    mse = ((got - wanted).clamp(-2, 2) / 2).square().mean((1, 2, 3))
    assert float((-10 * mse.log10()).mean()) > 31
    assert float((guessed - latents).square().mean() / latents.square().mean()) < 0.02
