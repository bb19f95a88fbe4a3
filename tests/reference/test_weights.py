"""The shipped weights: within their budget, loadable, and good enough to be what they are called. Quick samples; the
figures that count are made by `make bars`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from latentrelay.reference import judge as judging
from latentrelay.reference import pipeline as reference
from latentrelay.reference.captions import sample_captions
from latentrelay.reference.vae import reconstruction_psnr
from safetensors import safe_open

MIB = 2**20
BUDGET_MIB = {"unet": 18, "vae": 8, "text_encoder": 5}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return reference.load()


def test_weights_are_half_precision_and_within_budget() -> None:
    folder = reference.reference_path()
    for part, limit in BUDGET_MIB.items():
        (path,) = (folder / part).glob("*.safetensors")
        assert path.stat().st_size <= limit * MIB, part
        with safe_open(path, "pt") as archive:
            kinds = {archive.get_slice(name).get_dtype() for name in archive.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, part
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 48 * MIB


def test_no_path_of_a_machine_is_in_the_configs() -> None:
    for path in reference.reference_path().rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "_name_or_path" not in json.loads(text), path
        assert str(Path.home()) not in text, path


def test_it_has_the_block_layout_of_sd_1(pipeline: Any) -> None:
    config = pipeline.unet.config
    assert list(config.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(config.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert config.layers_per_block == 2
    assert pipeline.unet.mid_block is not None
    assert pipeline.vae.config.latent_channels == 4
    assert 8e6 < sum(value.numel() for value in pipeline.unet.parameters()) < 15e6
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_latents_have_unit_scale(pipeline: Any) -> None:
    from latentrelay.reference.vae import latent_std

    assert latent_std(pipeline.vae, 32) * pipeline.vae.config.scaling_factor == pytest.approx(1, abs=0.06)


def test_vae_restores_held_out_scenes(pipeline: Any) -> None:
    assert reconstruction_psnr(pipeline.vae, count=32) >= 27


def test_judge_reads_held_out_renderings() -> None:
    judge = judging.load_judge(reference.reference_path())
    pairs = sample_captions("report", 96, 5)
    readings, features = judging.read(judge, judging.pictures_of([scene for scene, _ in pairs]))
    scores = [judging.score(reading, caption) for reading, (_, caption) in zip(readings, pairs, strict=True)]
    assert judging.summarise(scores).attribute_accuracy >= 0.98
    assert judging.chance_accuracy(readings, [caption for _, caption in pairs]) < 0.5
    assert features.shape == (96, judging.FEATURES)


def test_teacher_draws_what_captions_ask_for(pipeline: Any) -> None:
    pairs = sample_captions("gate", 12, 3)
    pictures = reference.generate(pipeline, [caption.text for _, caption in pairs], list(range(12)), num_steps=15)
    assert pictures.shape == (12, 3, 128, 128)
    judge = judging.load_judge(reference.reference_path())
    readings, _ = judging.read(judge, pictures)
    scores = [judging.score(reading, caption) for reading, (_, caption) in zip(readings, pairs, strict=True)]
    assert judging.summarise(scores).attribute_accuracy >= 0.6  # chance is below 0.4


def test_a_picture_does_not_depend_on_its_batch(pipeline: Any) -> None:
    prompts = ["a red circle on sand", "a small blue star at dusk"]
    together = reference.generate(pipeline, prompts, [1, 2], num_steps=3)
    alone = reference.generate(pipeline, prompts[1:], [2], num_steps=3)
    assert torch.allclose(together[1:], alone, atol=1e-4)
