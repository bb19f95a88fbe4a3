"""How much each unit matters: the latent statistics move when it alone is pruned (LD-Pruner's criterion, Hybrid SD's).

`S_l = ||mean(z) - mean(z_l)||_2 + ||std(z) - std(z_l)||_2`, with z, z_l (n, C, h, w) the final latents of n prompts
from the whole network and from the one whose unit l keeps half its width; mean and std are over prompts. The prompts,
seeds and steps are the same in every run, so the score holds no sampling noise and a unit that does nothing scores 0.
Scores are cached by content and a killed run goes on. On a network without trained weights they would mean nothing:
use `score_prior`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import CompressError
from latentrelay.compress.prunable_units import PrunableUnit, UnitKind
from latentrelay.compress.prune_unet import prune_unet
from latentrelay.compress.remove_blocks import BLOCK_RECIPES, BlockRecipe, remove_blocks
from torch import Tensor, nn

KEEP_RATIO = 0.5  # at which a unit is scored


class FinalLatents(Protocol):
    """Runs a whole denoising with a given U-Net; equal calls give equal latents."""

    @property
    def identity(self) -> str:
        """What the latents depend on besides the U-Net: prompts, seeds, steps, sampler, guidance."""

    def __call__(self, unet: nn.Module) -> Tensor:
        """Final latents (n, C, h, w)."""


@dataclass(frozen=True)
class TorchLatents:
    """`FinalLatents` in torch: n prompts denoised side by side with a diffusers scheduler.

    prompt_embeds and negative_embeds: (n, T, D). Noise of row i is `torch.randn` of seed `first_seed + i` on the CPU.
    """

    scheduler: Any
    prompt_embeds: Tensor
    negative_embeds: Tensor
    size: tuple[int, int]
    guidance: float
    num_steps: int
    first_seed: int = 0

    @property
    def identity(self) -> str:
        """A digest of everything but the network."""
        digest = hashlib.sha256()
        config = {key: repr(value) for key, value in sorted(self.scheduler.config.items())}
        plain = [type(self.scheduler).__name__, config, self.size, self.guidance, self.num_steps, self.first_seed]
        digest.update(json.dumps(plain).encode())
        for tensor in (self.prompt_embeds, self.negative_embeds):
            digest.update(tensor.float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, unet: nn.Module) -> Tensor:
        """Final latents (n, C, h, w)."""
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(self.num_steps)
        config: Any = unet.config
        shape = (1, config.in_channels, *self.size)
        seeds = range(self.first_seed, self.first_seed + len(self.prompt_embeds))
        latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        device = next(unet.parameters()).device
        latents = (latents * scheduler.init_noise_sigma).to(device)
        context = torch.cat([self.negative_embeds, self.prompt_embeds]).to(device)
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            uncond, cond = unet(both, timestep, context).sample.chunk(2)
            latents = scheduler.step(uncond + self.guidance * (cond - uncond), timestep, latents).prev_sample
        final: Tensor = latents.cpu()
        return final


def latent_statistics_distance(reference: Tensor, other: Tensor) -> float:
    """S of the module's formula; both (n, C, h, w), n >= 2."""
    moved = [
        (statistic(reference.double(), dim=0) - statistic(other.double(), dim=0)).norm()
        for statistic in (torch.mean, torch.std)
    ]
    return float(sum(moved))


def score_units(
    unet: UNet2DConditionModel,
    units: Sequence[PrunableUnit],
    run: FinalLatents,
    cache: Path,
    on_unit: Callable[[str, float], None] | None = None,
) -> dict[str, float]:
    """Score of every unit by path, and of BK-SDM's block removals as "blocks:mid", "blocks:innermost", "blocks:layers".

    `cache` is a folder; what is there for the same weights and the same run is not computed again. Raises
    CompressError when a run ends in NaN.
    """
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"scores-{_key(unet, run)}.json"
    scores: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    jobs: dict[str, Callable[[], nn.Module]] = {
        unit.path: lambda unit=unit: prune_unet(unet, {unit.path: unit.kept(KEEP_RATIO)})  # type: ignore[misc]
        for unit in units
        if unit.kept(KEEP_RATIO) < unit.width
    }
    jobs |= {name: lambda recipe=recipe: remove_blocks(unet, recipe).eval() for name, recipe in _removals(unet).items()}  # type: ignore[misc]
    todo = {name: job for name, job in jobs.items() if name not in scores}
    reference = run(unet) if todo else None
    for name, job in todo.items():
        if reference is not None:
            scores[name] = _finite(name, latent_statistics_distance(reference, run(job())))
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(scores, indent=1))
        beside.replace(path)
        if on_unit is not None:
            on_unit(name, scores[name])
    never = {unit.path: float("inf") for unit in units if unit.path not in jobs}  # too narrow to be halved: keep
    return {**scores, **never}


def score_prior(units: Sequence[PrunableUnit]) -> dict[str, float]:
    """Scores for a network without trained weights: by kind, by depth and by position, from what was measured.

    A unit near the pictures (outer levels) and the first and last ones move latents more than inner ones, which
    hold most parameters. The numbers are relative.
    """
    kinds: dict[UnitKind, float] = {
        "resnet": 1.0, "feed_forward": 0.8, "self_attention": 0.6, "cross_attention": 1.2
    }  # fmt: skip
    prior = {unit.path: kinds[unit.kind] * 2.0 ** -_depth(unit.path, units) for unit in units}
    return {**prior, "blocks:mid": 0.1, "blocks:innermost": 0.3, "blocks:layers": 4.0}


def _depth(path: str, units: Sequence[PrunableUnit]) -> int:
    """0 for the outermost level; the mid block is one below the innermost."""
    levels = 1 + max(int(unit.path.split(".")[1]) for unit in units if unit.path.startswith("down_blocks."))
    block = path.split(".")
    if block[0] == "mid_block":
        return levels
    return int(block[1]) if block[0] == "down_blocks" else levels - 1 - int(block[1])


def _removals(unet: Any) -> Mapping[str, BlockRecipe]:
    found: dict[str, BlockRecipe] = {}
    if getattr(unet, "mid_block", None) is not None:
        found["blocks:mid"] = BlockRecipe(mid=False)
    widths = unet.config.block_out_channels
    if len(widths) > 2 and widths[-1] == widths[-2]:
        found["blocks:innermost"] = BlockRecipe(mid=False, levels_removed=1)
    if isinstance(unet.config.layers_per_block, int) and unet.config.layers_per_block > 1:
        found["blocks:layers"] = BLOCK_RECIPES["bk-sdm-base"]
    return found


def _finite(name: str, score: float) -> float:
    if score != score or score == float("inf"):
        raise CompressError(f"scoring {name} ended in NaN or Inf", do="Check the source model's weights.")
    return score


def _key(unet: nn.Module, run: FinalLatents) -> str:
    digest = hashlib.sha256(run.identity.encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
