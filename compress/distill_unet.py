"""Distil a pruned U-Net from the one it was pruned from: task, output and feature losses (BK-SDM, Hybrid SD).

`L = w_task MSE(e_S, e) + w_output MSE(e_S, e_T) + w_feature mean_j MSE(f_S^j, f_T^j) / mean(f_T^j ^ 2)`, with e the
true target of the scheduler's kind of prediction, S the student, T the frozen teacher and j the pairs of a block map.
In: student, teacher, latents with text states, a diffusers scheduler. Out: the student with its EMA weights, and a
folder with a checkpoint, logs and held-out scores. Unlike the papers' plain sum, features are relative to the teacher's
power, so that blocks weigh alike, and the first two terms carry a timestep weight (min-SNR, arXiv 2303.09556).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import DDPMScheduler
from latentrelay.compress.errors import CompressError, TrainingError
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit, keep_rows
from torch import Tensor, nn

SNR_CAP = 5.0


class LatentData(Protocol):
    """Where training latents come from."""

    @property
    def identity(self) -> str:
        """What the data are: a digest or a name with a version."""

    def batch(self, rng: np.random.Generator, count: int, caption_dropout: float) -> tuple[Tensor, Tensor]:
        """Scaled latents (count, C, h, w) and text states (count, T, D), some of them the empty prompt's."""


