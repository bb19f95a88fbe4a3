"""Few-step networks: the reference's teacher, or a student of it, distilled to latent consistency, as a LoRA file.

In: the reference pipeline, the training cache of `python -m latentrelay.reference.train` (scaled latents are not read,
text states are) and, for a student, its folder. Out: `<folder>/lora.safetensors` in diffusers' layout, whose metadata
says that it makes a consistency model, beside the recorded trajectories, the log and a checkpoint. Every part resumes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, printable

if TYPE_CHECKING:
    import torch

NUMBERS_OF_STEPS = (4, 8)
_BETWEEN = (939, 69)  # two more timesteps that the solver stops at: the ends are where it errs most
_SHARD = 128
_SEED = 5000


@dataclass(frozen=True)
class FewStepRecipe:
    """What is trained how long: `trajectories` in all, optimiser `steps` of `batch` states, LoRA `rank`."""

    trajectories: int = 3840
    steps: int = 800
    batch: int = 32
    rank: int = 12
    learning_rate: float = 2e-3
    target: str = "solution"


def run(
    output: Path, cache: Path, *, student: Path | None, recipe: FewStepRecipe, trajectories: Path | None, as_json: bool
) -> None:
    """Record, train, write and print. `trajectories`: where they are kept (in `output` if not given)."""
    with extra("compress", "few-step distillation"):
        from latentrelay.reference import pipeline as reference
        from latentrelay.reference.unet import load_cache
    if recipe.target not in ("solution", "next"):
        raise RequestError("unknown target", got=recipe.target, expected="solution or next")
    pipeline = reference.load()
    text = load_cache(cache, 8 * pipeline.unet.config.sample_size)
    kept = trajectories or output / "trajectories"
    record(pipeline, text.embeddings, text.empty, kept, recipe.trajectories, reference.GUIDANCE)
    path = train(pipeline, _network(pipeline, student), text.embeddings, kept, recipe, output, reference.GUIDANCE)
    document = {"lora": str(path), "bytes": path.stat().st_size, "steps": recipe.steps, "rank": recipe.rank}
    emit(document, as_json, lambda console: console.print(f"adapters: [bold]{printable(path)}[/]"))


def record(pipeline: Any, contexts: Any, empty: Any, folder: Path, count: int, guidance: float) -> None:
    """Trajectories of the teacher in `folder`, at least `count`, in shards; those that exist are kept."""
    from latentrelay.compress.consistency import few_step_timesteps, record_shard

    unet = pipeline.unet
    config = pipeline.scheduler.config
    timesteps = few_step_timesteps(config, NUMBERS_OF_STEPS)
    side = unet.config.sample_size
    shards = -(-count // _SHARD)
    with counting("recording trajectories", shards) as advance:
        for shard in range(shards):
            record_shard(
                folder / f"trajectories-{shard:03d}.npz",
                partial(_call, unet),
                config,
                contexts,
                empty,
                shape=(unet.config.in_channels, side, side),
                count=_SHARD,
                seed=_SEED + shard,
                guidance=guidance,
                timesteps=timesteps,
                extra=_BETWEEN,
            )
            advance("recording trajectories", 1)


def train(
    pipeline: Any, unet: Any, contexts: Any, kept: Path, recipe: FewStepRecipe, output: Path, guidance: float
) -> Path:
    """Train adapters of `unet` and write them; returns the file."""
    from latentrelay.compress.consistency import ConsistencyFunction, consistency_loss, load_shards
    from latentrelay.compress.lora import FEW_STEP, LowRankUpdate
    from latentrelay.compress.training import Recipe, fit
    from safetensors.torch import save_file
    from torch.func import functional_call

    unet.requires_grad_(False)
    adapters = LowRankUpdate(unet, recipe.rank)
    states = load_shards(kept)

    def network_of(module: torch.nn.Module) -> Any:
        weights = module.weights()  # type: ignore[operator]
        return lambda x, t, h: functional_call(unet, weights, (x, t, h), {"return_dict": False})[0]

    def write(step: int, module: torch.nn.Module) -> None:
        metadata = {FEW_STEP: json.dumps({"guidance": guidance, "num_steps": NUMBERS_OF_STEPS}), "format": "pt"}
        beside = output / ".lora.new.safetensors"
        save_file(module.tensors(), str(beside), metadata)  # type: ignore[operator]
        beside.chmod(0o644)
        beside.replace(output / "lora.safetensors")

    function = ConsistencyFunction(pipeline.scheduler.config)
    target: Any = recipe.target
    fit(
        adapters,
        consistency_loss(function, states, contexts, recipe.batch, network_of, target),
        Recipe(
            steps=recipe.steps,
            batch=recipe.batch,
            learning_rate=recipe.learning_rate,
            warmup=30,
            decay=0.7,
            checkpoint_every=100,
        ),
        output,
        on_checkpoint=write,
        identity={"trajectories": len(states.states), "rank": recipe.rank, "target": recipe.target},
    )
    return output / "lora.safetensors"


def _network(pipeline: Any, student: Path | None) -> Any:
    import torch

    if student is None:
        unet = pipeline.unet
    else:
        from latentrelay.compress.student_unet import StudentUNet2DConditionModel

        unet = StudentUNet2DConditionModel.from_pretrained(student, torch_dtype=torch.float32)
    return unet.to(memory_format=torch.channels_last).eval()


def _call(unet: Any, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    predicted: torch.Tensor = unet(latents, timestep, states, return_dict=False)[0]
    return predicted
