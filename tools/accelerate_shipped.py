"""What a build ships within a device time: bundles with predicted steps, their settings, and their time end to end.

In: the student's shelf and shares of the segment's time. Out: a `Shipped` a share, whose method runs the bundle's own
tables, and milliseconds of the whole segment through the runtime's sessions, the plain bundle and the others in turns.
The planner decides on the gate's captions while it builds; nothing is decided here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.compress.denoising_chain import Start
from latentrelay.compress.plan import Plan
from latentrelay.compress.prediction import Prediction
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.runtime import Bundle, Session
from latentrelay.tools.accelerate_methods import Lab, Method, Predicted
from latentrelay.tools.accelerate_networks import Networks
from latentrelay.tools.accelerate_verdicts import PLANNED
from latentrelay.tools.evaluate_precision import Shelf

ROUNDS, WARM_UPS = 11, 2


@dataclass(frozen=True)
class Shipped:
    """One share's bundle and the planner's report; `method` None where it predicts nothing."""

    share: float
    bundle: Path
    report: Mapping[str, Any]
    method: Method | None


def laboratory(bundle: Bundle, folder: Path, split: int, guidance: float, threads: int) -> Lab:
    """One bundle's networks with its compensation; cut graphs go into `folder`."""
    networks = Networks(bundle, folder, threads)
    tables = {k: v for k, v in networks.plan.tables.arrays().items() if k.startswith("compensation_")}
    correction = TableCorrection(tables) if tables else None
    return Lab(networks, networks.plan.recipe.solver_table, split, guidance, correction)


def shipped(shelf: Shelf, lab: Lab, precision: str, shares: Sequence[float]) -> Iterator[Shipped]:
    """Built one after the other over the shelf's work folder; what did not change is not made again."""
    from latentrelay.export.prediction_pass import PredictionAsk

    for share in shares:
        ask = PredictionAsk(1.0 / share, splits=(lab.split,))
        made = shelf.build(precision, prediction=ask, name=f"{precision}-{share:.0%}".replace("%", "-percent"))
        plan = Plan.load(made.bundle)
        prediction = Prediction.of_plan(plan, lab.split) if plan.recipe.prediction else None
        report = dict(made.quality.get("prediction", {}))
        settings = {"share": share, "settings": report.get("chosen", "nothing predicted")}
        bundle, folder = Bundle.open(made.bundle), lab.networks.folder.with_name(made.bundle.name)
        own = laboratory(bundle, folder, lab.split, lab.guidance, lab.networks.threads)
        method = None if prediction is None else Predicted(PLANNED, settings, own, prediction)
        yield Shipped(share, made.bundle, report, method)


def end_to_end(bundles: Mapping[str, Path], start: Start, guidance: float, threads: int) -> dict[str, dict[str, float]]:
    """`median_ms` and `spread_ms` of the steps from `start` on, by bundle, in an order that moves on; `speedup`: the
    median over rounds of the first bundle's time over the bundle's own."""
    laps: dict[str, list[float]] = {name: [] for name in bundles}
    names = list(bundles)
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(Session(Bundle.open(path), threads=threads)) for name, path in bundles.items()
        }
        for turn in range(-WARM_UPS, ROUNDS):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                begun = time.perf_counter()
                for _ in opened[name].run_steps(
                    start.latents, start.x0_prev, start.split, start.prompt_embeds, guidance
                ):
                    pass
                if turn >= 0:
                    laps[name].append((time.perf_counter() - begun) * 1e3)
    first = laps[names[0]]
    return {
        name: {
            "median_ms": round(statistics.median(each), 3),
            "spread_ms": round(max(each) - min(each), 3),
            "speedup": round(statistics.median(one / own for one, own in zip(first, each, strict=True)), 3),
        }
        for name, each in laps.items()
    }
