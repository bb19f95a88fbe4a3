"""The parity gate of predicted steps: both step graphs against the plan's tables applied in NumPy.

The network's own values come from the cut graphs (staged_onnx.py) through `step_output` of compress/predicted_chain.py,
so what is compared is ladders, selection, prediction, rectifier and solver. Teacher-forced: every step of the NumPy run
is given to the graphs. Chained: the graphs' own results, ladders included, are fed on, as a device does. How tokens
chose is returned as counts, so `flipped_choices` is how many counts moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from latentrelay.compress.denoising_chain import Floats, Start, guided, solver_step
from latentrelay.compress.plan import Level, Plan
from latentrelay.compress.plan_prediction import mask_name, mask_rows
from latentrelay.compress.predicted_chain import RunState, StagedDenoiser, rectified, step_output
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.export.errors import ExportError, ParityError
from latentrelay.export.parity import CHAINED_GATE_DB, Feeds, snr_db
from latentrelay.export.reference_run import ReferenceRun
from numpy.typing import NDArray

FLOAT_GATE_DB = 80.0  # an error of 1e-4
MOST_FLIPPED = 0.01  # of the choices, on the same inputs: ties alone
FULL, PREDICTED = "full", "predicted"


class StepGraph(Protocol):
    """An ONNX Runtime session, or a `DeployedSession`."""

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs of those names."""
        ...


class GridDenoiser(StagedDenoiser, Protocol):
    """A staged denoiser that also serves another grid, and knows which of its parts read the text states."""

    def on_grid(self, table: SolverTable) -> StagedDenoiser:
        """The same network at another grid's timesteps."""
        ...

    def reads_states(self, part: str) -> bool:
        """Whether "full", "shallow" or "probe" does."""
        ...


@dataclass(frozen=True)
class _Step:
    """One step of the NumPy run as a graph sees it: its kind, what goes in, what must come out."""

    kind: str
    inputs: Feeds
    outputs: Feeds


def check_predicted(
    sessions: Mapping[str, StepGraph],
    plan: Plan,
    run: ReferenceRun,
    staged: GridDenoiser,
    *,
    quantised: bool,
    progress: Callable[[str], None] = lambda words: None,
) -> dict[str, dict[str, float]]:
    """Compare `sessions` ("step_full", "step_predicted") for every split and level that predicts, started from a
    recorded run.

    Returns {"step_predicted": {"snr_db": the lowest of all teacher-forced outputs}, "predicted_run": {"snr_db": the
    lowest of the masks' last latents, "flipped_choices": counts that moved}}. Raises ParityError below 80 dB, or 50
    where the network is quantised, ladders are kept in float16, or a token between two equals chose the other one;
    ExportError where more than one in a hundred did so on the same inputs.
    """
    rounded = quantised or plan.recipe.prediction["ladder_dtype"] == "float16"
    forced, chained, flipped, chosen = [], [], [0, 0], 0
    for split, level in mask_rows(plan.recipe.prediction):
        progress(f"parity: predicted steps from split {mask_name(split, level)}")
        start = Start(split, run.latents[split], run.x0_prev[split] if split else None, run.prompt_embeds)
        steps = list(numpy_steps(plan, start, run.guidance, staged, level))
        for step in steps:
            got = _called(sessions, step, step.inputs)
            forced.append(_lowest(step, got))
            flipped[0] += _moved(step, got)
            chosen += int(got["choices"].sum()) if "choices" in got else 0
        last, moved = run_chained(sessions, steps)
        chained.append(snr_db(steps[-1].outputs["next_latents"], last))
        flipped[1] += moved
    if flipped[0] > MOST_FLIPPED * chosen:
        raise ExportError(
            "parity gate: step_predicted chooses other rows than its tables in NumPy do, on the same inputs",
            got=f"{flipped[0]} of {chosen} choices",
            expected=f"at most {MOST_FLIPPED:.0%}",
            do="Report the model; the bundle was not written.",
        )
    gates = [CHAINED_GATE_DB if rounded or count else FLOAT_GATE_DB for count in flipped]
    return {
        "step_predicted": {"snr_db": _gated("step_predicted", min(forced), gates[0])},
        "predicted_run": {
            "snr_db": _gated("predicted_run", min(chained), gates[1]),
            "flipped_choices": float(flipped[1]),
        },
    }


