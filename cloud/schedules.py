"""diffusers' schedulers, prepared once for every sampler and number of steps and forked for each run.

Making a scheduler and setting its timesteps takes about a millisecond; a fork is a shallow copy that shares the tables
and has its own counters and memory. A scheduler never writes into its tables, so forks do not see each other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import diffusers
from latentrelay.cloud.openmp import release_workers
from latentrelay.cloud.requests import invalid_field
from latentrelay.runtime.samplers import SAMPLERS, SamplerRule, is_few_step, sampler_for, scheduler_digest


class Schedules:
    """The samplers one pipeline can be run with. Safe from any thread."""

    def __init__(self, source: Any) -> None:
        """source: the pipeline's own scheduler; one of LCM's makes "lcm" the only sampler."""
        few_step = is_few_step(type(source).__name__)
        self.rules: Mapping[str, SamplerRule] = {
            name: rule for name, rule in SAMPLERS.items() if (name == "lcm") == few_step
        }
        self.default = sampler_for(type(source).__name__)
        self._plain = {name: _made(rule, source.config) for name, rule in self.rules.items()}
        self.digests = {name: scheduler_digest(type(each).__name__, each.config) for name, each in self._plain.items()}
        self.prediction_type = str(self._plain[self.default].config.prediction_type)
        self._prepared: dict[tuple[str, int], Any] = {}
        self._lock = threading.Lock()

    def plain(self, sampler: str) -> Any:
        """A scheduler without timesteps, the caller's own."""
        return copy.deepcopy(self._plain[sampler])

    def fork(self, sampler: str, num_steps: int) -> Any:
        """A scheduler with its timesteps set, before its first step, the caller's own.

        Raises ProblemError 422 (num_steps) where the model's schedule does not have that many steps.
        """
        with self._lock:
            prepared = self._prepared.get((sampler, num_steps))
            if prepared is None:
                prepared = self._prepared[sampler, num_steps] = _prepared(self._plain[sampler], num_steps)
                release_workers()  # a request's thread, as a rule
        return _fork(prepared)


def _made(rule: SamplerRule, config: Any) -> Any:
    return getattr(diffusers, rule.scheduler_class).from_config(config, **rule.overrides)


def _fork(scheduler: Any) -> Any:
    forked = copy.copy(scheduler)
    outputs = getattr(forked, "model_outputs", None)
    if outputs is not None:  # the one thing that a step changes in place
        forked.model_outputs = [None] * len(outputs)
    return forked


def _prepared(plain: Any, num_steps: int) -> Any:
    scheduler = _fork(plain)
    try:
        scheduler.set_timesteps(num_steps)
    except ValueError as error:  # LCM has no more steps than its training schedule had
        detail = f"The model's schedule has no {num_steps} steps: {error}"
        raise invalid_field("num_steps", detail, num_steps, "fewer steps") from error
    count = len(scheduler.timesteps)
    if count != num_steps:
        detail = f"The model's schedule has {count} steps for num_steps = {num_steps}."
        raise invalid_field("num_steps", detail, num_steps, "another number of steps")
    return scheduler
