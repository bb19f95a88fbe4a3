"""Scores: the formula by hand, no noise in them, a cache that is found again, a prior that ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from latentrelay.compress.errors import CompressError
from latentrelay.compress.prunable_units import prunable_units
from latentrelay.compress.sensitivity import TorchLatents, latent_statistics_distance, score_prior, score_units


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    network: Any = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    silent = network.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[2]
    with torch.no_grad():
        silent.weight.zero_()  # a unit that writes nothing
    return network


@pytest.fixture
def run() -> TorchLatents:
    states = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    return TorchLatents(DDIMScheduler(clip_sample=False), states, torch.zeros(3, 2, 8), (4, 4), 3.0, 2)


def test_the_distance_by_hand() -> None:
    z = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
    other = torch.tensor([1.0, 7.0]).reshape(2, 1, 1, 1)
    # means 1 and 4; standard deviations sqrt(2) and sqrt(18)
    assert latent_statistics_distance(z, other) == pytest.approx(3 + (18**0.5 - 2**0.5))
    assert latent_statistics_distance(z, z) == 0


def test_latents_are_a_whole_guided_run(unet: Any, run: TorchLatents) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(2)
    expected = torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            uncond = unet(expected, timestep, torch.zeros(3, 2, 8)).sample
            cond = unet(expected, timestep, run.prompt_embeds).sample
            expected = scheduler.step(uncond + 3.0 * (cond - uncond), timestep, expected).prev_sample
    assert (run(unet) - expected).abs().max() < 1e-4


def test_a_unit_that_does_nothing_scores_nothing(unet: Any, run: TorchLatents, tmp_path: Path) -> None:
    units = prunable_units(unet)
    scores = score_units(unet, units, run, tmp_path)
    silent = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    assert scores[silent] < 1e-5
    assert all(score > 1e-4 for path, score in scores.items() if path != silent)
    assert {"blocks:mid"} < set(scores)
    assert len(scores) == len(units) + 1
    assert scores == score_units(unet, tuple(reversed(units)), run, tmp_path / "other order")


def test_a_killed_scoring_goes_on_and_another_run_does_not_use_its_cache(
    unet: Any, run: TorchLatents, tmp_path: Path
) -> None:
    class Cut(Exception):
        """A kill."""

    def stop(_path: str, _score: float) -> None:
        raise Cut

    units, computed = prunable_units(unet), []
    with pytest.raises(Cut):
        score_units(unet, units, run, tmp_path, stop)
    whole = score_units(unet, units, run, tmp_path, lambda path, score: computed.append(path))
    assert len(computed) == len(whole) - 1
    computed.clear()
    assert score_units(unet, units, run, tmp_path, lambda path, score: computed.append(path)) == whole
    assert computed == []
    other = TorchLatents(run.scheduler, run.prompt_embeds, run.negative_embeds, run.size, 4.0, 2)
    score_units(unet, units, other, tmp_path, lambda path, score: computed.append(path))
    assert len(computed) == len(whole)
    assert len(list(tmp_path.glob("scores-*.json"))) == 2
    assert all(json.loads(path.read_text()) for path in tmp_path.glob("scores-*.json"))


def test_weights_that_end_in_nan_are_said(unet: Any, run: TorchLatents, tmp_path: Path) -> None:
    broken: Any = UNet2DConditionModel.from_config(unet.config).eval()
    with torch.no_grad():
        broken.conv_in.bias.fill_(float("nan"))
    with pytest.raises(CompressError, match="NaN"):
        score_units(broken, prunable_units(broken), run, tmp_path)


def test_the_prior_ranks_outer_units_above_inner_ones(unet: Any) -> None:
    units = prunable_units(unet)
    prior = score_prior(units)
    assert set(prior) == {unit.path for unit in units} | {"blocks:mid", "blocks:innermost", "blocks:layers"}
    assert prior["down_blocks.0.resnets.0"] == 2 * prior["down_blocks.1.resnets.0"] == prior["up_blocks.1.resnets.1"]
    assert prior["mid_block.resnets.0"] < prior["up_blocks.0.resnets.0"]