def numpy_steps(
    plan: Plan, start: Start, guidance: float, staged: GridDenoiser, level: Level = "normal"
) -> Iterator[_Step]:
    """The run of one split and level in NumPy, with every step's inputs and outputs under the graphs' port names, and
    no other inputs than the step's graph has."""
    prediction = Prediction.of_plan(plan, start.split, level)
    if prediction is None:
        return
    prediction = replace(prediction, fallback_threshold=None)
    table = prediction.grid or plan.recipe.solver_table
    denoiser = staged if prediction.grid is None else staged.on_grid(prediction.grid)
    tables = {name: array for name, array in plan.tables.arrays().items() if name.startswith("compensation_")}
    correction = TableCorrection(tables)
    state = RunState(start.latents, start.x0_prev)
    for step in range(start.split, len(table.rows)):
        out = step_output(denoiser, prediction, state, step, start.prompt_embeds, correction)
        scale = guidance * float(plan.tables.guidance_multiplier[step])
        e = guided(rectified(prediction, out.q, step, state), scale)
        next_latents, x0 = solver_step(table.rows[step], state.latents, e, state.x0_prev)
        after = replace(out.state, latents=next_latents, x0_prev=x0)
        kind = prediction.kind(step)
        results: Feeds = {"next_latents": next_latents, **_memory(plan, x0, "next_x0_prev")}
        if kind == FULL:
            results |= {f"next_{name}": ladder for name, ladder in _ladders(after).items()}
        elif out.choices is not None:
            results |= {"choices": out.choices, "probe_error": np.asarray(out.probe_error)}
        inputs = _inputs(plan, prediction, state if state.feature_ladder is not None else _empty(state, after))
        inputs |= {"step": np.array(step, np.int64), "guidance": np.array(guidance, np.float32)}
        parts = [kind] if kind == FULL else ["shallow"] * (prediction.target == "deep_feature")
        parts += ["probe"] * (kind != FULL and prediction.selects)
        if any(staged.reads_states(part) for part in parts):
            inputs["prompt_embeds"] = start.prompt_embeds
        yield _Step(kind, inputs, results)
        state = after


def run_chained(sessions: Mapping[str, StepGraph], steps: Sequence[_Step]) -> tuple[Floats, int]:
    """The graphs' own run over the same steps: (last latents, counts of choices that moved)."""
    carried: Feeds = {}
    moved = 0
    for step in steps:
        feeds = {name: carried.get(name, array) for name, array in step.inputs.items()}
        got = _called(sessions, step, feeds)
        moved += _moved(step, got)
        carried |= {name.removeprefix("next_"): array for name, array in got.items() if name.startswith("next_")}
    return carried["latents"], moved


def _lowest(step: _Step, got: Feeds) -> float:
    """The lowest SNR of a step's float outputs; how tokens chose is counted. The probe's error is a difference of large
    sums in both, and is compared on the scale of the probe's own squares, which is 1."""
    values = []
    for name, expected in step.outputs.items():
        if expected.dtype != np.int64:
            scale = np.float32(1.0 if name == "probe_error" else 0.0)
            values.append(snr_db(expected.astype(np.float32) + scale, got[name].astype(np.float32) + scale))
    return min(values)


def _moved(step: _Step, got: Feeds) -> int:
    """How many choices went from one row's count to another's."""
    return int(np.abs(got["choices"] - step.outputs["choices"]).sum()) // 2 if "choices" in got else 0


def _called(sessions: Mapping[str, StepGraph], step: _Step, feeds: Feeds) -> Feeds:
    session = sessions["step_full" if step.kind == FULL else "step_predicted"]
    names = list(step.outputs)
    return dict(zip(names, session.run(names, feeds), strict=True))


def _inputs(plan: Plan, prediction: Prediction, state: RunState) -> Feeds:
    row = mask_rows(plan.recipe.prediction)[prediction.split, prediction.level]
    memory = np.zeros_like(state.latents) if state.x0_prev is None else state.x0_prev
    ladders = _ladders(state)
    return {
        "latents": state.latents,
        "split_row": np.array(row, np.int64),
        **_memory(plan, memory, "x0_prev"),
        **ladders,
    }


def _memory(plan: Plan, memory: Floats, name: str) -> Feeds:
    return {name: memory} if plan.recipe.solver_table.needs_x0_prev else {}


def _ladders(state: RunState) -> Feeds:
    found = {"feature_ladder": state.feature_ladder, "probe_ladder": state.probe_ladder}
    return {name: ladder for name, ladder in found.items() if ladder is not None}


def _empty(state: RunState, after: RunState) -> RunState:
    """A run's first step: ladders that were never written, here of NaN, so that whatever reads them shows."""
    found = {name: np.full_like(ladder, np.nan) for name, ladder in _ladders(after).items()}
    return replace(state, **found)


def _gated(component: str, value: float, gate_db: float) -> float:
    if not value >= gate_db:
        raise ParityError(component, value, gate_db)
    return round(value, 2)
