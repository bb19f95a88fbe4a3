"""Thresholds and TeaCache's polynomial, fitted on recorded runs: so that each cache computes a given number of steps.

In: a `Lab` and recorded runs that cover the split. Out: a `FittedThreshold` for a rule and a number of computed steps.
The network is run once along each recorded run; a rule is then replayed on what it would have seen there, and its
threshold is bisected until the mean number of computed steps is the one asked for. On the runs of an evaluation the
number may differ, and it is what was counted there that is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.trajectory import Trajectory
from latentrelay.tools.accelerate_methods import Lab
from latentrelay.tools.accelerate_signals import change, tea_signal
from numpy.typing import NDArray

_DEGREE = 4
_HALVINGS = 40


@dataclass(frozen=True)
class FittedThreshold:
    """`polynomial`: highest power first, empty for none; `computed`: the number of steps that it was fitted for."""

    threshold: float
    computed: int
    polynomial: tuple[float, ...] = ()

    def mapped(self, value: float) -> float:
        """The change of the output that is expected for a change of the signal."""
        return max(0.0, float(np.polyval(self.polynomial, value))) if self.polynomial else value


@dataclass(frozen=True, eq=False)
class Seen:
    """One run as the rules see it, n steps: `tea` the change of TeaCache's signal from the step before (n,; 0 first),
    `moved` the output's, `blocks` the first block's change of its input (n, ...), `inputs` the latents (n, ...) and
    `outputs` the noise predictions (n, 2, ...)."""

    tea: NDArray[np.float64]
    moved: NDArray[np.float64]
    blocks: Floats
    inputs: Floats
    outputs: Floats


def seen(lab: Lab, runs: Iterable[Trajectory]) -> list[Seen]:
    """The network along the recorded runs' latents from the split on."""
    found = []
    for run in runs:
        if run.split > lab.split:
            continue
        tea, blocks, inputs, outputs = [], [], [], []
        for step in lab.device_steps:
            latents, row = run.latents[step - run.split], lab.table.rows[step]
            scaled = latents * np.float32(row.s)
            values = lab.networks.run("full_blocks", scaled, lab.table.timesteps[step], run.prompt_embeds)
            tea.append(tea_signal(values))
            first_out = values.get("first_out", values["first_in"])
            blocks.append(first_out - values["first_in"])
            inputs.append(latents)
            outputs.append(values["noise_pred"])
        found.append(Seen(_changes(tea), _changes(outputs), np.stack(blocks), np.stack(inputs), np.stack(outputs)))
    return found


def tea_polynomial(runs: Sequence[Seen]) -> tuple[float, ...]:
    """Degree 4, from the signal's change to the output's."""
    signal = np.concatenate([run.tea[1:] for run in runs])
    moved = np.concatenate([run.moved[1:] for run in runs])
    fitted = np.polynomial.Polynomial.fit(signal, moved, _DEGREE).convert()
    return tuple(float(c) for c in fitted.coef[::-1])


def tea_threshold(runs: Sequence[Seen], computed: int) -> FittedThreshold:
    """For TeaCache's rule."""
    polynomial = tea_polynomial(runs)
    plain = FittedThreshold(0.0, computed, polynomial)

    def count(run: Seen, threshold: float) -> int:
        total, found = 0.0, 1
        for i in range(1, len(run.tea)):
            total += plain.mapped(float(run.tea[i]))
            if total >= threshold or i == len(run.tea) - 1:
                found, total = found + 1, 0.0
        return found

    return FittedThreshold(_bisected(runs, computed, count), computed, polynomial)


def block_threshold(runs: Sequence[Seen], computed: int) -> FittedThreshold:
    """For the first-block cache."""

    def count(run: Seen, threshold: float) -> int:
        last, found = run.blocks[0], 1
        for i in range(1, len(run.blocks)):
            if change(run.blocks[i], last) >= threshold or i == len(run.blocks) - 1:
                found, last = found + 1, run.blocks[i]
        return found

    return FittedThreshold(_bisected(runs, computed, count), computed)


def output_threshold(runs: Sequence[Seen], computed: int) -> FittedThreshold:
    """For the output cache."""

    def count(run: Seen, threshold: float) -> int:
        last, rate, total, found = 0, None, 0.0, 1
        for i in range(1, len(run.inputs)):
            if rate is not None:
                step = np.abs(run.inputs[i] - run.inputs[i - 1]).mean()
                total += rate * float(step / np.abs(run.outputs[last]).mean())
                if total < threshold and i < len(run.inputs) - 1:
                    continue
            moved = float(np.abs(run.inputs[i] - run.inputs[last]).mean())
            rate = float(np.abs(run.outputs[i] - run.outputs[last]).mean()) / max(moved, 1e-12)
            last, total, found = i, 0.0, found + 1
        return found

    return FittedThreshold(_bisected(runs, computed, count), computed)


def _bisected(runs: Sequence[Seen], computed: int, count: Callable[[Seen, float], int]) -> float:
    low, high = 0.0, 1.0

    def mean(threshold: float) -> float:
        return float(np.mean([count(run, threshold) for run in runs]))

    while mean(high) > computed and high < 1e6:
        high *= 2.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > computed else (low, middle)
    return high


def _changes(values: Sequence[Floats]) -> NDArray[np.float64]:
    return np.array([0.0, *(change(now, before) for before, now in itertools.pairwise(values))])
