"""Few-step networks: a model, or a student of it, distilled to latent consistency, as one LoRA file.

In: a pipeline, prompts (the reference's training captions where none are given) and, for a student, its folder. Out:
`<folder>/lora.safetensors` in diffusers' layout, whose metadata says that it makes a consistency model, beside the
trajectories recorded from the model, the log and a checkpoint. Every part resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import is_few_step
from latentrelay.tools.console import counting, emit, extra, printable
from latentrelay.tools.models import FEW_STEP, OURS, adapters, default_guidance, public_name, resolve

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NUMBERS_OF_STEPS = (4, 8)
_BETWEEN = (939, 69)  # two more timesteps that the solver stops at: the ends are where it errs most
_SHARD = 128
_SEED = 5000
_IDENTITY = "made_from.json"


@dataclass(frozen=True)
class FewStepRecipe:
    """What is trained how long: `trajectories` in all, optimiser `steps` of `batch` states, LoRA `rank`. `target` is
    "solution" (of the solver) or "next" (as published), see compress/consistency.py."""

    trajectories: int = 2432
    steps: int = 700
    batch: int = 32
    rank: int = 12
    learning_rate: float = 2e-3
    target: str = "solution"


def run(
    output: Path,
    *,
    model: str,
    student: Path | None,
    prompts: Path | None,
    guidance: float | None,
    recipe: FewStepRecipe,
    trajectories: Path | None,
    as_json: bool,
    loras: Sequence[str] = (),
    revision: str | None = None,
    config: str | None = None,
) -> None:
    """Record, train, write and print.

    `student`: the folder of a U-Net (or one with `unet/`) to train instead of the model's own. `prompts`: a text file,
    one a line. `guidance`: the scale that is learnt. `trajectories`: a folder to share between trainings (in `output`
    if not given). Raises RequestError, SourceError and its kin, TrainingError.
    """
    if output.exists() and any(output.iterdir()) and not (output / _IDENTITY).is_file():
        raise RequestError(
            "the output folder holds something that is not a few-step training", got=str(output), do="Choose another."
        )
    with extra("export", "few-step distillation"):
        from latentrelay.export import load_source
    if recipe.target not in ("solution", "next"):
        raise RequestError("unknown target", got=recipe.target, expected="solution or next")
    source = load_source(resolve(model), revision, name=public_name(model), config=config, loras=adapters(model, loras))
    pipeline = source.pipeline
    if is_few_step(type(pipeline.scheduler).__name__) or model == FEW_STEP:
        raise RequestError("the model was distilled to few steps already", got=model, expected="what it was made from")
    contexts, empty = text_states(pipeline, _texts(model, prompts, recipe.trajectories))
    kept = trajectories or output / "trajectories"
    scale = default_guidance(model) if guidance is None else guidance
    unet = _network(pipeline, student)
    made_from = {"source": source.digest, "prompts": sha256(contexts.tobytes()).hexdigest(), "guidance": scale}
    weights = ((name, tensor.detach().numpy()) for name, tensor in unet.state_dict().items())
    _keep_identity(output, {**made_from, "network": weights_digest(weights)})
    _keep_identity(kept, made_from)
    record(pipeline, contexts, empty, kept, recipe.trajectories, scale)
    path = train(pipeline, unet, contexts, kept, recipe, output, scale)
    document = {"lora": str(path), "bytes": path.stat().st_size, "steps": recipe.steps, "rank": recipe.rank}
    emit(document, as_json, lambda console: console.print(f"adapters: [bold]{printable(path)}[/]"))


def _keep_identity(folder: Path, made_from: dict[str, Any]) -> None:
    """Say what a folder is made from, or refuse one that was begun from something else."""
    path = folder / _IDENTITY
    if path.is_file():
        found = json.loads(path.read_text())
        differing = sorted(key for key in {*found, *made_from} if found.get(key) != made_from.get(key))
        if differing:
            raise RequestError(
                f"{folder} holds another few-step training: {', '.join(differing)} differ", do="Choose another output."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made_from, indent=2, sort_keys=True))


def _texts(model: str, prompts: Path | None, count: int) -> list[str]:
    if prompts is not None:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise RequestError("the file holds no prompt", got=str(prompts), expected="one a line")
        return lines
    if model not in OURS:
        raise RequestError("few-step distillation needs prompts", got="none", expected="--prompts FILE, one a line")
    from latentrelay.reference.captions import sample_captions

    return [caption.text for _, caption in sample_captions("train", count, _SEED)]


def text_states(pipeline: Any, texts: list[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(n, T, D) and the empty prompt's (T, D), float16."""
    import numpy as np
    import torch

    tokenizer, parts = pipeline.tokenizer, []
    with torch.inference_mode(), counting("reading prompts", len(texts)) as advance:
        for i in range(0, len(texts) + 1, 128):
            rows = [*texts, ""][i : i + 128]
            ids = tokenizer(
                rows, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
            ).input_ids
            parts.append(pipeline.text_encoder(ids)[0].half().numpy())
            advance("reading prompts", len(rows))
    states = np.concatenate(parts)
    return states[:-1], states[-1]


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
    from accelerate import Accelerator
    from latentrelay.compress.consistency import ConsistencyFunction, consistency_loss, load_shards
    from latentrelay.compress.lora import FEW_STEP as METADATA
    from latentrelay.compress.lora import LowRankUpdate
    from latentrelay.compress.training import Recipe, fit
    from safetensors.torch import save_file
    from torch.func import functional_call

    unet.to(Accelerator().device).requires_grad_(False)
    adapters = LowRankUpdate(unet, recipe.rank)
    states = load_shards(kept)

    def network_of(module: torch.nn.Module) -> Any:
        weights = module.weights()  # type: ignore[operator]
        return lambda x, t, h: functional_call(unet, weights, (x, t, h), {"return_dict": False})[0]

    def write(step: int, module: torch.nn.Module) -> None:
        metadata = {METADATA: json.dumps({"guidance": guidance, "num_steps": NUMBERS_OF_STEPS}), "format": "pt"}
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
            warmup=min(30, recipe.steps),
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

        folder = student / "unet" if (student / "unet").is_dir() else student
        unet = StudentUNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    return unet.to(memory_format=torch.channels_last).eval()


def _call(unet: Any, latents: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    predicted: torch.Tensor = unet(latents, timestep, states, return_dict=False)[0]
    return predicted
