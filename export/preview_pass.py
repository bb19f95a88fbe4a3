"""The preview of one build: factors fitted with the decoder that ships, on recorded runs where the build has them.

In: the decoder's stage and how it is fed. Out: `PreviewSpec` and what the manifest says of it. A plain or few-step
build records no runs; its factors are fitted on random latents, and lose about a decibel by that. A Core ML profile's
are fitted with the graph beside its package, which has the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrelay.compress.denoising_chain import Floats
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.calibrated_runs import CalibratedRuns
from latentrelay.export.parity import open_session
from latentrelay.export.preview_factors import FIT, HELD_OUT, averaging, fit_preview, random_latents
from latentrelay.export.stages import StageStore, read_json, stage_digest
from latentrelay.runtime.manifest import PreviewSpec
from latentrelay.runtime.strict_json import parse_record, record_to_json

_GRAPH, _FACTORS = "model.onnx", "preview.json"


@dataclass(frozen=True)
class PreviewPass:
    """One build's. `recorded`: whether it records runs anyway; `scaling`: of the latents that the decoder takes;
    `downscale`: pixels a latent."""

    calibrated: CalibratedRuns
    stages: StageStore
    recorded: bool
    scaling: float
    downscale: int

    def made(self, decoder: Path) -> tuple[PreviewSpec, Mapping[str, Any]]:
        """Fitted with the graph in the stage `decoder`, which is float32 in every precision."""

        def write(folder: Path) -> None:
            decode = averaging(open_session(decoder / _GRAPH), self.scaling, 0.0, self.downscale)
            factors, report = fit_preview(decode, self._latents(held_out=False), self._latents(held_out=True))
            report |= {"fitted_on": "recorded runs" if self.recorded else "random latents"}
            write_json(folder / _FACTORS, {"preview": record_to_json(factors), "report": report})

        latents = self.calibrated.key(FIT, HELD_OUT) if self.recorded else {"latent": list(self.calibrated.latent)}
        inputs: dict[str, Any] = {"decoder": stage_digest(decoder), "latents": latents}
        inputs |= {"scaling": self.scaling, "downscale": self.downscale, "pictures": [FIT, HELD_OUT]}
        found = read_json(self.stages.made("preview", "fitting the preview's factors", inputs, write), _FACTORS)
        return parse_record(PreviewSpec, found["preview"]), found["report"]

    def _latents(self, *, held_out: bool) -> Iterable[Floats]:
        count = HELD_OUT if held_out else FIT
        if not self.recorded:
            return random_latents((1, *self.calibrated.latent), count, FIT if held_out else 0)
        return (run.latents[-1] for run in self.calibrated.runs(held_out=held_out).take(count))
