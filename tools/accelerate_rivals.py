"""The rivals as rules: what each calls at a step, and what it puts in a network's place.

In: a `Lab`, settings, and for threshold caches what `accelerate_calibration.py` fitted. Out: methods as in
accelerate_methods.py. Each follows its published rule as far as a U-Net has the place for it; where the original is a
transformer's (FORA, TaylorSeer, TeaCache, first-block), the U-Net form is said in its docstring: reconstructions for
comparison, not the authors' code. A decision on the host costs nothing here, which is in the rivals' favour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.ladders import push
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.token_selection import combine
from latentrelay.tools.accelerate_calibration import FittedThreshold
from latentrelay.tools.accelerate_grids import evenly, kept_steps, natural_steps
from latentrelay.tools.accelerate_methods import Lab, Ruled, Step
from latentrelay.tools.accelerate_networks import BRANCH
from latentrelay.tools.accelerate_signals import change, tea_signal

Target = Literal["modules", "deep_feature", "whole_output"]
WARM_UP = 3  # TaylorSeer computes its first steps
_COMPUTED = {"modules": "full_modules", "deep_feature": "full_deep", "whole_output": "full"}
_REUSED = {"modules": "modules", "deep_feature": "shallow"}


def fewer_steps(lab: Lab, scheduler: Any, count: int, grid: Literal["kept", "natural"]) -> Ruled:
    """The same solver with fewer steps: on `count` of the run's timesteps, or on a schedule of so many steps."""
    indices = evenly(lab.split, lab.num_steps, count)
    if grid == "kept":
        table = kept_steps(scheduler, lab.num_steps, lab.split, indices)
    else:
        table = natural_steps(scheduler, lab.num_steps, lab.split, count)
        told = np.asarray(lab.table.timesteps)
        indices = tuple(int(np.abs(told - at).argmin()) for at in table.timesteps)
    settings = {"steps": count, "grid": grid}
    return Ruled("fewer steps", settings, lab, lambda: _everything, grid=table, indices=indices)


def deep_cache(lab: Lab, interval: int) -> Ruled:
    """DeepCache (arXiv 2312.00858), uniform: the deep feature of every `interval`-th step is reused in between."""
    rule = _interval(lab, "deep_feature", interval, 0, 1)
    return Ruled("DeepCache", {"interval": interval}, lab, rule)


def fora(lab: Lab, interval: int) -> Ruled:
    """FORA (arXiv 2407.01425): attention and feed-forward outputs reused; a U-Net's convolutions run at every step."""
    return Ruled("FORA", {"interval": interval}, lab, _interval(lab, "modules", interval, 0, 1))


def taylor_seer(lab: Lab, target: Target, interval: int, order: int) -> Ruled:
    """TaylorSeer (arXiv 2503.06923): order `order` in the step index, the first three steps computed, then every
    `interval`-th; on a network's sub-modules as published, on the deep feature, or on the whole output."""
    settings = {"target": target, "interval": interval, "order": order}
    return Ruled("TaylorSeer", settings, lab, _interval(lab, target, interval, order, WARM_UP))


def tea_cache(lab: Lab, fitted: FittedThreshold) -> Ruled:
    """TeaCache's rule (arXiv 2411.19108): skip while the accumulated, polynomial-mapped change of the first block's
    modulated input stays below a threshold; what is reused is the change from conv_in's output to the last block's."""
    return _thresholded("TeaCache", lab, fitted, lambda: _TeaCache(fitted))


def first_block_cache(lab: Lab, fitted: FittedThreshold) -> Ruled:
    """First-block cache: skip while the first block changes little against the last computed step's; the change from
    its output to the last block's is reused."""
    return _thresholded("first-block cache", lab, fitted, lambda: _FirstBlock(fitted))


