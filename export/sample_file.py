"""The torch run and its samples on disk, so that a build which goes on does not run torch again.

One safetensors file: `run.<field>[.<index>]` and `<component>.<index>.<in|out>.<name>`. Arrays come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.export.parity import Sample
from latentrelay.export.reference_run import ReferenceRun
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

SAMPLES = "samples.safetensors"
_SEQUENCES = ("latents", "x0_prev", "noise")


def save_samples(folder: Path, run: ReferenceRun, samples: Mapping[str, list[Sample]]) -> None:
    """Write samples.safetensors into `folder`."""
    arrays: dict[str, NDArray[Any]] = {
        "run.prompt_embeds": run.prompt_embeds,
        "run.input_ids": run.input_ids,
        "run.guidance": np.array(run.guidance, dtype=np.float64),
    }
    for field in _SEQUENCES:
        arrays |= {f"run.{field}.{row:04d}": array for row, array in enumerate(getattr(run, field))}
    for component, cases in samples.items():
        for row, case in enumerate(cases):
            for side, values in (("in", case.inputs), ("out", case.outputs)):
                # The order of ports is the graph's, and safetensors keeps none.
                for place, (name, array) in enumerate(values.items()):
                    arrays[f"{component}.{row:04d}.{side}.{place:04d}.{name}"] = array
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, folder / SAMPLES)


def load_samples(folder: Path) -> tuple[ReferenceRun, dict[str, list[Sample]]]:
    """What `save_samples` wrote."""
    arrays = dict(sorted(load_file(folder / SAMPLES).items()))
    sequences = {
        field: tuple(array for name, array in arrays.items() if name.startswith(f"run.{field}."))
        for field in _SEQUENCES
    }
    run = ReferenceRun(
        prompt_embeds=arrays["run.prompt_embeds"],
        input_ids=arrays["run.input_ids"],
        guidance=float(arrays["run.guidance"]),
        **sequences,
    )
    samples: dict[str, list[Sample]] = {}
    for key, array in arrays.items():
        if key.startswith("run."):
            continue
        component, row, side, _, name = key.split(".", 4)
        cases = samples.setdefault(component, [])
        if int(row) == len(cases):
            cases.append(Sample({}, {}))
        (cases[-1].inputs if side == "in" else cases[-1].outputs)[name] = array
    return run, samples
