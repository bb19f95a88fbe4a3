"""Distillation: losses by hand, a student that learns, a killed run, an early stop, and folders that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from latentrelay.compress.distill_unet import DistilLosses, HeldOut, NoiseSchedule, distill_unet, watching
from latentrelay.compress.errors import CompressError, TrainingError
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.prune_unet import prune_unet
from latentrelay.compress.remove_blocks import BlockRecipe, block_map
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.compress.training import Recipe

RECIPE = Recipe(
    steps=12, batch=4, learning_rate=3e-3, warmup=2, decay=0.5, ema_decay=0.5, checkpoint_every=4, log_every=4
)


class Noise:
    """Latents and text states of a seed: enough to learn a network's function from."""

    identity = "noise"

    def batch(self, rng: np.random.Generator, count: int, caption_dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
        latents = rng.standard_normal((count, 4, 8, 8)).astype(np.float32)
        states = rng.standard_normal((count, 3, 8)).astype(np.float32)
        states[rng.random(count) < caption_dropout] = 0
        return torch.from_numpy(latents), torch.from_numpy(states)


def new_teacher() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


@pytest.fixture(scope="module")
def teacher() -> Any:
    return new_teacher()


def new_student(teacher: Any) -> Any:
    return prune_unet(teacher, {unit.path: unit.kept(0.5) for unit in prunable_units(teacher)})


SCHEDULE = NoiseSchedule.of(DDPMScheduler(prediction_type="v_prediction"))


def distil(teacher: Any, folder: Path, recipe: Recipe = RECIPE, **more: Any) -> Any:
    features = block_map(teacher, BlockRecipe())
    return distill_unet(new_student(teacher), teacher, Noise(), SCHEDULE, features, recipe, folder, **more)


def test_v_and_epsilon_targets_and_weights_by_hand() -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for kind in ("v_prediction", "epsilon"):
        schedule = NoiseSchedule(torch.tensor([0.99, 0.8, 0.3, 0.01]), kind)
        noisy, timesteps, target, weight = schedule.draw(latents, torch.Generator().manual_seed(0))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        for row in range(2):
            bar = schedule.alphas_cumprod[timesteps[row]]
            assert torch.allclose(noisy[row], bar.sqrt() * latents[row] + (1 - bar).sqrt() * noise[row])
            v = bar.sqrt() * noise[row] - (1 - bar).sqrt() * latents[row]
            assert torch.allclose(target[row], v if kind == "v_prediction" else noise[row])
            snr = bar / (1 - bar)
            capped = min(float(snr), 5.0)
            assert float(weight[row]) == pytest.approx(
                capped / float(snr + 1) if kind == "v_prediction" else capped / float(snr)
            )
        assert timesteps.tolist()[0] < 2 <= timesteps.tolist()[1]  # one from each half
    with pytest.raises(CompressError, match="sample"):
        NoiseSchedule.of(DDPMScheduler(prediction_type="sample"))


def test_a_student_that_is_its_teacher_has_no_output_or_feature_loss(teacher: Any, tmp_path: Path) -> None:
    same = prune_unet(teacher, {})
    still = Recipe(steps=1, batch=4, learning_rate=0.0, checkpoint_every=1, log_every=1)
    distill_unet(same, teacher, Noise(), SCHEDULE, block_map(teacher, BlockRecipe()), still, tmp_path)
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["output"] == pytest.approx(0, abs=1e-10)
    assert row["feature"] == pytest.approx(0, abs=1e-10)
    assert row["task"] > 0.1


def test_the_held_out_error_falls_and_the_best_is_kept(teacher: Any, tmp_path: Path) -> None:
    recipe = Recipe(steps=60, batch=8, learning_rate=3e-3, warmup=5, ema_decay=0.8, checkpoint_every=20, log_every=20)
    losses = DistilLosses(task=0.0)
    distil(teacher, tmp_path, recipe, held_out=Noise(), losses=losses)
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    before = HeldOut(teacher, Noise(), SCHEDULE, tmp_path / "none.jsonl", losses).error(new_student(teacher))
    assert rows[-1]["score"] < 0.5 * before
    kept: Any = StudentUNet2DConditionModel.from_pretrained(tmp_path / "unet")
    best = min(rows, key=lambda row: row["score"])
    assert json.loads((tmp_path / "unet" / "step.json").read_text()) == {"step": best["step"]}
    again = HeldOut(teacher, Noise(), SCHEDULE, tmp_path / "none.jsonl", losses).error(kept)
    assert again == pytest.approx(best["score"], rel=1e-4)


def test_a_killed_run_ends_where_an_unbroken_one_does(teacher: Any, tmp_path: Path) -> None:
    class Power(Exception):
        """A cut."""

    class Failing(Noise):
        def __init__(self) -> None:
            self.left = 10

        def batch(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
            self.left -= 1
            if self.left < 0:
                raise Power
            return super().batch(*arguments)

    whole = distil(teacher, tmp_path / "whole", held_out=Noise()).state_dict()
    features = block_map(teacher, BlockRecipe())
    with pytest.raises(Power):
        distill_unet(
            new_student(teacher), teacher, Failing(), SCHEDULE, features, RECIPE, tmp_path / "cut", held_out=Noise()
        )
    resumed = distil(teacher, tmp_path / "cut", held_out=Noise()).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    for name in ("log.jsonl", "held_out.jsonl"):
        rows = [
            [json.loads(line) for line in (tmp_path / each / name).read_text().splitlines()]
            for each in ("whole", "cut")
        ]
        for row in (*rows[0], *rows[1]):
            row.pop("samples_per_s", None)
        assert rows[0] == rows[1]


def test_training_ends_when_the_held_out_score_stands_still(teacher: Any, tmp_path: Path) -> None:
    still = Recipe(steps=40, batch=2, learning_rate=0.0, checkpoint_every=2, log_every=2)
    losses = DistilLosses(patience=3)
    distil(teacher, tmp_path, still, held_out=Noise(), losses=losses)
    rows = (tmp_path / "held_out.jsonl").read_text().splitlines()
    assert len(rows) == 4  # the first, and three that gained nothing
    assert json.loads((tmp_path / "checkpoint" / "step.json").read_text()) == {"step": 8, "ended": True}
    distil(teacher, tmp_path, still, held_out=Noise(), losses=losses)  # ended: nothing more is trained
    assert (tmp_path / "held_out.jsonl").read_text().splitlines() == rows


def test_a_folder_of_another_training_and_a_broken_checkpoint_are_refused(teacher: Any, tmp_path: Path) -> None:
    distil(teacher, tmp_path, identity={"source": "one"})
    with pytest.raises(TrainingError, match="source"):
        distil(teacher, tmp_path, identity={"source": "two"})
    with pytest.raises(TrainingError, match="recipe"):
        distil(teacher, tmp_path, Recipe(steps=9, batch=4, learning_rate=1e-3), identity={"source": "one"})
    weights = next((tmp_path / "checkpoint").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    before = (tmp_path / "unet" / "config.json").read_bytes()
    with pytest.raises(TrainingError, match=r"does not load.*Remove"):
        distil(teacher, tmp_path, identity={"source": "one"})
    assert (tmp_path / "unet" / "config.json").read_bytes() == before


def test_features_are_read_where_the_map_says(teacher: Any) -> None:
    latents, states = Noise().batch(np.random.default_rng(0), 2, 0.0)
    with watching(teacher, ["mid_block", "up_blocks.1.attentions.1"]) as seen:
        teacher(latents, torch.tensor([1, 2]), states)
    assert seen["mid_block"].shape == (2, 16, 4, 4)
    assert seen["up_blocks.1.attentions.1"].shape == (2, 8, 8, 8)
