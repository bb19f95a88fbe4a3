"""Where along the run quantisation errs: the error of each step's guided prediction, before and after compensation.

Teacher-forced: every step starts from the float run's own latents, so a step's figure is its own error alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Start, chain, guided
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.tools.array_cache import Arrays
from latentrelay.tools.precision_runs import Experiment, Tables, Variant
from latentrelay.tools.sweep_device import Captions
from numpy.typing import NDArray


def error_by_step(
    experiment: Experiment, plain: Variant, network: Variant, tables: Tables, part: Captions
) -> dict[str, Any]:
    """{"steps", "before", "after"}: squared error of the guided prediction over its power, a number a device step."""

    def run() -> Arrays:
        float_net, deployed = plain.open(), network.open()
        correction = TableCorrection(tables)
        sums: dict[int, NDArray[np.float64]] = {}
        for start in experiment.starts(part):
            _add(sums, start, float_net, deployed, correction, plain, experiment.teacher.guidance)
        steps = sorted(sums)
        return {"steps": np.array(steps, dtype=np.int64), "sums": np.stack([sums[step] for step in steps])}

    made_from = {**experiment.made_from(part), "plain": plain.key(), **_tabled(network, tables)}
    found = experiment.cache.get("curves", made_from, run)
    power, before, after = found["sums"].T
    return {
        "steps": found["steps"].tolist(),
        "before": (before / power).tolist(),
        "after": (after / power).tolist() if tables else None,
    }


def _add(
    sums: dict[int, NDArray[np.float64]],
    start: Start,
    float_net: Any,
    deployed: Any,
    correction: TableCorrection,
    plain: Variant,
    guidance: float,
) -> None:
    for step in chain(float_net, plain.table, start, guidance):
        got = deployed(step.latents, step.step, start.prompt_embeds)
        errors = [
            guided(each, guidance) - step.e
            for each in (got, correction.apply(got, step.step, step.latents, step.x0_prev))
        ]
        row = np.array([float(np.square(each, dtype=np.float64).sum()) for each in (step.e, *errors)])
        sums[step.step] = sums.get(step.step, np.zeros(3)) + row


def _tabled(network: Variant, tables: Tables) -> Mapping[str, Any]:
    from dataclasses import replace

    return replace(network, tables=tables).key()
