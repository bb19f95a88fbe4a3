"""What a Core ML package computes, as torch modules: one whole step (head, U-Net, tail), and the embedding's layout.

The step's modules are the ones that ONNX gets (`export/step_graph.py`), composed here. Two things differ: Core ML has
no rank 0, so `step` and `guidance` are (1,); and a table row is gathered rather than sliced, because a slice that
begins at an input has a shape that Core ML does not know before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.onnx_graphs import UNetGraph
from latentrelay.export.step_graph import FewStepTail, StepHead, StepTail
from latentrelay.runtime.samplers import SamplerRule
from torch import Tensor, nn

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class PackageInput:
    """One input of a package: its name, shape and "float32" or "int32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    def example(self) -> Tensor:
        """Zeros of that shape, as tracing wants them."""
        return torch.from_numpy(np.zeros(self.shape, dtype=self.dtype))


class GatheredTable(nn.Module):
    """A table (N, ...) whose row `table[step]`, step i32 (1,), is (...), or (1,) where a row is one number.

    It is kept as (N, numbers of a row): Core ML takes tensors of five axes at most.
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.choice = rows.dtype == torch.bool  # Core ML gathers no booleans
        self.shape = tuple(rows.shape[1:]) or (1,)
        flat = rows.reshape(len(rows), -1)
        self.register_buffer("rows", flat.float() if self.choice else flat)

    def __getitem__(self, step: Tensor) -> Tensor:
        row = self.rows.index_select(0, step).reshape(self.shape)
        return row != 0.0 if self.choice else row


def gather_tables(module: nn.Module) -> nn.Module:
    """Replace every buffer of a head or tail by a `GatheredTable` of it; modified in place, returned."""
    for part in list(module.modules()):
        for name, table in list(part.named_buffers(recurse=False)):
            delattr(part, name)
            setattr(part, name, GatheredTable(table))
    return module


class CoreMLStep(nn.Module):
    """One sampler step. Inputs in the order of `step_inputs`; outputs `next_latents` [, `next_x0_prev`].

    `apple_layout`: `prompt_embeds` comes as (B, D, 1, T), which Apple's own U-Nets take, instead of (B, T, D).
    """

    def __init__(self, unet: nn.Module, plan: Plan, rule: SamplerRule, *, apple_layout: bool = False) -> None:
        super().__init__()
        self.head = gather_tables(StepHead(plan, rule.branches))
        self.unet = UNetGraph(unet)
        self.tail = gather_tables(FewStepTail(plan) if rule.branches == 1 else StepTail(plan))
        self.apple_layout = apple_layout

    def forward(self, latents: Tensor, step: Tensor, prompt_embeds: Tensor, *rest: Tensor) -> Outputs:
        """latents f32 (1,C,h,w), step i32 (1,), prompt_embeds f32 (B,T,D); then guidance (1,) and x0_prev, or noise."""
        if self.apple_layout:
            prompt_embeds = prompt_embeds.squeeze(2).transpose(1, 2)
        sample, timestep = self.head(latents, step)
        result: Tensor | tuple[Tensor, ...] = self.tail(
            self.unet(sample, timestep, prompt_embeds), latents, step, *rest
        )
        return result


def step_inputs(
    rule: SamplerRule, latent: Sequence[int], states: Sequence[int], *, apple_layout: bool = False
) -> list[PackageInput]:
    """The step package's inputs; `latent` = channels, rows, columns, `states` = tokens, width of the text states."""
    tokens, width = states
    embeds = (rule.branches, width, 1, tokens) if apple_layout else (rule.branches, tokens, width)
    picture = (1, *latent)
    inputs = [
        PackageInput("latents", picture),
        PackageInput("step", (1,), "int32"),
        PackageInput("prompt_embeds", embeds),
    ]
    if rule.branches == 1:
        return [*inputs, PackageInput("noise", picture)]
    inputs.append(PackageInput("guidance", (1,)))
    return [*inputs, PackageInput("x0_prev", picture)] if rule.needs_x0_prev else inputs


def step_outputs(rule: SamplerRule) -> list[str]:
    """The step package's outputs."""
    return ["next_latents", *(["next_x0_prev"] if rule.needs_x0_prev else [])]
