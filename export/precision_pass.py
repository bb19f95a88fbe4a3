"""From float graphs to the bundle's precision: record, measure ranges, quantise, count kernels, fit, judge.

In: the float graphs' stages and the plan. Out: `Refined`, the graphs that ship, the plan with the per-layer recipe and
the fitted tables, and the figures for the manifest. Tables are fitted through the quantised graph in its deployed
session, on runs whose first steps the source's full model computed. For fp32 there is nothing to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from latentrelay.compress.denoising_chain import Denoiser
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import PrecisionRecipe, recipe_for
from latentrelay.export.activation_ranges import Ranges, record_ranges
from latentrelay.export.bundle_folder import write_json
from latentrelay.export.bundle_manifest import backend_spec
from latentrelay.export.calibrated_runs import CalibratedRuns
from latentrelay.export.deployed import OnnxDenoiser
from latentrelay.export.input_statistics import record_inputs
from latentrelay.export.integer_kernels import count_integer_kernels
from latentrelay.export.layers import is_layer, layers_of
from latentrelay.export.parity import Sample, open_session, snr_db
from latentrelay.export.quantise_graph import quantise
from latentrelay.export.stages import StageStore, read_json, stage_digest
from latentrelay.export.text_encoder_weights import compress_text_encoder
from latentrelay.export.weight_only import fit_layer
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.strict_json import record_to_json

_GRAPH, RANGES, _COUNT = "model.onnx", "ranges.json", "kernels.json"
COREML = "coreml"
TEXT_PRECISION = {"fp16": "fp16", **dict.fromkeys(("w8a16", "w8a8", "w4a16", "w4a8"), "w8a16")}
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
    """One precision of one build, on its recorded runs; `recipe` in the place of the precision's plain one."""

    calibrated: CalibratedRuns
    precision: str
    stages: StageStore
    recipe: PrecisionRecipe | None = None

    def run(self, graphs: Mapping[str, Path], samples: Mapping[str, list[Sample]]) -> Refined:
        """`graphs`: the float stages by component. Raises PrecisionError, ExportError and their kin."""
        if self.precision == "fp32":
            return Refined(self.plan, dict(graphs))
        recipe = self.recipe
        if recipe is None:
            recipe = recipe_for(layers_of(onnx_ir.load(graphs["unet"] / _GRAPH)), self.precision, self.kernels)
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

    @property
    def plan(self) -> Plan:
        """As it was before."""
        return self.calibrated.plan

    @property
    def kernels(self) -> str:
        """The profile's kernel set."""
        return self.calibrated.profile.backend.kernels

    def _compensated(self, unet: Path, denoiser: Denoiser, plan: Plan) -> tuple[Plan, Mapping[str, Any]]:
        """A Core ML profile's tables are fitted on its packages instead (coreml_pass.py)."""
        profile = self.calibrated.profile
        if not self.calibrated.correctable or profile.backend.name == "coreml":
            return plan, self.calibrated.not_fitted()
        network = {"graph": stage_digest(unet), "backend": record_to_json(backend_spec(profile, self.precision))}
        return self.calibrated.fitted(plan, denoiser, network)

    # ---- the U-Net ----------------------------------------------------------------------------------------------

    def _ranges(self, unet: Path) -> Path:
        def write(folder: Path) -> None:
            runs = self.calibrated.runs(held_out=False).take(_RANGE_RUNS)
            threads = torch.get_num_threads()
            found = record_ranges(unet / _GRAPH, runs.feeds(self.plan.recipe.solver_table), threads=threads)
            write_json(folder / RANGES, found.to_json())

        return self.stages.made("ranges", "measuring activations", {**self._calibrated(unet)}, write)

    def _quantised(self, unet: Path, recipe: PrecisionRecipe) -> Path:
        rules = recipe.rules.values()
        static = any(rule.activations in ("uint8", "int8") for rule in rules)
        fitted = any(rule.weights == "int4" for rule in rules)
        ranges = self._ranges(unet) if static else None
        inputs: dict[str, Any] = {"unet": stage_digest(unet), "recipe": recipe.to_json()}
        inputs |= {} if ranges is None else {"ranges": stage_digest(ranges)}
        inputs |= self._calibrated(unet) if fitted and self.calibrated.two_branches else {}

        def write(folder: Path) -> None:
            measured = None if ranges is None else Ranges.from_json(read_json(ranges, RANGES))
            fits = self._fits(unet, recipe) if fitted and self.calibrated.two_branches else None
            quantise(unet / _GRAPH, recipe, measured, folder / _GRAPH, fits=fits)

        return self.stages.made("quantise", f"quantising the U-Net to {recipe.precision}", inputs, write)

    def _fits(self, unet: Path, recipe: PrecisionRecipe) -> Mapping[str, Any]:
        """Weights rounded for what the layers really see."""
        runs = self.calibrated.runs(held_out=False).take(_RANGE_RUNS)
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
        return {"unet": stage_digest(unet), **self.calibrated.key(_RANGE_RUNS, 0)}

    def _kernels(self, unet: Path, recipe: PrecisionRecipe) -> Mapping[str, Any]:
        """What the recipe's runtime really fused."""
        if not recipe.precision.endswith("a8"):
            return {}

        def write(folder: Path) -> None:
            options = backend_spec(self.calibrated.profile, self.precision).session_options
            write_json(folder / _COUNT, count_integer_kernels(unet / _GRAPH, recipe, options).to_json())

        inputs = {"unet": stage_digest(unet), "recipe": recipe.to_json()}
        stage = self.stages.made("kernels", "counting integer kernels", inputs, write)
        found: Mapping[str, Any] = read_json(stage, _COUNT)
        return found

    def _text_encoder(self, text: Path) -> Path:
        weights: Literal["int8", "float16"] = "float16" if self.precision == "fp16" else "int8"
        kernels = self.kernels

        def write(folder: Path) -> None:
            compress_text_encoder(text / _GRAPH, folder / _GRAPH, kernels, weights)

        inputs = {"text_encoder": stage_digest(text), "kernels": kernels, "weights": weights}
        return self.stages.made("text_encoder_weights", "compressing the text encoder", inputs, write)

    def _deployed(self, unet: Path) -> Denoiser:
        spec = backend_spec(self.calibrated.profile, self.precision)
        return OnnxDenoiser(unet / _GRAPH, self.plan.recipe.solver_table, spec, *self.calibrated.shapes)


def _lowest(graph: Path, cases: list[Sample]) -> float:
    session = open_session(graph)
    return min(
        snr_db(expected, got)
        for case in cases
        for expected, got in zip(case.outputs.values(), session.run(list(case.outputs), case.inputs), strict=True)
    )
