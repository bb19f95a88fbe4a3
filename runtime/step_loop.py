"""The step loop: one call of a step graph after another, which of them and on what by the mask of the split.

In: a `Route` and the run's state by roles (latents (1, C, h, w), x0_prev, prompt_embeds, guidance). Out: a `StepEvent`
after every step. It holds the ladders between steps and knows nothing of what the graphs compute; opening graphs,
choosing a route and checking a caller's arguments is `session.py`'s.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Arrays
from latentrelay.runtime.errors import NonFiniteError, SessionError
from latentrelay.runtime.ladders import Ladders, non_finite
from latentrelay.runtime.manifest import Component, Manifest
from latentrelay.runtime.noise import NoiseStream
from latentrelay.runtime.prediction_check import FULL, LADDER_ROLES, STEP_FULL, STEP_PREDICTED
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
RunGraph = Callable[[str, Arrays, Arrays], dict[str, NDArray[Any]]]  # component, inputs, outputs to write into
RECOMPUTED = "recomputed"


@dataclass(frozen=True, eq=False)
class StepEvent:
    """One finished step: its index in the whole run, the run's length, its nominal timestep, the arrays it made
    (the next step's input; copy before changing them), milliseconds, and how it came about.

    `kind` "full" (computed), "predicted", or "recomputed": predicted, found too far off, and computed after all.
    `choices` (P,): how often each predictor was chosen over branches and tokens; `probe_error`: how far the chosen ones
    were off on the probe, squared error over squared norm. Both None where the graph does not choose.
    """

    step: int
    num_steps: int
    timestep: float
    latents: Float32
    x0_prev: Float32 | None
    ms: float
    kind: str = FULL
    choices: tuple[int, ...] | None = None
    probe_error: float | None = None


@dataclass(frozen=True, eq=False)
class Route:
    """What a run does: its first step, the kind of every step from there, the row of the mask-dependent tables, the
    probe error above which a predicted step is computed after all, and the source of noise where a sampler adds it."""

    first_step: int
    mask: tuple[str, ...]
    row: int
    limit: float
    noise: NoiseStream | None


def loop(
    run_graph: RunGraph, manifest: Manifest, route: Route, state: dict[str, NDArray[Any]], ladders: Ladders
) -> Iterator[StepEvent]:
    """Run the route's steps from `state`, which is changed; `ladders` are the run's own until it ends."""
    num_steps, noise = manifest.schedule.num_steps, route.noise

    def run(graph: str) -> dict[str, NDArray[Any]]:
        roles = {**state, **ladders.current, "step": np.array(step), "split_row": np.array(route.row)}
        return _call(run_graph, graph, manifest.components[graph], roles, ladders.spare)

    ladders.reset()
    for step, kind in enumerate(route.mask, route.first_step):
        if noise is not None:  # the last step adds none, and its draw is not made: as diffusers does
            state["noise"] = noise.draw() if step < num_steps - 1 else np.zeros_like(state["latents"])
        started = time.perf_counter()
        made = run(STEP_FULL if kind == FULL else STEP_PREDICTED)
        if kind == FULL:
            ladders.swap()
        elif made.get("probe_error", -math.inf) > route.limit:
            kind, made = RECOMPUTED, made | run(STEP_FULL)  # what it wrote into the spare ladders is not used
        ms = (time.perf_counter() - started) * 1e3
        state |= {role: made[role] for role in ("latents", "x0_prev") if role in made}
        yield _event(manifest, step, state, ms, kind, made)


def _call(
    run_graph: RunGraph, graph: str, spec: Component, roles: Mapping[str, NDArray[Any]], spare: Arrays
) -> dict[str, NDArray[Any]]:
    """One call by roles; ladders that the graph returns are written into the spare ones."""
    unknown = [port.role for port in spec.inputs if port.role not in roles]
    if unknown:
        raise SessionError(
            f"{spec.path} wants an input that this runtime does not know",
            got=unknown[0],
            expected=list(roles),
            do="Update latentrelay.",
        )
    inputs = {port.name: roles[port.role] for port in spec.inputs}
    outputs = {port.name: spare[port.role] for port in spec.outputs if port.role in LADDER_ROLES}
    made, step = run_graph(graph, inputs, outputs), int(roles["step"])
    return {port.role: _checked(made[port.name], graph, step, port.role) for port in spec.outputs}


def _event(manifest: Manifest, step: int, state: Arrays, ms: float, kind: str, made: Arrays) -> StepEvent:
    schedule = manifest.schedule
    memory = state["x0_prev"] if schedule.needs_x0_prev else None
    choices = tuple(int(count) for count in made["choices"]) if "choices" in made else None
    error = float(made["probe_error"]) if "probe_error" in made else None
    return StepEvent(
        step, schedule.num_steps, schedule.timesteps[step], state["latents"], memory, ms, kind, choices, error
    )


def _checked(array: NDArray[Any], graph: str, step: int, role: str) -> NDArray[Any]:
    """A step graph's output, finite; ladders and counts keep their dtype, the rest is float32."""
    if role in ("latents", "x0_prev"):
        return finite(array, graph, step)
    bad = non_finite(array) if array.dtype.kind == "f" else 0
    if bad:
        raise NonFiniteError(graph, step=step, count=bad, output=role)
    return array


def finite(array: NDArray[Any], stage: str, step: int | None = None) -> Float32:
    """`array` as float32; raises NonFiniteError naming the stage."""
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise NonFiniteError(stage, step=step, count=bad)
    return array.astype(np.float32, copy=False)