def output_cache(lab: Lab, fitted: FittedThreshold) -> Ruled:
    """Output minus input reused per branch while the expected change stays below a threshold, as stable-diffusion.cpp's
    ucache does: the output's change by the input's at the last computed steps, accumulated over the skipped ones."""
    return _thresholded("output cache", lab, fitted, lambda: _OutputCache(fitted))


def guidance_interval(lab: Lab, computed_both: int) -> Ruled:
    """Guidance in the first `computed_both` steps only; after them the conditional branch runs alone, at batch 1."""

    def rule() -> Callable[[Step], Floats]:
        return lambda step: step.call("full" if step.position < computed_both else BRANCH)["noise_pred"]

    return Ruled("guidance interval", {"guided_steps": computed_both}, lab, rule)


def predicted_with_guidance_interval(lab: Lab, computed: int, computed_both: int) -> Ruled:
    """A uniform mask, order 1 on the whole output; from computed step `computed_both` on only the conditional branch is
    computed, and the unconditional one keeps its last distance to it."""
    kept = {step - lab.split for step in evenly(lab.split, lab.num_steps, computed)}
    settings = {"computed": computed, "guided_steps": computed_both, "order": 1}
    name = "prediction + guidance interval"
    return Ruled(name, settings, lab, lambda: _HalfComputed(kept, computed_both), ours=True)


def random_choice(lab: Lab, prediction: Prediction, settings: dict[str, Any]) -> Ruled:
    """Per-token choice among the same rows by chance, the same seed in every run."""
    return Ruled("random per-token choice", settings, lab, lambda: _RandomChoice(prediction))


def _everything(step: Step) -> Floats:
    return step.call("full")["noise_pred"]


def _interval(lab: Lab, target: Target, interval: int, order: int, warm_up: int) -> Callable[[], _Interval]:
    roles = {"modules": lab.networks.modules, "deep_feature": ("deep",), "whole_output": ("noise_pred",)}[target]
    return lambda: _Interval(target, roles, interval, order, warm_up)


def _thresholded(name: str, lab: Lab, fitted: FittedThreshold, rule: Callable[[], Any]) -> Ruled:
    settings = {"threshold": round(fitted.threshold, 5), "aimed_at": fitted.computed}
    return Ruled(name, settings, lab, rule, fitted=(fitted.threshold, *fitted.polynomial))


@dataclass
class _Interval:
    """Values of the computed steps, extrapolated by backward differences over the gap between the last two."""

    target: Target
    roles: Sequence[str]
    interval: int
    order: int
    warm_up: int
    since: int = 0
    last: int = -1
    ladders: dict[str, list[Floats]] = field(default_factory=dict)

    def __call__(self, step: Step) -> Floats:
        if step.position < self.warm_up or self.since == self.interval - 1:
            return self._computed(step)
        self.since += 1
        ahead = step.position - self.last
        values = {
            role: sum(
                (np.float32(ahead**rung / math.factorial(rung)) * value for rung, value in enumerate(ladder)),
                start=np.zeros_like(ladder[0]),
            )
            for role, ladder in self.ladders.items()
        }
        if self.target == "whole_output":
            return values["noise_pred"]
        return step.call(_REUSED[self.target], values)["noise_pred"]

    def _computed(self, step: Step) -> Floats:
        found, gap = step.call(_COMPUTED[self.target]), step.position - self.last
        for role in self.roles:
            old, new = self.ladders.get(role, []), [found[role]]
            for rung in range(min(self.order, len(old))):
                new.append((new[rung] - old[rung]) / np.float32(gap))
            self.ladders[role] = new
        self.since, self.last = 0, step.position
        return found["noise_pred"]


