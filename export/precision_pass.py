"""From float graphs to the bundle's precision: record, measure ranges, quantise, count kernels, fit, judge.

In: the float graphs' stages and the plan. Out: `Refined`, the graphs that ship, the plan with the per-layer recipe and
the fitted tables, and the figures for the manifest. Tables are fitted through the quantised graph in its deployed
session, on runs whose first steps the source's full model computed. For fp32 there is nothing to do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from latentrelay.compress.compensation_gate import compensate
from latentrelay.compress.denoising_chain import Denoiser
from latentrelay.compress.plan import Evidence, Plan
from latentrelay.compress.plan_json import plan_record_to_json
from latentrelay.compress.precision import Layer, PrecisionRecipe, recipe_for
from latentrelay.compress.trajectory import Identity, Trajectories, record
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.activation_ranges import Ranges, record_ranges
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.bundle_manifest import backend_spec
from latentrelay.export.calibration import Calibration
from latentrelay.export.compensation_file import load_outcome, save_outcome
from latentrelay.export.deployed import OnnxDenoiser, PipelineCloud, TorchDenoiser
from latentrelay.export.input_statistics import record_inputs
from latentrelay.export.integer_kernels import count_integer_kernels
from latentrelay.export.layers import is_layer, layers_of
from latentrelay.export.parity import Sample, open_session, snr_db
from latentrelay.export.quantise_graph import quantise
from latentrelay.export.source import SourceModel
from latentrelay.export.stages import StageStore, read_json, stage_digest
from latentrelay.export.text_encoder_weights import compress_text_encoder
from latentrelay.export.weight_only import fit_layer
from latentrelay.runtime.digest import json_digest
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.samplers import sampler_rule
from latentrelay.runtime.strict_json import parse_record, record_to_json

_GRAPH, _RANGES, _COUNT, _PACKAGES = "model.onnx", "ranges.json", "kernels.json", "packages.json"
COREML = "coreml"
_METRIC = "held-out error of the final latents over their peak, 10^(-PSNR/20)"
TEXT_PRECISION = {"fp16": "fp16", **dict.fromkeys(("w8a16", "w8a8", "w4a16", "w4a8"), "w8a16")}
_UNCORRECTED = ("fp32", "fp16")  # nothing to take back
_SLOWEST_PACKAGE_S = 1.5  # a noise prediction by a package; slower, and a fit would take hours
_PACKAGE_FIT, _PACKAGE_HELD_OUT = 8, 6  # recorded runs that packages are fitted and judged on
_RANGE_RUNS = 8  # recorded runs that ranges and Gram matrices are taken from; each has every step of its part


@dataclass(frozen=True)
class Refined:
    """What a precision made. `graphs`: the stage of each component's folder; `quantised` and `precisions`: components
    that are not float32 and what they are; `denoiser`: the deployed U-Net, None where it is float; `packages`: the
    stage of the Core ML packages, None without; `step_plan`: the plan of the ONNX step graph, where its tables are not
    the bundle's (a Core ML profile's are fitted on its packages)."""

    plan: Plan
    graphs: Mapping[str, Path]
    denoiser: Denoiser | None = None
    quantised: tuple[str, ...] = ()
    precisions: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    coreml: tuple[CoreMLPackage, ...] = ()
    packages: Path | None = None
    step_plan: Plan | None = None


@dataclass(frozen=True)
class PrecisionPass:
    """One precision of one build; fields as in `BundleJob`. `latent`: channels, rows, columns."""

    source: SourceModel
    cloud: Any
    vae: Any
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
        refined = Refined(self.plan, dict(graphs)) if self.precision == "fp32" else self._refined(graphs, samples)
        if self.profile.backend.name == "coreml":
            refined = self._with_packages(refined, graphs["unet"], samples)
        return refined

    def _refined(self, graphs: Mapping[str, Path], samples: Mapping[str, list[Sample]]) -> Refined:
        recipe = recipe_for(self._layers(graphs["unet"]), self.precision, self.profile.backend.kernels)
        unet, text = self._quantised(graphs["unet"], recipe), self._text_encoder(graphs["text_encoder"])
        kernels = self._kernels(unet, recipe)
        denoiser = self._deployed(unet)
        own = dataclasses.replace(self.plan.recipe, quantisation=recipe.to_json())
        plan, compensation = self._compensated(unet, denoiser, dataclasses.replace(self.plan, recipe=own))
        parity = {
            "unet": {"snr_db": round(_lowest(unet / _GRAPH, samples["unet"]), 2)},
            "text_encoder": {"snr_db": round(_lowest(text / _GRAPH, samples["text_encoder"]), 2)},
        }
        return Refined(
            plan,
            {**graphs, "unet": unet, "text_encoder": text},
            denoiser,
            ("unet", "step_full", "text_encoder"),
            {"text_encoder": TEXT_PRECISION[self.precision]},
            parity,
            {"kernels": kernels, "compensation": compensation},
        )

    # ---- Core ML (imported when asked for: coremltools takes seconds) ---------------------------------------------

    def _with_packages(self, refined: Refined, unet: Path, samples: Mapping[str, list[Sample]]) -> Refined:
        """With Core ML packages, whose tables are fitted on them; the ONNX graphs beside them are a spare without."""
        from latentrelay.export.coreml_bundle import parity_method

        plain = dataclasses.replace(refined.plan, tables=self.plan.tables)
        stage, packages = self._packages(plain, unet, samples)
        plan, compensation = self._compensated_packages(plain, stage, packages)
        if plan.tables != plain.tables:
            stage, packages = self._packages(plan, unet, samples)
        quality = {**refined.quality, "compensation": compensation, "coreml_parity_by": parity_method()}
        return dataclasses.replace(
            refined, plan=plan, step_plan=plain, packages=stage, coreml=packages, quality=quality
        )

    def _packages(
        self, plan: Plan, unet: Path, samples: Mapping[str, list[Sample]]
    ) -> tuple[Path, tuple[CoreMLPackage, ...]]:
        from latentrelay.export.coreml_bundle import CoreMLParts, parity_method, write_coreml

        pipeline = self.source.pipeline
        rules = None if self.precision == "fp32" else recipe_for(self._layers(unet), self.precision, "coreml").rules

        def write(folder: Path) -> None:
            parts = CoreMLParts(pipeline.unet, pipeline.text_encoder, self.vae)
            progress = self.stages.progress
            made = write_coreml(
                folder, parts, plan, self.profile, self.precision, samples, rules=rules, progress=progress
            )
            write_json(folder / _PACKAGES, {"packages": [record_to_json(each) for each in made]})

        inputs = {
            "run": self.keys["run"],
            "plan": plan_digest(plan),
            "precision": self.precision,
            "profile": self.profile.model_dump(mode="json"),
            "method": parity_method(),
        }
        stage = self.stages.made("coreml", "converting to Core ML", inputs, write)
        return stage, tuple(parse_record(CoreMLPackage, each) for each in read_json(stage, _PACKAGES)["packages"])

    def _compensated_packages(
        self, plan: Plan, stage: Path, packages: tuple[CoreMLPackage, ...]
    ) -> tuple[Plan, Mapping[str, Any]]:
        """As `_compensated`, through the packages; left out where running them here would take too long."""
        from latentrelay.export.coreml_denoiser import PackageDenoiser

        if not self._two_branches or self.precision in _UNCORRECTED:
            return plan, {"verdict": f"not fitted: {self.precision}, {self.plan.recipe.sampler}"}
        step = [each for each in packages if each.role == "step_full"]
        denoiser = PackageDenoiser(stage, step, plan, self.latent, self._states)
        run = next(iter(self._runs(held_out=False)))
        started = time.perf_counter()
        denoiser(run.latents[0], run.split, run.prompt_embeds)
        seconds = time.perf_counter() - started
        if seconds > _SLOWEST_PACKAGE_S:
            return plan, {"verdict": f"not fitted: a noise prediction by the packages takes {seconds:.1f} s here"}
        inputs = {"packages": stage_digest(stage)}
        return self._fitted(plan, denoiser, inputs, _PACKAGE_FIT, _PACKAGE_HELD_OUT)

    @property
    def _two_branches(self) -> bool:
        return sampler_rule(self.plan.recipe.sampler).branches == 2

    def _layers(self, unet: Path) -> tuple[Layer, ...]:
        return layers_of(onnx_ir.load(unet / _GRAPH))

    # ---- recorded runs ------------------------------------------------------------------------------------------

    @cached_property
    def _identity(self) -> Identity:
        recipe = self.plan.recipe
        network = recipe.compression.get("student_digest", self.source.digest)
        return Identity(
            self.source.digest, network, recipe.sampler, recipe.scheduler_digest, recipe.num_steps, self.guidance
        )

    def _runs(self, *, held_out: bool) -> Trajectories:
        """Runs of the edge segment, recorded where they are missing; half from the first step, half from a split."""
        table, recipe = self.plan.recipe.solver_table, self.plan.recipe
        if not self._two_branches:
            raise RequestError(
                "a few-step run cannot be calibrated yet",
                got=self.precision,
                expected="fp32, fp16, w8a16 or w4a16",
                do="Give --precision w8a16.",
            )
        default = self.profile.defaults
        split = round(recipe.num_steps * default.split / default.num_steps)
        prompts = self.calibration.held_out if held_out else self.calibration.prompts
        name = f"runs-{stable(self._identity.to_json())}"
        words = "recording held-out runs" if held_out else "recording runs to calibrate on"
        with self.stages.timed("record", words):
            return record(
                self.stages.folder / name,
                prompts,
                self.calibration.seeds(held_out),
                (0, split) if 0 < split < recipe.num_steps else (0,),
                PipelineCloud(self.cloud, table, self.guidance, self.latent),
                TorchDenoiser(self.source.pipeline.unet, table),
                table,
                self._identity,
                lambda done, asked: self.stages.progress(f"{words}: {done} of {asked}"),
            )

    # ---- compensation -------------------------------------------------------------------------------------------

    def _compensated(self, unet: Path, denoiser: Denoiser, plan: Plan) -> tuple[Plan, Mapping[str, Any]]:
        """The plan with the tables that held-out runs let through, and what each candidate scored."""
        if not self._two_branches or self.precision in _UNCORRECTED or self.profile.backend.name == "coreml":
            return plan, {"verdict": f"not fitted: {self.precision}, {self.plan.recipe.sampler}"}
        inputs = {"graph": stage_digest(unet), "backend": record_to_json(backend_spec(self.profile))}
        return self._fitted(plan, denoiser, inputs, None, None)

    def _fitted(
        self, plan: Plan, denoiser: Denoiser, inputs: Mapping[str, Any], fit: int | None, held_out: int | None
    ) -> tuple[Plan, Mapping[str, Any]]:
        """Tables from the first `fit` recorded runs, judged on the first `held_out`; all of them with None."""

        def write(folder: Path) -> None:
            runs, others = self._runs(held_out=False), self._runs(held_out=True)
            runs, others = runs.take(fit or len(runs)), others.take(held_out or len(others))
            table = self.plan.recipe.solver_table
            save_outcome(folder, compensate(runs, others, denoiser, table, self.stages.progress))

        prompts = [list(self.calibration.prompts[:fit]), list(self.calibration.held_out[:held_out])]
        known = {"runs": self._identity.to_json(), "prompts": prompts, "seed": self.calibration.seed}
        stage = self.stages.made("compensation", "fitting the compensation", {**inputs, **known}, write)
        found = load_outcome(stage)
        evidence = tuple(
            Evidence(f"compensation: {name}", _relative(found.without_db), _relative(score), verdict, _METRIC)
            for name, score, verdict in found.verdicts
        )
        recipe = dataclasses.replace(plan.recipe, corrections=(*plan.recipe.corrections, *evidence))
        tables = dataclasses.replace(plan.tables, **found.tables)
        return dataclasses.replace(plan, recipe=recipe, tables=tables), found.report

    # ---- the U-Net ----------------------------------------------------------------------------------------------

    def _ranges(self, unet: Path) -> Path:
        def write(folder: Path) -> None:
            runs = self._runs(held_out=False).take(_RANGE_RUNS)
            threads = torch.get_num_threads()
            found = record_ranges(unet / _GRAPH, runs.feeds(self.plan.recipe.solver_table), threads=threads)
            write_json(folder / _RANGES, found.to_json())

        return self.stages.made("ranges", "measuring activations", {**self._calibrated(unet)}, write)

    def _quantised(self, unet: Path, recipe: PrecisionRecipe) -> Path:
        rules = recipe.rules.values()
        static = any(rule.activations in ("uint8", "int8") for rule in rules)
        fitted = any(rule.weights == "int4" for rule in rules)
        ranges = self._ranges(unet) if static else None
        inputs: dict[str, Any] = {"unet": stage_digest(unet), "recipe": recipe.to_json()}
        inputs |= {} if ranges is None else {"ranges": stage_digest(ranges)}
        inputs |= self._calibrated(unet) if fitted and self._two_branches else {}

        def write(folder: Path) -> None:
            measured = None if ranges is None else Ranges.from_json(read_json(ranges, _RANGES))
            fits = self._fits(unet, recipe) if fitted and self._two_branches else None
            quantise(unet / _GRAPH, recipe, measured, folder / _GRAPH, fits=fits)

        return self.stages.made("quantise", f"quantising the U-Net to {recipe.precision}", inputs, write)

    def _fits(self, unet: Path, recipe: PrecisionRecipe) -> Mapping[str, Any]:
        """Weights rounded for what the layers really see."""
        runs = self._runs(held_out=False).take(_RANGE_RUNS)
        wanted = {name for name, rule in recipe.rules.items() if rule.weights == "int4"}
        seen = record_inputs(unet / _GRAPH, runs.feeds(self.plan.recipe.solver_table), wanted)
        model = onnx_ir.load(unet / _GRAPH)
        layers = {layer.name: layer for layer in layers_of(model)}
        nodes = {node.name or "": node for node in model.graph if is_layer(node)}
        return {
            name: fit_layer(nodes[name], layers[name], recipe.rules[name], recipe.kernels, seen.get(name))
            for name in sorted(wanted)
        }

    def _calibrated(self, unet: Path) -> dict[str, Any]:
        return {
            "unet": stage_digest(unet),
            "runs": self._identity.to_json(),
            "prompts": list(self.calibration.prompts[:_RANGE_RUNS]),
            "seed": self.calibration.seed,
        }

    def _kernels(self, unet: Path, recipe: PrecisionRecipe) -> Mapping[str, Any]:
        """What ONNX Runtime really fused; other kernel sets are not run here."""
        if not recipe.precision.endswith("a8") or recipe.kernels != "onnxruntime-x64":
            return {}

        def write(folder: Path) -> None:
            options = backend_spec(self.profile).session_options
            write_json(folder / _COUNT, count_integer_kernels(unet / _GRAPH, recipe, options).to_json())

        inputs = {"unet": stage_digest(unet), "recipe": recipe.to_json()}
        stage = self.stages.made("kernels", "counting integer kernels", inputs, write)
        found: Mapping[str, Any] = read_json(stage, _COUNT)
        return found

    def _text_encoder(self, text: Path) -> Path:
        weights: Literal["int8", "float16"] = "float16" if self.precision == "fp16" else "int8"
        kernels = self.profile.backend.kernels

        def write(folder: Path) -> None:
            compress_text_encoder(text / _GRAPH, folder / _GRAPH, kernels, weights)

        inputs = {"text_encoder": stage_digest(text), "kernels": kernels, "weights": weights}
        return self.stages.made("text_encoder_weights", "compressing the text encoder", inputs, write)

    @property
    def _states(self) -> tuple[int, int]:
        """Tokens and width of the text states."""
        pipeline = self.source.pipeline
        return int(pipeline.tokenizer.model_max_length), int(pipeline.text_encoder.config.hidden_size)

    def _deployed(self, unet: Path) -> Denoiser:
        spec = backend_spec(self.profile)
        return OnnxDenoiser(unet / _GRAPH, self.plan.recipe.solver_table, spec, self.latent, self._states)


def _relative(psnr_db: float) -> float:
    """Decibels as an error: root mean square over the peak."""
    return round(float(10 ** (-psnr_db / 20)), 6)


def stable(document: Mapping[str, Any]) -> str:
    """A short name for what a folder belongs to."""
    return json_digest(dict(document)).removeprefix("sha256:")[:16]


def plan_digest(plan: Plan) -> str:
    """Over decisions and tables."""
    tables = {name: array.tobytes().hex() for name, array in plan.tables.arrays().items()}
    return json_digest({"recipe": plan_record_to_json(plan.recipe), "tables": tables})


def _lowest(graph: Path, cases: list[Sample]) -> float:
    session = open_session(graph)
    return min(
        snr_db(expected, got)
        for case in cases
        for expected, got in zip(case.outputs.values(), session.run(list(case.outputs), case.inputs), strict=True)
    )
