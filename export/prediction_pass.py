"""Predicted steps for one build: which steps of a split's run the device predicts, fitted on the deployed graph.

In: what the precision made (its U-Net graph, its plan with the compensation) and the recorded runs. Out: the same with
masks, ladder, candidate and rectifier tables in the plan, and the figures for the manifest. What a step costs is timed
on the machine that builds; what is decided is compress/prediction_gate.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentrelay.compress.plan import Plan
from latentrelay.compress.plan_prediction import with_masks
from latentrelay.compress.predicted_chain import StagedDenoiser
from latentrelay.compress.prediction import TARGETS as ALL
from latentrelay.compress.prediction import Target
from latentrelay.compress.prediction_gate import StepCosts, plan_prediction
from latentrelay.device_profiles import DeviceProfile
from latentrelay.device_profiles.preflight import LadderDtype
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.bundle_manifest import backend_spec
from latentrelay.export.calibrated_runs import CalibratedRuns, plan_digest
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.export.ladder_memory import fitting_dtype, widest_ladders
from latentrelay.export.precision_pass import Refined
from latentrelay.export.prediction_file import load_prediction, save_prediction
from latentrelay.export.staged_onnx import StagedOnnx
from latentrelay.export.stages import StageStore, read_json, stage_digest
from latentrelay.export.step_costs import measure_costs
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import BackendSpec
from latentrelay.runtime.samplers import sampler_rule
from latentrelay.runtime.strict_json import record_to_json

_GRAPH, _COSTS = "model.onnx", "costs.json"
PROBE = "P1"
TARGETS = ("auto", "whole_output", "deep_feature")


@dataclass(frozen=True)
class PredictionAsk:
    """What was asked for: how many times faster the device's part should run than with every step computed, what may
    be predicted ("auto": both, the better one ships), and from which splits (none: those that runs are recorded from).
    `hot_speedup`, above `speedup`: of a second mask for each of those splits, for a device that is hot; None: none.

    Raises RequestError.
    """

    speedup: float
    target: Target | Literal["auto"] = "auto"
    splits: tuple[int, ...] = ()
    hot_speedup: float | None = None

    def __post_init__(self) -> None:
        if not 1.0 < self.speedup <= 100.0:
            raise RequestError("speedup is out of range", got=self.speedup, expected="above 1, at most 100")
        if self.hot_speedup is not None and not self.speedup < self.hot_speedup <= 100.0:
            raise RequestError(
                "hot_speedup is out of range", got=self.hot_speedup, expected=f"above {self.speedup:g}, at most 100"
            )
        if self.target not in TARGETS:
            raise RequestError("unknown target of prediction", got=self.target, expected=" | ".join(TARGETS))

    def key(self) -> dict[str, Any]:
        """What a stage depends on; what was not asked for is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def check(self, plan: Plan, profile: DeviceProfile) -> None:
        """Raise RequestError for few-step samplers, splits beyond the run, and a target that cannot be fitted there."""
        if sampler_rule(plan.recipe.sampler).branches != 2:
            raise RequestError(
                "a few-step run predicts no steps: there is nothing between its steps",
                got=f"sampler {plan.recipe.sampler}",
                do="Leave --speedup out.",
            )
        if profile.backend.name == "coreml" and self.target == "deep_feature":
            raise RequestError(
                "the deep feature cannot be read out of a Core ML package, so nothing is fitted on it",
                got=f"{profile.name}, deep_feature",
                expected="auto | whole_output",
                do="Give --predict whole_output, or leave it out.",
            )
        bad = [split for split in self.splits if not 0 <= split < plan.recipe.num_steps]
        if bad:
            raise RequestError("no such split", got=bad[0], expected=f"0 .. {plan.recipe.num_steps - 1}")


