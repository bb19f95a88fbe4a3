"""One training loop for every network that is trained here: accelerate, EMA, resumable, seeded.

In: a module, a `loss_of(module, batch_rng)` function and a `Recipe`. Out: the module with its EMA weights, and a
folder with `log.jsonl` and one checkpoint. The random numbers of a step depend on (seed, step) alone, so a run that was
killed continues as if it had not been. It is not a framework: what a loss is made of lives with each network.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from latentrelay.compress.errors import TrainingError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Losses = dict[str, torch.Tensor]


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module's weights are. Batches are drawn on the CPU, the same on every machine, and moved there."""
    return next(module.parameters()).device


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. `steps` counts optimiser steps; the learning rate warms up over `warmup` steps, holds,
    and falls to zero along a half cosine over the last `decay` (a fraction of all steps)."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay: float = 0.5
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip: float = 1.0
    seed: int = 0
    mixed_precision: str = "no"
    checkpoint_every: int = 250
    log_every: int = 25

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, 0 first."""
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        start = self.steps * (1 - self.decay)
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (step - start) / max(1.0, self.steps - start)))))
        return self.learning_rate * rising * falling


@dataclass
class BatchRng:
    """The random numbers of one step: `numpy` draws scenes and captions, `torch` draws noise and timesteps."""

    step: int
    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, step: int) -> BatchRng:
        """The generators of `step`, whatever happened before it."""
        sequence = np.random.SeedSequence([seed, step])
        return cls(
            step=step,
            numpy=np.random.Generator(np.random.PCG64(sequence)),
            torch=torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))),
        )


def fit(
    module: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, BatchRng], Losses],
    recipe: Recipe,
    folder: Path,
    *,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    on_checkpoint: Callable[[int, torch.nn.Module], bool | None] | None = None,
    identity: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """Train `module` (modified in place) and return it holding its EMA weights.

    `loss_of` returns named scalar tensors, the one called `loss` is minimised. `on_checkpoint(step, module)` is called
    with the EMA weights in place after each checkpoint, so that a caller can export and score what exists so far; True
    ends the training there. Resumes from `folder/checkpoint` when it is there. `identity` (JSON values) says what is
    trained from what; a folder begun with another identity or recipe is refused, where none is given only resumed.
    Raises TrainingError for that and for a checkpoint that does not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_identity(folder, recipe, identity)
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    trained = [p for p in (parameters or module.parameters()) if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trained, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    module, optimiser = accelerator.prepare(module, optimiser)
    ema = EMAModel(trained, decay=recipe.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    first, ended = _resume(accelerator, folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    log_path = folder / "log.jsonl"
    keep_rows(log_path, first)

    def tell(step: int) -> bool:
        if on_checkpoint is None:
            return False
        ema.store(trained)
        ema.copy_to(trained)
        stop = on_checkpoint(step, accelerator.unwrap_model(module)) is True
        ema.restore(trained)
        module.train()
        if stop:
            (folder / "checkpoint" / "step.json").write_text(json.dumps({"step": step, "ended": True}))
        return stop

    told = folder / "checkpoint" / "told"  # goes with its checkpoint: what follows one has been done

    def checkpoint(step: int) -> bool:
        _save(accelerator, folder, step)
        stop = tell(step)
        told.touch()
        return stop

    if first and not ended and not told.exists():  # killed between a checkpoint and what follows it
        ended = tell(first)
        if told.parent.exists():  # not where the one before is all that is left
            told.touch()
    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, log_path.open("a") as log:
        bar = progress.add_task("training", total=recipe.steps, completed=first)
        sums: dict[str, float] = {}
        counted, since = 0, time.perf_counter()
        for step in range(first, first if ended else recipe.steps):
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate_at(step)
            with accelerator.autocast():
                losses = loss_of(module, BatchRng.of(recipe.seed, step))
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(trained, recipe.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            ema.step(trained)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            counted += 1
            if (step + 1) % recipe.log_every == 0 or step + 1 == recipe.steps:
                elapsed = time.perf_counter() - since
                means = {name: value / counted for name, value in sums.items()}
                row = {
                    "step": step + 1,
                    **means,
                    "lr": recipe.learning_rate_at(step),
                    "samples_per_s": counted * recipe.batch / elapsed,
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                progress.update(bar, completed=step + 1, description=f"loss {means['loss']:.4f}")
                sums, counted, since = {}, 0, time.perf_counter()
            due = (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps
            if due and checkpoint(step + 1):
                break
    ema.copy_to(trained)
    module = accelerator.unwrap_model(module)
    module.eval()
    return module


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Written beside and renamed, so a kill leaves the old checkpoint or the new one."""
    beside, final, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
    shutil.rmtree(beside, ignore_errors=True)
    accelerator.save_state(str(beside))
    (beside / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    beside.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _resume(accelerator: Accelerator, folder: Path) -> tuple[int, bool]:
    """The step to go on from, and whether an early stop has ended the training already."""
    for name in ("checkpoint", "checkpoint.old"):
        path = folder / name
        if not (path / "step.json").exists():
            continue
        try:
            found = json.loads((path / "step.json").read_text())
            accelerator.load_state(str(path))
            return int(found["step"]), bool(found.get("ended", False))
        except Exception as error:  # torch, safetensors, pickle and json each raise their own here
            raise TrainingError(
                f"the checkpoint in {path} does not load ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
                do=f"Remove {path} to begin again, or train into another folder.",
            ) from error
    return 0, False


def _check_identity(folder: Path, recipe: Recipe, identity: Mapping[str, Any] | None) -> None:
    if identity is None:
        return
    path = folder / "identity.json"
    wanted = json.loads(json.dumps({**identity, "recipe": asdict(recipe)}))
    if path.exists():
        found = json.loads(path.read_text())
        differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if differing:
            raise TrainingError(
                f"{folder} holds another training: {', '.join(differing)} differ",
                got={key: wanted.get(key) for key in differing},
                expected={key: found.get(key) for key in differing},
                do="Train into another folder, or ask for what this one began with.",
            )
    path.write_text(json.dumps(wanted, indent=2, sort_keys=True))


def keep_rows(log: Path, last: int) -> None:
    """Drop a log's rows beyond step `last`: a run that was killed writes them again."""
    if not log.exists():
        return
    rows = [line for line in log.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= last]
    beside = log.with_suffix(".tmp")
    beside.write_text("".join(f"{row}\n" for row in rows))
    beside.replace(log)
