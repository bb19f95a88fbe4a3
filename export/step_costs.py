"""What a computed step and both kinds of predicted step cost on this machine: deployed graphs, timed in turns.

The shallow path and the whole network are the cut graphs; a whole-output step, which calls no network, is a
step_predicted graph of the plan's own solver that predicts by Taylor order 1. What a token's choice adds is counted as
its probe; the rest is small beside it.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.plan import Plan, SplitMask
from latentrelay.compress.predicted_chain import StagedDenoiser
from latentrelay.compress.prediction_gate import StepCosts
from latentrelay.compress.trajectory import Trajectory
from latentrelay.export.bundle_manifest import ports
from latentrelay.export.deployed import DeployedSession
from latentrelay.export.parity import Feeds, Sample
from latentrelay.export.step_writer import write_predicted
from latentrelay.runtime.manifest import BackendSpec

_ROUNDS, _WARM_UPS = 9, 2
_OPSET = 18


def measure_costs(staged: StagedDenoiser, plan: Plan, run: Trajectory, spec: BackendSpec) -> StepCosts:
    """Milliseconds, medians over rounds that take turns, on the first step of a recorded run."""
    latents, embeds, step = run.latents[0], run.prompt_embeds, run.split
    feature = staged.full(latents, step, embeds).feature
    with tempfile.TemporaryDirectory() as folder:
        whole = _whole_output(plan, latents, Path(folder, "step_predicted.onnx"), spec)
        calls: dict[str, Callable[[], object]] = {
            "full_ms": lambda: staged.full(latents, step, embeds),
            "deep_ms": lambda: staged.shallow(latents, step, embeds, feature),
            "whole_ms": whole,
            "choice_ms": lambda: staged.probe(latents, step, embeds),
        }
        laps: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(-_WARM_UPS, _ROUNDS):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if turn >= 0:
                    laps[name].append((time.perf_counter() - started) * 1e3)
    return StepCosts(**{name: statistics.median(each) for name, each in laps.items()})


def _whole_output(plan: Plan, latents: Any, path: Path, spec: BackendSpec) -> Callable[[], object]:
    """A call of the graph of one predicted step."""
    probe = _taylor_plan(plan)
    write_predicted(probe, path, torch.from_numpy(np.concatenate([latents, latents])), _OPSET)
    feeds: Feeds = {
        "latents": latents,
        "step": np.array(1, np.int64),
        "split_row": np.array(1, np.int64),
        "guidance": np.array(1.0, np.float32),
        "feature_ladder": np.zeros((2, 2, *latents.shape[1:]), np.float32),
        **({"x0_prev": latents} if plan.recipe.solver_table.needs_x0_prev else {}),
    }
    results = {"next_latents": latents, **({"next_x0_prev": latents} if "x0_prev" in feeds else {})}
    component = ports({"step_predicted": [Sample(feeds, results)]}, dynamic_batch=False)["step_predicted"]
    session = DeployedSession(path, component, spec)
    return lambda: session.run(list(results), feeds)


def _taylor_plan(plan: Plan) -> Plan:
    """Every second step of a run from the first predicted by order 1."""
    num_steps, order = plan.recipe.num_steps, LadderSpec((1,))
    mask = SplitMask(0, tuple("predicted" if step % 2 else "full" for step in range(num_steps)))
    update, candidates = ladder_rows(mask.mask, 0, num_steps, order, np.arange(num_steps, dtype=np.float64))
    settings = {
        "target": "whole_output", "probe": None, "metric": None, "orders": [1], "horizon": 0, "abscissa": "step",
        "ladder": "backward", "ladder_dtype": "float32", "rows": {"0": 1}, "fallback_threshold": None, "report": {},
    }  # fmt: skip
    tables = dataclasses.replace(
        plan.tables,
        ladder_update=np.stack([np.zeros_like(update), update]),
        candidates=np.stack([np.zeros_like(candidates), candidates]),
    )
    splits = tuple(mask if each.split == 0 else each for each in plan.recipe.splits)
    return Plan(dataclasses.replace(plan.recipe, splits=splits, prediction=settings), tables)
