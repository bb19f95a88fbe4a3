"""The edge segment in NumPy: solver rows applied to a denoiser's output, step by step, as the step graph does it.

In: a `Denoiser` (a deployed session, or the float network) and where the run starts: latents (1, C, h, w), the
solver's memory, prompt_embeds (2, T, D). Out: one `ChainStep` a step, so that the caller decides what to keep. It is
the step graph's arithmetic in the step graph's precision (float32) and order; samplers that add noise are not for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from latentrelay.compress.errors import TrajectoryError
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Denoiser(Protocol):
    """The network of one step. It scales its input by the row's `s` and looks the timestep up itself."""

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """latents (1, C, h, w), step in the whole run, prompt_embeds (2, T, D) -> noise_pred (2, C, h, w), the
        unconditional branch first; all float32."""
        ...


class Correction(Protocol):
    """What is done to a noise prediction before guidance."""

    def apply(self, noise_pred: Floats, step: int, latents: Floats, x0_prev: Floats | None) -> Floats:
        """noise_pred (2, C, h, w), latents and the memory (1, C, h, w) -> the noise prediction; all float32."""
        ...


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run begins: step `split`, latents (1, C, h, w), x0_prev (1, C, h, w) or None, prompt_embeds (2, T, D)."""

    split: int
    latents: Floats
    x0_prev: Floats | None
    prompt_embeds: Floats


@dataclass(frozen=True, eq=False)
class ChainStep:
    """One step as it went. `noise_pred` (2, C, h, w) is what the network gave, before any correction; `e` (1, C, h, w)
    is what the solver was given; `x0_prev` is the memory it read, `next_x0_prev` the one that it leaves."""

    step: int
    latents: Floats
    x0_prev: Floats | None
    noise_pred: Floats
    e: Floats
    next_latents: Floats
    next_x0_prev: Floats


def chain(
    denoiser: Denoiser,
    table: SolverTable,
    start: Start,
    guidance: float,
    correction: Correction | None = None,
    guidance_multiplier: Sequence[float] | NDArray[np.float64] | None = None,
) -> Iterator[ChainStep]:
    """Steps `start.split` .. N-1. Raises TrajectoryError for a sampler that adds noise, a split that is not 0..N, and a
    noise prediction that is not finite (named by its step)."""
    if table.needs_noise:
        raise TrajectoryError(
            "a chain in NumPy adds no noise", got="a sampler that does", expected="n = 0 in every row"
        )
    if not 0 <= start.split <= len(table.rows):
        raise TrajectoryError("no such split", got=start.split, expected=f"0..{len(table.rows)}", field="split")
    latents, x0_prev = start.latents, start.x0_prev
    for step in range(start.split, len(table.rows)):
        noise_pred = denoiser(latents, step, start.prompt_embeds)
        bad = int(noise_pred.size - np.isfinite(noise_pred).sum())
        if bad:
            raise TrajectoryError(f"step {step}: the network gave {bad} values that are NaN or Inf", expected="numbers")
        corrected = noise_pred if correction is None else correction.apply(noise_pred, step, latents, x0_prev)
        scale = guidance * (1.0 if guidance_multiplier is None else float(guidance_multiplier[step]))
        e = guided(corrected, scale)
        next_latents, x0 = solver_step(table.rows[step], latents, e, x0_prev)
        yield ChainStep(step, latents, x0_prev, noise_pred, e, next_latents, x0)
        latents, x0_prev = next_latents, x0


def final_latents(steps: Iterator[ChainStep], start: Start) -> Floats:
    """Run a chain to its end: the last latents (1, C, h, w), the start's own where no step is left."""
    latents = start.latents
    for step in steps:
        latents = step.next_latents
    return latents


def guided(noise_pred: Floats, guidance: float) -> Floats:
    """noise_pred (2, C, h, w), unconditional first -> e (1, C, h, w) = u + guidance (c - u)."""
    unconditional, conditional = noise_pred[0:1], noise_pred[1:2]
    return unconditional + np.float32(guidance) * (conditional - unconditional)


def compensated(
    noise_pred: Floats,
    gain: NDArray[np.float64],
    offset: NDArray[np.float64],
    mixing: NDArray[np.float64] | None,
    latents: Floats,
    x0_prev: Floats | None,
) -> Floats:
    """One row of a compensation as the step graph computes it, in float32: `(1 - K) q - b`, and where the row mixes,
    less `m0 q_other + m1 latents + m2 x0_prev`. noise_pred (B, C, h, w), gain and offset (B, C), mixing (2, 3, C)."""
    kept = (1.0 - gain).astype(np.float32)[..., None, None]
    corrected: Floats = noise_pred * kept - offset.astype(np.float32)[..., None, None]
    if mixing is None:
        return corrected
    row = mixing.astype(np.float32)[..., None, None]
    corrected = corrected - (row[:, 0] * noise_pred[::-1] + row[:, 1] * latents)
    return corrected if x0_prev is None or not mixing[:, 2].any() else corrected - row[:, 2] * x0_prev


def solver_step(row: SolverRow, latents: Floats, e: Floats, x0_prev: Floats | None) -> tuple[Floats, Floats]:
    """One row: (next latents, x0), all (1, C, h, w) float32. A row with c = 0 does not look at the memory."""
    a, b, c, p, q = (np.float32(value) for value in (row.a, row.b, row.c, row.p, row.q))
    x0 = p * latents + q * e
    next_latents = a * latents + b * e
    if row.c != 0.0:
        if x0_prev is None:
            raise TrajectoryError("this step reads the solver's memory", got="no x0_prev", expected="(1, C, h, w)")
        next_latents = next_latents + c * x0_prev
    return next_latents, x0
