"""The denoising of a batch: runs begin, make a step together, and are told apart again.

In: jobs whose turn it is. Each one that got a step further is given to `stepped`, each that cannot go on to `failed`
with its error. Belongs to the batcher's thread; takes no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from latentrelay.cloud.engine import Engine, stacked_embeds
from latentrelay.cloud.forecast import Size
from latentrelay.cloud.network_call import shared_call
from latentrelay.cloud.places import Job
from latentrelay.cloud.run_state import RunState
from latentrelay.cloud.text_states import TextStates
from latentrelay.runtime.errors import NonFiniteError


@dataclass(frozen=True)
class Call:
    """A network call that was made: for how many runs, how many of them fitted one call, and seconds until every
    latent was there and looked at."""

    size: Size
    group: Size
    requests: int
    fitted: int
    seconds: float


class BatchSteps:
    """Makes steps for any number of jobs of one group."""

    def __init__(
        self,
        engine: Engine,
        texts: TextStates,
        stepped: Callable[[Job], None],
        failed: Callable[[Job, Exception], None],
    ) -> None:
        self._engine, self._texts = engine, texts
        self._stepped, self._failed = stepped, failed
        self._embeds: dict[Size, tuple[tuple[int, ...], torch.Tensor]] = {}

    def begin(self, jobs: list[Job]) -> list[Job]:
        """Noise and text states for those that got a place; returns those that have no step to make."""
        begun: list[tuple[Job, RunState]] = []
        done = []
        for job in jobs:
            try:
                job.state = self._engine.begin(job.request)
            except Exception as error:
                self._failed(job, error)
                continue
            if job.state.done:
                done.append(job)
            else:
                begun.append((job, job.state))
        errors = self._texts.fill([state for _, state in begun])
        for (job, _), failure in zip(begun, errors, strict=True):
            if failure is not None:
                self._failed(job, failure)
        return done

    def step(self, jobs: list[Job]) -> Call | None:
        """One step of every run: those that the step cache skips at once, the others by one shared call."""
        calling = [(job, job.state) for job in jobs if self._skip(job) and job.state is not None]
        if not calling:
            return None
        started = time.perf_counter()
        states = [state for _, state in calling]
        outcomes, fitted = shared_call(self._engine, states, self._stacked([job for job, _ in calling], states))
        moved = []
        for (job, state), outcome in zip(calling, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._failed(job, outcome)
            elif self._advanced(job, state, outcome, computed=True):
                moved.append((job, state))
        good = self._finite(moved)
        seconds = time.perf_counter() - started
        for job in good:
            self._stepped(job)
        return Call(calling[0][0].size, calling[0][0].group, len(calling), fitted, seconds)

    def forget(self, groups: set[Size]) -> None:
        """Keep stacked text states of these groups only."""
        self._embeds = {group: kept for group, kept in self._embeds.items() if group in groups}

    def _skip(self, job: Job) -> bool:
        """Make the steps that do without the network; whether the run then wants it."""
        state = job.state
        while state is not None and job.tickets and not state.done:
            if state.needs_network:
                return True
            if not self._advanced(job, state, state.held(), computed=False):
                return False
            for each in self._finite([(job, state)]):
                self._stepped(each)
        return False

    def _advanced(self, job: Job, state: RunState, noise_pred: torch.Tensor, *, computed: bool) -> bool:
        try:
            state.advance(noise_pred, computed=computed)
        except Exception as error:
            self._failed(job, error)
            return False
        return True

    def _stacked(self, jobs: list[Job], states: list[RunState]) -> torch.Tensor:
        """The text states of a call, kept for as long as the same runs make it."""
        who, group = tuple(job.order for job in jobs), jobs[0].group
        kept = self._embeds.get(group)
        if kept is None or kept[0] != who:
            kept = self._embeds[group] = (who, stacked_embeds(states))
        return kept[1]

    def _finite(self, moved: list[tuple[Job, RunState]]) -> list[Job]:
        """Those whose latents are numbers; the others end. On an accelerator this is where its work is waited for."""
        if not moved:
            return []
        latents = torch.cat([state.latents for _, state in moved])
        counts = (~torch.isfinite(latents)).flatten(1).sum(1).tolist()
        for (job, state), bad in zip(moved, counts, strict=True):
            if bad:
                self._failed(job, NonFiniteError("the cloud's U-Net", step=state.step - 1, count=int(bad)))
        return [job for (job, _), bad in zip(moved, counts, strict=True) if not bad]
