"""selftest.safetensors: one sample per graph, so that a device can check itself without torch.

Names are `<component>.in.<input>` and `<component>.out.<output>`; expected outputs are torch's. Scalars keep shape ().
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from latentrelay.export.parity import COMPONENT_GATE_DB, Sample
from latentrelay.runtime.manifest import SelftestSpec
from safetensors.numpy import save

SELFTEST_PATH = "selftest.safetensors"


def write_selftest(folder: Path, samples: Mapping[str, list[Sample]]) -> SelftestSpec:
    """Write the middle sample of each graph (a step in mid-run reads the memory of a multistep solver)."""
    tensors = {}
    for component, cases in samples.items():
        case = cases[len(cases) // 2]
        for side, arrays in (("in", case.inputs), ("out", case.outputs)):
            for name, array in arrays.items():
                tensors[f"{component}.{side}.{name}"] = np.array(array, order="C")
    (folder / SELFTEST_PATH).write_bytes(save(dict(sorted(tensors.items()))))
    return SelftestSpec(SELFTEST_PATH, COMPONENT_GATE_DB)
