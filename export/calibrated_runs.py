"""Recorded runs of one build, and tables fitted on them through whatever network is deployed.

`CalibratedRuns.runs` records runs of the edge segment where they are missing (the source's full model makes the steps
before the split, the float student the rest); `fitted` puts the compensation that held-out runs let through into a
plan. Ranges, weight rounding and compensation of ONNX graphs and of Core ML packages share the runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentrelay.compress.compensation_gate import compensate
from latentrelay.compress.denoising_chain import Denoiser
from latentrelay.compress.plan import Evidence, Plan
from latentrelay.compress.plan_json import plan_record_to_json
from latentrelay.compress.trajectory import Identity, Trajectories, record
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.calibration import Calibration
from latentrelay.export.compensation_file import load_outcome, save_outcome
from latentrelay.export.deployed import PipelineCloud, TorchDenoiser
from latentrelay.export.source import SourceModel
from latentrelay.export.stages import StageStore
from latentrelay.runtime.digest import json_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import sampler_rule

UNCORRECTED = ("fp32", "fp16")  # precisions with nothing to take back
_METRIC = "held-out error of the final latents over their peak, 10^(-PSNR/20)"


@dataclass(frozen=True)
class CalibratedRuns:
    """Fields as in `BundleJob`; `latent`: channels, rows, columns; `wanted_splits`: where runs leave the cloud beside
    those that start on the device, in the place of the profile's default split."""

    source: SourceModel
    cloud: Any
    plan: Plan
    profile: DeviceProfile
    latent: tuple[int, int, int]
    guidance: float
    precision: str
    calibration: Calibration
    stages: StageStore
    wanted_splits: tuple[int, ...] = ()

    @property
    def correctable(self) -> bool:
        """Whether a compensation is fitted at all: two guidance branches, and something to take back."""
        return self.two_branches and self.precision not in UNCORRECTED

    @property
    def two_branches(self) -> bool:
        """False for few-step runs, which cannot be recorded yet."""
        return sampler_rule(self.plan.recipe.sampler).branches == 2

    @property
    def states(self) -> tuple[int, int]:
        """Tokens and width of the text states."""
        pipeline = self.source.pipeline
        return int(pipeline.tokenizer.model_max_length), int(pipeline.text_encoder.config.hidden_size)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """Of the latents and of the text states."""
        return self.latent, self.states

    @cached_property
    def identity(self) -> Identity:
        """What runs are recorded with."""
        recipe = self.plan.recipe
        network = recipe.compression.get("student_digest", self.source.digest)
        return Identity(
            self.source.digest, network, recipe.sampler, recipe.scheduler_digest, recipe.num_steps, self.guidance
        )

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Where recorded runs leave the cloud: at the first step, and where it was asked or at the profile's split."""
        if self.wanted_splits:
            return (0, *sorted(set(self.wanted_splits) - {0}))
        num_steps, default = self.plan.recipe.num_steps, self.profile.defaults
        split = round(num_steps * default.split / default.num_steps)
        return (0, split) if 0 < split < num_steps else (0,)

    def runs(self, *, held_out: bool) -> Trajectories:
        """Recorded where they are missing; half from the first step, half from a split. Raises RequestError."""
        table = self.plan.recipe.solver_table
        if not self.two_branches:
            raise RequestError(
                "a few-step run cannot be calibrated yet",
                got=self.precision,
                expected="fp32, fp16, w8a16 or w4a16",
                do="Give --precision w8a16.",
            )
        prompts = self.calibration.held_out if held_out else self.calibration.prompts
        made_with = json_digest({**self.identity.to_json(), "latent": list(self.latent)})
        name = f"runs-{made_with.removeprefix('sha256:')[:16]}"
        words = "recording held-out runs" if held_out else "recording runs to calibrate on"
        with self.stages.timed("record", words):
            return record(
                self.stages.folder / name,
                prompts,
                self.calibration.seeds(held_out),
                self.splits,
                PipelineCloud(self.cloud, table, self.guidance, self.latent),
                TorchDenoiser(self.source.pipeline.unet, table),
                table,
                self.identity,
                lambda done, asked: self.stages.progress(f"{words}: {done} of {asked}"),
            )

    def key(self, fit: int | None = None, held_out: int | None = None) -> dict[str, Any]:
        """What identifies the first `fit` runs and the first `held_out` held-out ones; None is all."""
        return {
            "runs": self.identity.to_json(),
            "latent": list(self.latent),
            "splits": list(self.splits),
            "prompts": [list(self.calibration.prompts[:fit]), list(self.calibration.held_out[:held_out])],
            "seeds": [self.calibration.seeds(False)[:fit], self.calibration.seeds(True)[:held_out]],
        }

    def fitted(
        self,
        plan: Plan,
        denoiser: Denoiser,
        network: Mapping[str, Any],
        fit: int | None = None,
        held_out: int | None = None,
    ) -> tuple[Plan, Mapping[str, Any]]:
        """The plan with the tables that ship, and every candidate's score. `network` identifies what `denoiser` is."""

        def write(folder: Path) -> None:
            runs, others = self.runs(held_out=False), self.runs(held_out=True)
            runs, others = runs.take(fit or len(runs)), others.take(held_out or len(others))
            table = self.plan.recipe.solver_table
            save_outcome(folder, compensate(runs, others, denoiser, table, self.stages.progress))

        inputs = {**network, **self.key(fit, held_out)}
        stage = self.stages.made("compensation", "fitting the compensation", inputs, write)
        found = load_outcome(stage)
        evidence = tuple(
            Evidence(f"compensation: {name}", _relative(found.without_db), _relative(score), verdict, _METRIC)
            for name, score, verdict in found.verdicts
        )
        recipe = dataclasses.replace(plan.recipe, corrections=(*plan.recipe.corrections, *evidence))
        tables = dataclasses.replace(plan.tables, **found.tables)
        return dataclasses.replace(plan, recipe=recipe, tables=tables), found.report

    def not_fitted(self) -> Mapping[str, Any]:
        """The report where nothing is fitted."""
        return {"verdict": f"not fitted: {self.precision}, {self.plan.recipe.sampler}"}


def plan_digest(plan: Plan) -> str:
    """Over decisions and tables."""
    tables = {name: array.tobytes().hex() for name, array in plan.tables.arrays().items()}
    return json_digest({"recipe": plan_record_to_json(plan.recipe), "tables": tables})


def _relative(psnr_db: float) -> float:
    """Decibels as an error: root mean square over the peak; a run that stopped being numbers counts as 1e9."""
    return round(float(10 ** (-max(psnr_db, -180.0) / 20)), 6)
