"""What every way of making a run cheaper is to the evaluation: `Method`, what it ran, and ours.

In: a `Start` (the handoff's latents and the prompt's states). Out: the final latents and, a step at a time, which calls
of the network were made, so that device time can be added up from what each kind of call costs. `Predicted` is ours: a
mask of computed and predicted steps with ladders, choice and rectifier through compress.predicted_chain, the NumPy
reference of the two step graphs. `Ruled` runs a rule that decides at every step what to call; the rivals are rules.
One picture at a time, as on a device; the bundle's own compensation stands behind every network output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
from latentrelay.compress.denoising_chain import Correction, Floats, Start, guided, solver_step
from latentrelay.compress.predicted_chain import Staged, predicted_chain
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.tools.accelerate_networks import BRANCH, NOTHING, WHOLE, Networks, Values

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Ran:
    """Final latents (1, C, h, w), and per step of the device what was called: kinds joined by "+", "none" for none."""

    latents: Floats
    kinds: tuple[str, ...]


class Method(Protocol):
    """One way to run the device's segment."""

    @property
    def name(self) -> str:
        """What rows call it."""

    @property
    def settings(self) -> Settings:
        """What distinguishes it from others of its name, as JSON."""

    @property
    def ours(self) -> bool:
        """False for rivals."""

    def run(self, start: Start) -> Ran:
        """From a handoff to the final latents; the method keeps nothing between runs."""

    def key(self) -> Mapping[str, Any]:
        """What its results depend on besides the starts, as JSON."""


@dataclass(frozen=True, eq=False)
class Lab:
    """The segment that is made cheaper: one bundle's networks, its solver rows and compensation, split and guidance."""

    networks: Networks
    table: SolverTable
    split: int
    guidance: float
    correction: Correction | None

    @cached_property
    def identity(self) -> str:
        """A digest of network, compensation, solver, split and guidance: what results on it are kept by."""
        found = sha256(repr((self.networks.digest, self.table, self.split, self.guidance)).encode())
        for name, table in sorted(getattr(self.correction, "tables", {}).items()):
            found.update(name.encode() + table.tobytes())
        return found.hexdigest()

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.table.rows)

    @property
    def device_steps(self) -> tuple[int, ...]:
        """The steps of the segment."""
        return tuple(range(self.split, self.num_steps))

    def on(self, table: SolverTable) -> View:
        """The networks with timesteps and input scales of a table: a Denoiser and a StagedDenoiser."""
        return View(self.networks, table)