@dataclass(frozen=True)
class PredictionPass:
    """One build's. `ask` None predicts nothing; `scheduler`: the sampler's in diffusers, for adjusted grids; `vae`: the
    one whose decoder ships, which the device's memory holds too (the source's if not given)."""

    calibrated: CalibratedRuns
    ask: PredictionAsk | None
    stages: StageStore
    scheduler: Any = None
    vae: Any = None

    def add(self, refined: Refined) -> Refined:
        """`refined` with predicted steps in its plan, or as it was where none was asked for or none held up. A Core ML
        profile's are fitted on its packages instead (coreml_pass.py)."""
        if self.ask is None or self.calibrated.profile.backend.name == "coreml":
            return refined
        unet = refined.graphs["unet"]
        backend = record_to_json(self._spec)
        network = {"graph": stage_digest(unet), "backend": backend, "plan": plan_digest(refined.plan)}
        plan, report = self.planned(refined.plan, unet, network, lambda: self.staged(unet))
        return dataclasses.replace(refined, plan=plan, quality={**refined.quality, "prediction": report})

    def staged(self, unet: Path, probe: str | None = PROBE) -> StagedOnnx:
        """The U-Net in its deployed sessions with its cut points. The cut graphs, and the copy of the weights that
        ONNX Runtime wants beside them, lie in the work folder."""
        folder = self.stages.folder / f"cut-{stage_digest(unet).removeprefix('sha256:')[:16]}-{probe}"
        table = self.calibrated.plan.recipe.solver_table
        return StagedOnnx(unet / _GRAPH, folder, table, self._spec, *self.calibrated.shapes, probe=probe)

    def planned(
        self,
        plan: Plan,
        unet: Path,
        network: Mapping[str, Any],
        staged: Callable[[], StagedDenoiser],
        fit: int | None = None,
        held_out: int | None = None,
    ) -> tuple[Plan, Mapping[str, Any]]:
        """The plan with the predicted steps that `staged` is fitted with, and the report; nothing where none was asked
        for. `unet`: the stage of the graph that steps are timed on; `network` identifies what `staged` opens; `fit` and
        `held_out`: the first so many recorded runs, None for all. A network without a probe predicts whole outputs."""
        ask, calibrated = self.ask, self.calibrated
        if ask is None:
            return plan, {}
        probed = calibrated.profile.backend.name != "coreml"

        def timed(folder: Path) -> None:
            run = next(iter(calibrated.runs(held_out=False)))
            write_json(folder / _COSTS, dataclasses.asdict(measure_costs(self.staged(unet), plan, run, self._spec)))

        stage = self.stages.made("step_costs", "timing computed and predicted steps", network, timed)
        costs = StepCosts(**read_json(stage, _COSTS))
        dtype = self._ladder_dtype(unet, ask, probed)

        def write(folder: Path) -> None:
            runs, others = calibrated.runs(held_out=False), calibrated.runs(held_out=True)
            tables = {name: each for name, each in plan.tables.arrays().items() if name.startswith("compensation_")}
            outcome = plan_prediction(
                runs.take(fit or len(runs)),
                others.take(held_out or len(others)),
                staged(),
                plan.recipe.solver_table,
                TableCorrection(tables) if tables else None,
                costs,
                ask.splits or calibrated.splits,
                ask.speedup,
                calibrated.source.pipeline.scheduler.config.prediction_type,
                targets=_targets(ask.target, probed),
                probe=PROBE if probed else None,
                scheduler=self.scheduler,
                ladder_dtype=dtype,
                progress=self.stages.progress,
                hot_speedup=ask.hot_speedup,
            )
            save_prediction(folder, outcome)

        inputs = {**network, "ask": ask.key(), "costs": dataclasses.asdict(costs)}
        inputs |= calibrated.key(fit, held_out) | ({} if dtype == "float32" else {"ladder_dtype": dtype})
        found = load_prediction(self.stages.made("prediction", "planning predicted steps", inputs, write))
        recipe = dataclasses.replace(
            plan.recipe,
            prediction=found.recipe,
            splits=with_masks(plan.recipe.splits, found.masks),
            corrections=(*plan.recipe.corrections, *found.evidence),
        )
        both = dataclasses.replace(plan.tables, **found.tables)
        return dataclasses.replace(plan, recipe=recipe, tables=both), found.report

    def _ladder_dtype(self, unet: Path, ask: PredictionAsk, probed: bool) -> LadderDtype:
        """float16 where the device's memory asks for it; a package's ladders are float32."""
        if not probed:
            return "float32"
        calibrated, pipeline = self.calibrated, self.calibrated.source.pipeline
        shapes = widest_ladders(unet / _GRAPH, _targets(ask.target, probed) or ALL, PROBE, calibrated.latent)
        rows, columns = calibrated.latent[1:]
        vae = pipeline.vae if self.vae is None else self.vae
        return fitting_dtype(pipeline, vae, calibrated.profile, calibrated.precision, shapes, rows, columns)

    @property
    def _spec(self) -> BackendSpec:
        return backend_spec(self.calibrated.profile, self.calibrated.precision)


def _targets(asked: Target | Literal["auto"], probed: bool) -> tuple[Target, ...] | None:
    if not probed:
        return ("whole_output",)
    return None if asked == "auto" else (asked,)