@dataclass
class _TeaCache:
    fitted: FittedThreshold
    total: float = 0.0
    before: Floats | None = None
    residual: Floats | None = None

    def __call__(self, step: Step) -> Floats:
        edge = step.position in (0, step.count - 1)
        early = None if edge else step.call("first")
        if early is not None and self.before is not None:
            self.total += self.fitted.mapped(change(tea_signal(early), self.before))
            if self.total < self.fitted.threshold and self.residual is not None:
                self.before = tea_signal(early)
                return step.call("head", {"last": early["first_in"] + self.residual})["noise_pred"]
        step.called.clear()  # a computed step goes on from its own beginning, which it does not pay for twice
        found = step.call("full_blocks")
        self.total, self.before = 0.0, tea_signal(found)
        self.residual = found["last"] - found["first_in"]
        return found["noise_pred"]


@dataclass
class _FirstBlock:
    fitted: FittedThreshold
    block: Floats | None = None
    residual: Floats | None = None

    def __call__(self, step: Step) -> Floats:
        if self.block is not None and self.residual is not None and step.position < step.count - 1:
            early = step.call("block")
            if change(early["first_out"] - early["first_in"], self.block) < self.fitted.threshold:
                return step.call("head", {"last": early["first_out"] + self.residual})["noise_pred"]
            step.called.clear()  # as in _TeaCache
        found = step.call("full_blocks")
        self.block = found["first_out"] - found["first_in"]
        self.residual = found["last"] - found["first_out"]
        return found["noise_pred"]


@dataclass
class _OutputCache:
    fitted: FittedThreshold
    total: float = 0.0
    seen: Floats | None = None  # the last step's input
    computed: tuple[Floats, Floats] | None = None  # input and output of the last computed step
    rate: float | None = None

    def __call__(self, step: Step) -> Floats:
        if self.rate is not None and self.computed is not None and self.seen is not None:
            output = self.computed[1]
            self.total += self.rate * float(np.abs(step.latents - self.seen).mean() / np.abs(output).mean())
            if self.total < self.fitted.threshold and step.position < step.count - 1:
                self.seen = step.latents
                return step.latents + (output - self.computed[0])
        noise_pred = step.call("full")["noise_pred"]
        if self.computed is not None:
            moved = float(np.abs(step.latents - self.computed[0]).mean())
            self.rate = float(np.abs(noise_pred - self.computed[1]).mean()) / max(moved, 1e-12)
        self.total, self.seen, self.computed = 0.0, step.latents, (step.latents, noise_pred)
        return noise_pred


@dataclass
class _HalfComputed:
    kept: set[int]
    computed_both: int
    history: list[tuple[int, Floats]] = field(default_factory=list)

    def __call__(self, step: Step) -> Floats:
        if step.position not in self.kept:
            at, now = self.history[0]
            if len(self.history) == 1:
                return now
            before, old = self.history[1]
            return now + np.float32((step.position - at) / (at - before)) * (now - old)
        if sum(1 for each in self.kept if each < step.position) < self.computed_both:
            found = step.call("full")["noise_pred"]
        else:
            found, last = step.call(BRANCH)["noise_pred"].copy(), self.history[0][1]
            found[0] -= last[1] - last[0]
        self.history = [(step.position, found), *self.history[:1]]
        return found


@dataclass
class _RandomChoice:
    prediction: Prediction
    ladder: Floats | None = None
    drawn: Any = field(default_factory=lambda: np.random.default_rng(0))

    def __call__(self, step: Step) -> Floats:
        if self.prediction.kind(step.index) == "full":
            found = step.call("full_deep")
            rungs = self.prediction.rungs
            old = np.zeros((rungs, *found["deep"].shape), np.float32) if self.ladder is None else self.ladder
            self.ladder = push(old, found["deep"], self.prediction.update[step.index]).astype(np.float32)
            return found["noise_pred"]
        if self.ladder is None:
            raise RuntimeError("the mask predicts its first step, which has no ladder yet")
        rows = self.prediction.candidates[step.index]
        feature = combine(rows, self.ladder, self.drawn.integers(0, len(rows), (2, *self.ladder.shape[3:])))
        return step.call("shallow", {"deep": feature})["noise_pred"]
