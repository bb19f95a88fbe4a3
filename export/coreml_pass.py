"""The Core ML packages of a build, for profiles whose backend is Core ML: converted, then fitted on themselves.

The packages are made without tables first; the compensation is fitted through them (by Core ML on a Mac, elsewhere by
interpretation, on fewer runs), and what the gate lets through is converted in. The bundle's plan then holds the
packages' tables, and the ONNX graphs beside them are a spare without.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import recipe_for
from latentrelay.compress.predicted_chain import WholeOutput
from latentrelay.export.activation_ranges import Ranges
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.calibrated_runs import CalibratedRuns, plan_digest
from latentrelay.export.coreml_bundle import CoreMLParts, parity_method, write_coreml
from latentrelay.export.coreml_denoiser import PackageDenoiser
from latentrelay.export.layers import layers_of
from latentrelay.export.package_style import PackageStyle
from latentrelay.export.parity import Sample
from latentrelay.export.precision_pass import RANGES, Refined
from latentrelay.export.predicted_bundle import plain_row, with_ladders
from latentrelay.export.prediction_pass import PredictionPass
from latentrelay.export.stages import StageStore, read_json, stage_digest
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.strict_json import parse_record, record_to_json

_PACKAGES = "packages.json"
_SLOWEST_S = 1.5  # a noise prediction by the packages; slower, and a fit would take hours
_FIT, _HELD_OUT = 8, 6  # recorded runs that packages are fitted and judged on


@dataclass(frozen=True)
class CoreMLPass:
    """`unet`: the stage of the float U-Net's graph, for the names of its layers; `run`: what the torch run depends on;
    `vae`: the one whose decoder ships; `style`: how packages are written where it is the user's choice; `predicting`:
    what is asked of predicted steps."""

    calibrated: CalibratedRuns
    vae: Any
    precision: str
    stages: StageStore
    unet: Path
    run: Mapping[str, Any]
    style: PackageStyle
    predicting: PredictionPass

    def add(self, refined: Refined, samples: Mapping[str, list[Sample]]) -> Refined:
        """`refined` with packages. Raises ConversionError, DeploymentTargetError, ParityError."""
        plain = dataclasses.replace(refined.plan, tables=self.calibrated.plan.tables)
        stage, packages = self._packages(plain, samples)
        plan, quality = self._fitted(plain, refined.graphs["unet"], stage, packages)
        if plan.tables != plain.tables:
            stage, packages = self._packages(plan, self._with_ladders(plan, refined.graphs["unet"], samples))
        quality = {**refined.quality, **quality, "coreml_parity_by": parity_method()}
        uncorrected = dataclasses.replace(
            plan.tables, compensation_gain=None, compensation_offset=None, compensation_mixing=None
        )
        spare = dataclasses.replace(plan, tables=uncorrected)
        return dataclasses.replace(
            refined, plan=plan, step_plan=spare, packages=stage, coreml=packages, quality=quality
        )

    def _with_ladders(self, plan: Plan, unet: Path, samples: Mapping[str, list[Sample]]) -> Mapping[str, list[Sample]]:
        plain = plain_row(plan, unet / "model.onnx", self.calibrated.latent)
        return {**samples, "step_full": with_ladders(samples["step_full"], plain)} if plain else samples

    def _packages(self, plan: Plan, samples: Mapping[str, list[Sample]]) -> tuple[Path, tuple[CoreMLPackage, ...]]:
        pipeline, profile = self.calibrated.source.pipeline, self.calibrated.profile
        rules = None
        if self.precision != "fp32":
            rules = recipe_for(layers_of(onnx_ir.load(self.unet / "model.onnx")), self.precision, "coreml").rules

        measured = self.stages.places.get("ranges") if self.precision.endswith("a8") else None

        def write(folder: Path) -> None:
            found = None if measured is None else Ranges.from_json(read_json(measured, RANGES)).inputs
            ranges = None if found is None else {name: each.whole for name, each in found.items()}
            parts = CoreMLParts(pipeline.unet, pipeline.text_encoder, self.vae)
            progress = self.stages.progress
            made = write_coreml(
                folder,
                parts,
                plan,
                profile,
                self.precision,
                samples,
                rules=rules,
                ranges=ranges,
                encoding=self.style.encoding,
                apple_layout=self.style.apple_layout,
                progress=progress,
            )
            write_json(folder / _PACKAGES, {"packages": [record_to_json(each) for each in made]})

        inputs = {
            "run": dict(self.run),
            "plan": plan_digest(plan),
            "precision": self.precision,
            "profile": profile.model_dump(mode="json"),
            "method": parity_method(),
            "style": dataclasses.asdict(self.style),
            "ranges": None if measured is None else stage_digest(measured),
        }
        stage = self.stages.made("coreml", "converting to Core ML", inputs, write)
        return stage, tuple(parse_record(CoreMLPackage, each) for each in read_json(stage, _PACKAGES)["packages"])

    def _fitted(
        self, plan: Plan, unet: Path, stage: Path, packages: tuple[CoreMLPackage, ...]
    ) -> tuple[Plan, dict[str, Any]]:
        """Compensation and predicted steps, both through the packages; reports by name."""
        quality: dict[str, Any] = {"compensation": self.calibrated.not_fitted()}
        predicts = self.predicting.ask is not None
        if not (self.calibrated.correctable or predicts):
            return plan, quality
        step = [each for each in packages if each.role == "step_full"]
        denoiser = PackageDenoiser(stage, step, plan, *self.calibrated.shapes, apple_layout=self.style.apple_layout)
        run = next(iter(self.calibrated.runs(held_out=False)))
        denoiser(run.latents[0], run.split, run.prompt_embeds)  # warms up
        started = time.perf_counter()
        denoiser(run.latents[0], run.split, run.prompt_embeds)
        seconds = time.perf_counter() - started
        if seconds > _SLOWEST_S:
            slow = {"verdict": f"not fitted: a noise prediction by the packages takes {seconds:.1f} s here"}
            return plan, {"compensation": slow, **({"prediction": slow} if predicts else {})}
        network = {"packages": stage_digest(stage)}
        if self.calibrated.correctable:
            plan, quality["compensation"] = self.calibrated.fitted(plan, denoiser, network, _FIT, _HELD_OUT)
        if predicts:
            network = {**network, "graph": stage_digest(unet), "plan": plan_digest(plan)}
            plan, quality["prediction"] = self.predicting.planned(
                plan, unet, network, lambda: WholeOutput(denoiser), _FIT, _HELD_OUT
            )
        return plan, quality
