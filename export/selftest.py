"""selftest.safetensors: one sample per graph, so that a device can check itself without torch.

Names are `<component>.in.<input>` and `<component>.out.<output>`; scalars keep shape (). A float graph's expected
outputs are torch's. A quantised one's are its own, from the session it was built with: the self-test asks whether this
machine computes the graph, and what quantisation costs stands in the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.export.parity import COMPONENT_GATE_DB, Sample
from latentrelay.runtime.manifest import SelftestSpec
from safetensors.numpy import save

SELFTEST_PATH = "selftest.safetensors"


QUANTISED_TOLERANCE_DB = 25.0  # other integer kernels round in other places, and a flipped rounding travels


PACKAGED_TOLERANCE_DB = 12.0  # Core ML packages round other weights, and in float16; only a broken one is further off


def write_selftest(
    folder: Path, samples: Mapping[str, list[Sample]], sessions: Mapping[str, Any], *, packaged: bool = False
) -> SelftestSpec:
    """Write the middle sample of each graph (a step in mid-run reads the memory of a multistep solver).

    `sessions`: of the quantised graphs among them, which are run for their expected outputs. `packaged`: the bundle has
    Core ML packages, which are held to the same samples.
    """
    tensors = {}
    for component, cases in samples.items():
        case = cases[len(cases) // 2]
        if component in sessions:
            names = list(case.outputs)
            outputs = sessions[component].run(names, case.inputs)
            case = Sample(case.inputs, dict(zip(names, outputs, strict=True)))
        for side, arrays in (("in", case.inputs), ("out", case.outputs)):
            for name, array in arrays.items():
                if component == "step_full" and name.endswith("_ladder"):
                    continue  # tens of megabytes of zeros at a real size; whoever runs the test makes them
                tensors[f"{component}.{side}.{name}"] = np.array(array, order="C")
    (folder / SELFTEST_PATH).write_bytes(save(dict(sorted(tensors.items()))))
    tolerances = dict.fromkeys(sessions, QUANTISED_TOLERANCE_DB)
    if packaged:
        tolerances = dict.fromkeys(samples, PACKAGED_TOLERANCE_DB)
    return SelftestSpec(SELFTEST_PATH, COMPONENT_GATE_DB, tolerances)