@dataclass(frozen=True)
class DistilLosses:
    """Weights of the three losses, the share of empty prompts, and the early stop.

    Training ends once the held-out score has not improved by `min_improvement` (a fraction) over the best of before
    for `patience` checkpoints; None never stops early.
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    caption_dropout: float = 0.1
    patience: int | None = None
    min_improvement: float = 0.005


@dataclass(frozen=True)
class NoiseSchedule:
    """What a training needs of a scheduler: `alphas_cumprod` (T,) float32 and the kind of prediction."""

    alphas_cumprod: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Read it off any diffusers scheduler. Raises CompressError for predictions other than epsilon and v."""
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise CompressError("the scheduler's prediction type", got=kind, expected="epsilon or v_prediction")
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        plain = {name: scheduler.config[name] for name in names if name in scheduler.config}
        return cls(DDPMScheduler(**plain).alphas_cumprod, kind)

    def draw(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps (n,), the target of the prediction, and the min-SNR weight (n,)."""
        count, steps = len(latents), len(self.alphas_cumprod)
        noise = torch.randn(latents.shape, generator=rng).to(latents)
        # Stratified: one timestep from each of `count` equal slices, which steadies the loss.
        spread = (torch.arange(count) + torch.rand(count, generator=rng)) / count
        timesteps = (spread * steps).long().clamp(max=steps - 1)
        alpha_bar = self.alphas_cumprod[timesteps].to(latents)[:, None, None, None]
        signal, spoilt = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        snr = (alpha_bar / (1 - alpha_bar)).flatten()
        capped = snr.clamp(max=SNR_CAP)
        if self.prediction_type == "epsilon":
            target, weight = noise, capped / snr
        else:
            target, weight = signal * noise - spoilt * latents, capped / (snr + 1)
        return signal * latents + spoilt * noise, timesteps.to(latents.device), target, weight


def distill_unet(
    student: nn.Module,
    teacher: nn.Module,
    data: LatentData,
    schedule: NoiseSchedule,
    features: Mapping[str, str],
    recipe: Recipe,
    folder: Path,
    *,
    losses: DistilLosses = DistilLosses(),
    held_out: LatentData | None = None,
    identity: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Train `student` (modified in place) and return it with its EMA weights.

    `features` maps a student module's path to the teacher's. After every checkpoint the EMA weights are written to
    `folder/unet` and, where `held_out` is given, scored (held_out.jsonl); the best of them is what `folder/unet`
    holds. Resumable; see `training.fit`.
    """
    nn.Module.to(student, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.Module.to(teacher, memory_format=torch.channels_last)  # type: ignore[call-overload]
    teacher.eval().requires_grad_(False)
    held = HeldOut(teacher, held_out, schedule, folder / "held_out.jsonl", losses) if held_out is not None else None

    def loss_of(module: nn.Module, rng: BatchRng) -> Losses:
        latents, context = (
            tensor.to(device_of(module)) for tensor in data.batch(rng.numpy, recipe.batch, losses.caption_dropout)
        )
        noisy, timesteps, target, weight = schedule.draw(latents, rng.torch)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        teacher.to(latents.device)  # accelerate has moved the student
        with torch.no_grad(), watching(teacher, features.values()) as theirs:
            wanted = teacher(noisy, timesteps, context).sample.float()
        with watching(module, features) as ours:
            predicted = module(noisy, timesteps, context).sample.float()
        parts = {
            "task": (weight * (predicted - target).square().mean((1, 2, 3))).mean(),
            "output": (weight * (predicted - wanted).square().mean((1, 2, 3))).mean(),
            "feature": torch.stack([_relative(ours[path], theirs[other]) for path, other in features.items()]).mean(),
        }
        loss = losses.task * parts["task"] + losses.output * parts["output"] + losses.feature * parts["feature"]
        return {"loss": loss, **parts}

    def on_checkpoint(step: int, module: nn.Module) -> bool:
        value, best, stop = held.score(step, module) if held is not None else (0.0, True, False)
        if best:
            _export(module, folder, step)
        if held is not None:
            held.keep(step, value)  # after the weights: a kill in between scores this step again
        return stop

    told = {**(identity or {}), "losses": asdict(losses), "data": data.identity, "features": dict(features)}
    return fit(student, loss_of, recipe, folder, on_checkpoint=on_checkpoint, identity=told)


def _export(module: nn.Module, folder: Path, step: int) -> None:
    """Write `folder`/unet beside and rename."""
    beside, final = folder / "unet.new", folder / "unet"
    shutil.rmtree(beside, ignore_errors=True)
    cast(Any, module).save_pretrained(beside)
    (beside / "step.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    theirs = theirs.float()
    return (ours.float() - theirs).square().mean() / theirs.square().mean()


@contextmanager
def watching(module: nn.Module, paths: Any) -> Iterator[dict[str, Tensor]]:
    """The outputs of named submodules of the forward passes made inside, the latest of each."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[path] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class HeldOut:
    """Scores a student on fixed held-out latents, noise and timesteps: its weighted output error against the teacher's,
    relative to the teacher's power. One row a checkpoint; a resumed run forgets rows it is about to write again."""

    teacher: nn.Module
    data: LatentData
    schedule: NoiseSchedule
    log: Path
    losses: DistilLosses
    batches: int = 8
    batch: int = 32

    def score(self, step: int, student: nn.Module) -> tuple[float, bool, bool]:
        """The error, whether it is the best so far, and whether to stop. Raises TrainingError when it is not finite."""
        keep_rows(self.log, step - 1)
        before = [float(json.loads(row)["score"]) for row in self.log.read_text().splitlines()] if self._any() else []
        value = self.error(student)
        if not math.isfinite(value):
            raise TrainingError(
                f"the student's held-out error is {value} at step {step}", do="Lower the learning rate."
            )
        best = not before or value < min(before)
        patience, needed = self.losses.patience, 1 - self.losses.min_improvement
        if patience is None or len(before) < patience:
            return value, best, False
        earlier, recent = before[: len(before) + 1 - patience], [*before[len(before) + 1 - patience :], value]
        return value, best, min(recent) > needed * min(earlier)

    def keep(self, step: int, value: float) -> None:
        """Append the row of a step."""
        with self.log.open("a") as log:
            log.write(json.dumps({"step": step, "score": value}) + "\n")

    def _any(self) -> bool:
        return self.log.exists()

    @torch.no_grad()
    def error(self, student: nn.Module) -> float:
        """Weighted squared error over the same batches each time, relative to the teacher's power."""
        training = student.training
        self.teacher.to(device_of(student))
        student.eval()
        off = power = 0.0
        for index in range(self.batches):
            rng = BatchRng.of(20_000, index)
            latents, context = (
                tensor.to(device_of(student)) for tensor in self.data.batch(rng.numpy, self.batch, 0.25)
            )
            noisy, timesteps, _target, weight = self.schedule.draw(latents, rng.torch)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            wanted = self.teacher(noisy, timesteps, context).sample.float()
            got = student(noisy, timesteps, context).sample.float()
            off += float((weight * (got - wanted).square().mean((1, 2, 3))).sum())
            power += float((weight * wanted.square().mean((1, 2, 3))).sum())
        student.train(training)
        return off / power
