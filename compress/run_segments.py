"""Recorded runs as one split sees them: where each stands at that step, and what latents it should have afterwards.

In: `Trajectories`, streamed. Out: a `Segment` a run that began at the split or before it; a run recorded from an
earlier step is entered in the middle, with the solver's memory computed again from its recorded outputs. It holds
latents only, (n+1, 1, C, h, w), so that all of a fit's runs fit in memory side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latentrelay.compress.denoising_chain import Floats, Start, guided, solver_step
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Segment:
    """One run from a split on: its start there, and `latents` (n+1, 1, C, h, w) of the n steps left, as recorded."""

    start: Start
    latents: Floats

    def after(self, step: int) -> Floats:
        """The recorded latents (1, C, h, w) after a step of the whole run."""
        target: Floats = self.latents[step + 1 - self.start.split]
        return target


def segments(runs: Iterable[Trajectory], split: int, table: SolverTable, guidance: float) -> tuple[Segment, ...]:
    """Every run that reaches `split`, in order. Raises PredictionError where none does."""
    found = tuple(_segment(run, split, table, guidance) for run in runs if run.split <= split)
    if not found:
        raise PredictionError(f"no run begins at step {split} or before", expected="runs recorded from there")
    return found


def _segment(run: Trajectory, split: int, table: SolverTable, guidance: float) -> Segment:
    memory = run.x0_prev
    for step, latents, noise_pred in run:
        if step == split:
            break
        _, memory = solver_step(table.rows[step], latents, guided(noise_pred, guidance), memory)
    start = Start(split, run.latents[split - run.split].copy(), memory, run.prompt_embeds)
    return Segment(start, run.latents[split - run.split :].copy())