@dataclass(frozen=True, eq=False)
class View:
    """See `Lab.on`."""

    networks: Networks
    table: SolverTable

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """The plain network's noise_pred (2, C, h, w)."""
        return self._run("full", latents, step, prompt_embeds)["noise_pred"]

    def full(self, latents: Floats, step: int, prompt_embeds: Floats) -> Staged:
        """With deep feature and probe."""
        found = self._run("full_deep", latents, step, prompt_embeds)
        return Staged(found["noise_pred"], found["deep"], found["probe"])

    def probe(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """(2, Cp, h, w)."""
        return self._run("probe", latents, step, prompt_embeds)["probe"]

    def shallow(self, latents: Floats, step: int, prompt_embeds: Floats, feature: Floats) -> Floats:
        """noise_pred of a given deep feature."""
        return self._run("shallow", latents, step, prompt_embeds, {"deep": feature})["noise_pred"]

    def _run(self, kind: str, latents: Floats, step: int, embeds: Floats, values: Values | None = None) -> Values:
        row = self.table.rows[step]
        return self.networks.run(kind, latents * np.float32(row.s), self.table.timesteps[step], embeds, values)


@dataclass(frozen=True, eq=False)
class Predicted:
    """Ours: `prediction` says what is computed, predicted, chosen and rectified."""

    name: str
    settings: Settings
    lab: Lab
    prediction: Prediction
    ours: bool = True

    def run(self, start: Start) -> Ran:
        """See `Method`."""
        lab, latents, kinds = self.lab, start.latents, []
        view = lab.on(self.prediction.grid or lab.table)
        computed, predicted = self.calls
        for step in predicted_chain(view, lab.table, start, lab.guidance, self.prediction, lab.correction):
            latents = step.next_latents
            kinds.append(computed if step.kind == "full" else predicted)
        return Ran(latents, tuple(kinds))

    @property
    def calls(self) -> tuple[str, str]:
        """What a computed and what a predicted step call."""
        if self.prediction.target == "whole_output":
            return ("full_deep", "probe") if self.prediction.selects else ("full", NOTHING)
        return "full_deep", "shallow_probe" if self.prediction.selects else "shallow"

    def key(self) -> Mapping[str, Any]:
        """See `Method`."""
        settings, made = dict(self.settings), digest_of(self.prediction)
        return {"name": self.name, "settings": settings, "prediction": made, "lab": self.lab.identity}


@dataclass
class Step:
    """What a rule sees of a step: `position` of `count`, and the network through `call`."""

    lab: Lab
    position: int
    count: int
    index: int  # of the run's step whose compensation row belongs to it
    row: SolverRow
    timestep: float
    latents: Floats
    x0_prev: Floats | None
    prompt_embeds: Floats
    called: list[str] = field(default_factory=list)

    def call(self, kind: str, values: Values | None = None) -> Values:
        """One call, counted; a noise_pred that it returns is corrected, and has both branches."""
        self.called.append(kind)
        scaled = self.latents * np.float32(self.row.s)
        found = dict(self.lab.networks.run(kind, scaled, self.timestep, self.prompt_embeds, values))
        if "noise_pred" in found:
            found["noise_pred"] = self._corrected(found["noise_pred"], kind)
        return found

    def _corrected(self, noise_pred: Floats, kind: str) -> Floats:
        if kind == BRANCH:
            noise_pred = np.concatenate([noise_pred, noise_pred])
        if self.lab.correction is not None:
            noise_pred = self.lab.correction.apply(noise_pred, self.index, self.latents, self.x0_prev)
        return noise_pred[[1, 1]] if kind == BRANCH else noise_pred


class Rule(Protocol):
    """Decides step by step; made anew for every run."""

    def __call__(self, step: Step, /) -> Floats:
        """The step's noise_pred (2, C, h, w)."""


@dataclass(frozen=True, eq=False)
class Ruled:
    """A rule over the segment's steps, or over a grid of its own (`grid` holds those steps alone, `indices` the run's
    steps that they stand nearest to). `fitted`: what the rule was fitted with, for the key."""

    name: str
    settings: Settings
    lab: Lab
    rule: Callable[[], Rule]
    ours: bool = False
    grid: SolverTable | None = None
    indices: Sequence[int] = ()
    fitted: tuple[float, ...] = ()

    def run(self, start: Start) -> Ran:
        """See `Method`."""
        lab, decide = self.lab, self.rule()
        indices = tuple(self.indices) or lab.device_steps
        grid = self.grid or SolverTable(lab.table.rows[lab.split :], lab.table.timesteps[lab.split :], 1.0)
        latents, memory, kinds = start.latents, start.x0_prev, []
        for i, (row, timestep, index) in enumerate(zip(grid.rows, grid.timesteps, indices, strict=True)):
            step = Step(lab, i, len(grid.rows), index, row, float(timestep), latents, memory, start.prompt_embeds)
            e = guided(decide(step), lab.guidance)
            latents, memory = solver_step(row, latents, e, memory)
            kinds.append("+".join(step.called) or NOTHING)
        return Ran(latents, tuple(kinds))

    def key(self) -> Mapping[str, Any]:
        """See `Method`."""
        rows = None if self.grid is None else repr(self.grid)
        key = {"name": self.name, "settings": dict(self.settings), "grid": rows, "fitted": list(self.fitted)}
        return {**key, "lab": self.lab.identity}


def plain(lab: Lab) -> Ruled:
    """Every step computed: what the others are compared with."""
    return Ruled("all steps", {}, lab, lambda: lambda step: step.call("full")["noise_pred"])


def device_ms(kinds: Sequence[str], costs: Mapping[str, float]) -> float:
    """Milliseconds of one run's steps: each step's calls and its tail (compensation, guidance and solver).

    Left out for all alike: ladders, selection and rectifier inside the graphs (a whole-output step takes 0.2 ms in all
    on the reference), and what a host decides. What a build ships is also timed end to end, with everything.
    """
    calls = [kind for step in kinds for kind in step.split("+") if kind != NOTHING]
    return sum(costs[kind] for kind in calls) + costs["tail"] * len(kinds)


def computed_steps(kinds: Sequence[str]) -> int:
    """How many of the steps ran the whole network, on both branches or on one."""
    return sum(any(kind in (*WHOLE, BRANCH) for kind in step.split("+")) for step in kinds)


def digest_of(prediction: Prediction) -> str:
    """Over everything that a prediction holds."""
    found = sha256()
    for name, value in sorted(vars(prediction).items()):
        found.update(name.encode())
        found.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return found.hexdigest()
