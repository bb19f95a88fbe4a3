"""The step graph's own arithmetic as two small torch modules: what comes before the U-Net in a step, and what after.

`StepHead`: latents (1,C,h,w), step () -> sample (2,C,h,w), timestep (). `StepTail`: noise_pred (2,C,h,w), latents,
step, guidance () [, x0_prev (1,C,h,w)] -> next_latents [, next_x0_prev]. `FewStepTail`: noise_pred (1,C,h,w), latents,
step, noise (1,C,h,w) -> next_latents, where guidance is in the network; the head's sample is (1,C,h,w) then. Every
table is gathered by `step`; there is no control flow. ONNX merges them around the U-Net; a Core ML export can compose
the same modules in torch.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from latentrelay.compress.plan import Plan
from numpy.typing import NDArray
from torch import Tensor, nn


def solver_rows(plan: Plan) -> NDArray[np.float64]:
    """(N, 7) a b c n p q s of every step; (R * N, 7), row by row of the mask-dependent tables, where splits have grids
    of their own."""
    if plan.tables.grid_solver is not None:
        return plan.tables.grid_solver.reshape(-1, plan.tables.grid_solver.shape[-1])
    return np.array([astuple(row) for row in plan.recipe.solver], dtype=np.float64)


class StepHead(nn.Module):
    """Scale the latents for the network, repeat them for the guidance branches, and look the timestep up."""

    scale: Tensor
    timesteps: Tensor

    def __init__(self, plan: Plan, branches: int = 2) -> None:
        super().__init__()
        scale, grid = solver_rows(plan)[:, 6], plan.tables.grid_timesteps
        self.branches, self.num_steps, self.has_grids = branches, plan.recipe.num_steps, grid is not None
        timesteps = np.array(plan.recipe.timesteps) if grid is None else grid.reshape(-1)
        self.register_buffer("scale", torch.from_numpy(scale.astype(np.float32)))
        self.register_buffer("timesteps", torch.from_numpy(timesteps.astype(np.float32)))
        self.scaled = bool((scale != 1.0).any())

    def forward(self, latents: Tensor, step: Tensor, split_row: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """latents f32 (1,C,h,w), step i64 () -> sample f32 (branches,C,h,w), timestep f32 (). `split_row` i64 () where
        the plan has grids of their own for some splits; the step counts in the whole run either way."""
        if self.has_grids and split_row is not None:
            step = split_row * self.num_steps + step
        if self.scaled:
            latents = latents * self.scale[step]
        if self.branches == 1:
            return latents.clone(), self.timesteps[step]  # an output that is an input would have no name of its own
        return torch.cat([latents] * self.branches, dim=0), self.timesteps[step]


class Compensation(nn.Module):
    """The quantisation error's correction: `e = (1 - K) q - b`, rows of K and b gathered by step, in float32.

    Where the plan mixes, `m0 q_other + m1 latents + m2 x0_prev` is subtracted too, q_other being the other guidance
    branch. It stands behind the network's last convolution and outside its quantisation. `enabled` is whether the plan
    has tables; without them no node is exported.
    """

    kept: Tensor
    offset: Tensor
    mixing: Tensor
    reads_memory: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        gain, offset = plan.tables.compensation_gain, plan.tables.compensation_offset
        mixing = plan.tables.compensation_mixing
        self.enabled = gain is not None and offset is not None
        self.mixes = self.enabled and mixing is not None
        if gain is not None and offset is not None:
            self.register_buffer("kept", torch.from_numpy((1.0 - gain).astype(np.float32))[..., None, None])
            self.register_buffer("offset", torch.from_numpy(offset.astype(np.float32))[..., None, None])
        if mixing is not None:
            self.register_buffer("mixing", torch.from_numpy(mixing.astype(np.float32))[..., None, None])
            self.register_buffer("reads_memory", torch.from_numpy((mixing[:, :, 2] != 0.0).any(axis=(1, 2))))

    def forward(
        self, noise_pred: Tensor, step: Tensor, latents: Tensor | None = None, x0_prev: Tensor | None = None
    ) -> Tensor:
        """noise_pred f32 (branches,C,h,w), step i64 () -> the same shape; latents and x0_prev (1,C,h,w)."""
        if not self.enabled:
            return noise_pred
        corrected = noise_pred * self.kept[step] - self.offset[step]
        if not self.mixes or latents is None:
            return corrected
        row = self.mixing[step]  # (2, 3, C, 1, 1)
        other = torch.cat([noise_pred[1:2], noise_pred[0:1]])
        corrected = corrected - (row[:, 0] * other + row[:, 1] * latents)
        if x0_prev is None:
            return corrected
        # Unused memory is selected away: what was never written may hold anything.
        return corrected - row[:, 2] * torch.where(self.reads_memory[step], x0_prev, latents)


class StepTail(nn.Module):
    """Compensation, guidance and solver: `x' = a x + b e + c x0_prev`, `x0 = p x + q e`, rows gathered by step."""

    coefficients: Tensor
    reads_memory: Tensor
    guidance_multiplier: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        rows = solver_rows(plan)
        self.register_buffer("coefficients", torch.from_numpy(rows.astype(np.float32)))
        self.register_buffer("reads_memory", torch.from_numpy(rows[:, 2] != 0.0))
        multiplier = plan.tables.guidance_multiplier.astype(np.float32)
        self.register_buffer("guidance_multiplier", torch.from_numpy(multiplier))
        self.compensation = Compensation(plan)

    def forward(
        self, noise_pred: Tensor, latents: Tensor, step: Tensor, guidance: Tensor, x0_prev: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Shapes as in the file's header; without memory in the solver there is one output, `next_latents`."""
        noise_pred = self.compensation(noise_pred, step, latents, x0_prev)
        return self.advance(noise_pred, latents, step, step, guidance, x0_prev)

    def advance(
        self, noise_pred: Tensor, latents: Tensor, step: Tensor, row: Tensor, guidance: Tensor, x0_prev: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Guidance and solver of an output that is corrected already; `row` () is the step's row in the solver's table:
        the step itself, or, where splits have grids of their own, `split_row * N + step`."""
        coefficients = self.coefficients[row]  # (7,)
        unconditional, conditional = noise_pred[0:1], noise_pred[1:2]  # (1, C, h, w) each
        e = unconditional + guidance * self.guidance_multiplier[step] * (conditional - unconditional)
        next_latents = coefficients[0] * latents + coefficients[1] * e
        if x0_prev is None:
            return (next_latents,)
        x0 = coefficients[4] * latents + coefficients[5] * e
        # Unused memory is selected away, not multiplied by c = 0: what was never written may hold anything.
        memory = torch.where(self.reads_memory[row], x0_prev, x0)
        return next_latents + coefficients[2] * memory, x0


class FewStepTail(nn.Module):
    """One guidance branch and a sampler that adds noise: `x' = a x + b e + n noise`, rows gathered by step."""

    coefficients: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        rows = np.array([astuple(row) for row in plan.recipe.solver], dtype=np.float64)  # (N, 7): a b c n p q s
        self.register_buffer("coefficients", torch.from_numpy(rows.astype(np.float32)))
        self.compensation = Compensation(plan)

    def forward(self, noise_pred: Tensor, latents: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """All (1, C, h, w) but step; the last row's n is 0, so that any finite noise will do there."""
        row = self.coefficients[step]  # (7,)
        noise_pred = self.compensation(noise_pred, step)
        return row[0] * latents + row[1] * noise_pred + row[3] * noise
