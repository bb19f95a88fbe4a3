"""One build, stage by stage: torch run, graphs, parity, precision, step graph, self-test, manifest.

What takes long goes through a `StageStore` under what it depends on, so that a build which was killed, or is run again
with one setting changed, does only what is missing. The bundle is then put together from the stages' files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import PrecisionRecipe
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.bundle_folder import write_json, write_layout
from latentrelay.export.bundle_manifest import PATHS, backend_spec, ports, write_manifest
from latentrelay.export.calibrated_runs import CalibratedRuns
from latentrelay.export.calibration import Calibration
from latentrelay.export.deployed import DeployedSession
from latentrelay.export.errors import ExportError
from latentrelay.export.light_decoder import decoder_spec
from latentrelay.export.onnx_graphs import UNET_DATA, TextEncoderGraph, UNetGraph, decoder_graph, export_onnx
from latentrelay.export.package_style import PackageStyle
from latentrelay.export.parity import Sample, check_components, check_step, collect_samples, open_session
from latentrelay.export.precision_pass import COREML, PrecisionPass, Refined
from latentrelay.export.predicted_bundle import plain_row, predicted_sample, prediction_spec, with_ladders
from latentrelay.export.predicted_parity import check_predicted
from latentrelay.export.prediction_pass import PredictionAsk, PredictionPass
from latentrelay.export.preview_pass import PreviewPass
from latentrelay.export.reference_run import ReferenceRun, record_run
from latentrelay.export.sample_file import load_samples, save_samples
from latentrelay.export.selftest import write_selftest
from latentrelay.export.source import SourceModel
from latentrelay.export.stages import StageStore, place_files, read_json, stage_digest
from latentrelay.export.step_writer import write_predicted, write_step
from latentrelay.export.tokenizer_file import write_tokenizer
from latentrelay.runtime.digest import weights_digest
from latentrelay.runtime.manifest import Component
from latentrelay.runtime.samplers import SamplerRule, sampler_rule

_OPSET_LOWEST, _OPSET_HIGHEST = 18, 20  # what torch.onnx writes here and ONNX Runtime and Optimum read alike
_GRAPH, _PARITY = "model.onnx", "parity.json"


@dataclass(frozen=True)
class BundleJob:
    """One export under way. `cloud` is the source's own pipeline; in `source`'s the device's U-Net has taken its place.
    `rows`, `columns` are latent rows and columns."""

    source: SourceModel
    cloud: Any
    profile: DeviceProfile
    plan: Plan
    scheduler: Any
    rows: int
    columns: int
    downscale: int
    guidance: float
    vae: Any
    precision: str
    calibration: Calibration
    stages: StageStore
    recipe: PrecisionRecipe | None = None
    style: PackageStyle = field(default_factory=PackageStyle)
    prediction: PredictionAsk | None = None

    def run(self, name: str, folder: Path) -> tuple[str, dict[str, float], Refined]:
        """Write the bundle into `folder`: its digest, the lowest SNR in dB per component, what the precision took."""
        reference, samples = self._reference()
        made = {"text_encoder": self._text_encoder(), "vae_decoder": self._vae_decoder(), "unet": self._unet()}
        parity = self._parity(made, samples)
        refined = self._refined(made, samples)
        spec = backend_spec(self.profile, self.precision)
        preview, preview_report = self._preview.made(refined.graphs["vae_decoder"])
        refined = replace(refined, quality={**refined.quality, "preview": preview_report})
        with self.stages.timed("layout", "writing configuration, tokenizer and plan"):
            write_layout(self.source.pipeline, self.scheduler, folder, self.vae)
            tokenizer = write_tokenizer(self.source.pipeline.tokenizer, folder / "tokenizer")
            refined.plan.save(folder)
            for component, stage in refined.graphs.items():
                place_files(stage, folder / component)
            if refined.packages is not None:
                place_files(refined.packages / COREML, folder / COREML)
        plan = refined.step_plan or refined.plan
        with self.stages.timed("step_graphs", "merging the step graphs"):
            write_step(plan, folder / PATHS["step_full"], self._example(), self._opset)
            if plan.recipe.prediction:
                write_predicted(plan, folder / PATHS["step_predicted"], self._example(), self._opset)
        with self.stages.timed("parity", "comparing the step graphs"):
            plain = plain_row(plan, folder / PATHS["unet"], self._latent)
            staged = None
            if plan.recipe.prediction:
                staged = self._predicting.staged(refined.graphs["unet"], plan.recipe.prediction["probe"])
                samples = {
                    **samples,
                    "step_full": with_ladders(samples["step_full"], plain),
                    "step_predicted": [predicted_sample(plan, reference, staged)],
                }
            ports_of = self._components(samples, refined)
            sessions = {name: DeployedSession(folder / PATHS[name], ports_of[name], spec) for name in refined.quantised}
            step = sessions.get("step_full") or open_session(folder / PATHS["step_full"])
            parity |= check_step(
                step, plan, samples["step_full"], reference, self.rule, refined.denoiser, self.stages.progress, plain
            )
            if staged is not None:
                quantised = "step_full" in sessions
                predicted = DeployedSession(folder / PATHS["step_predicted"], ports_of["step_predicted"], spec)
                sessions |= {"step_predicted": predicted} if quantised else {}
                graphs = {"step_full": step, "step_predicted": predicted}
                parity |= check_predicted(
                    graphs, plan, reference, staged, quantised=quantised, progress=self.stages.progress
                )
        parity |= {name: dict(values) for name, values in refined.parity.items()}
        with self.stages.timed("manifest", "writing the self-test and the manifest"):
            selftest = write_selftest(folder, samples, sessions, packaged=bool(refined.coreml))
            digest = write_manifest(
                folder,
                name=name,
                source=self.source,
                profile=self.profile,
                plan=refined.plan,
                latent=(self.rows, self.columns, self.downscale),
                tokenizer=tokenizer,
                guidance=self.guidance,
                components=ports_of,
                parity=parity,
                selftest=selftest,
                tools=versions(),
                decoder=None if self.vae is self.source.pipeline.vae else decoder_spec(self.vae),
                quality=refined.quality,
                coreml=refined.coreml,
                prediction=prediction_spec(plan, folder / PATHS["unet"], self._latent),
                preview=preview,
            )
        return digest, {component: float(values["snr_db"]) for component, values in parity.items()}, refined

    def _refined(self, made: Mapping[str, Path], samples: Mapping[str, list[Sample]]) -> Refined:
        """The precision's graphs, and Core ML packages where the profile runs those."""
        calibrated = self._calibrated
        refined = PrecisionPass(calibrated, self.precision, self.stages, self.recipe).run(made, samples)
        refined = self._predicting.add(refined)
        if self.profile.backend.name != "coreml":
            return refined
        from latentrelay.export.coreml_pass import CoreMLPass  # coremltools takes seconds to import

        packages = CoreMLPass(
            calibrated, self.vae, self.precision, self.stages, made["unet"], self._keys["run"], self.style,
            self._predicting,
        )  # fmt: skip
        return packages.add(refined, samples)

    @property
    def _latent(self) -> tuple[int, int, int]:
        return self.plan_channels, self.rows, self.columns

    @cached_property
    def _calibrated(self) -> CalibratedRuns:
        return CalibratedRuns(
            self.source, self.cloud, self.plan, self.profile, self._latent, self.guidance,
            self.precision, self.calibration, self.stages, self.prediction.splits if self.prediction else (),
        )  # fmt: skip

    @cached_property
    def _predicting(self) -> PredictionPass:
        return PredictionPass(self._calibrated, self.prediction, self.stages, self.scheduler, self.vae)

    @property
    def _preview(self) -> PreviewPass:
        recorded = self._calibrated.two_branches and (self._calibrated.correctable or self.prediction is not None)
        scaling = float(self.vae.config.scaling_factor)
        return PreviewPass(self._calibrated, self.stages, recorded, scaling, self.downscale)

    @property
    def rule(self) -> SamplerRule:
        """What the sampler needs and has."""
        return sampler_rule(self.plan.recipe.sampler)

    @property
    def plan_channels(self) -> int:
        """Latent channels."""
        return int(self.source.pipeline.unet.config.in_channels)

    @property
    def _dynamic(self) -> bool:
        return not self.profile.support.static_shapes_only

    @property
    def _opset(self) -> int:
        return min(max(self.profile.support.onnx_opset or _OPSET_HIGHEST, _OPSET_LOWEST), _OPSET_HIGHEST)

    @cached_property
    def _keys(self) -> Mapping[str, Any]:
        """What identifies the networks and the schedule, by what depends on it."""
        recipe = self.plan.recipe
        unet = recipe.compression.get("student_digest", self.source.digest)
        vae = self.source.digest if self.vae is self.source.pipeline.vae else _digest(self.vae)
        graph = {"opset": self._opset, "dynamic": self._dynamic, "tools": versions()}
        return {
            "text_encoder": {"weights": self.source.digest, **graph},
            "vae_decoder": {"weights": vae, "size": [self.rows, self.columns], **graph},
            "unet": {
                "weights": unet,
                "size": [self.rows, self.columns],
                "branches": self.rule.branches,
                "kernels": self.profile.backend.kernels,
                **graph,
            },
            "run": {
                "source": self.source.digest,
                "unet": unet,
                "vae": vae,
                "size": [self.rows, self.columns],
                "sampler": recipe.sampler,
                "scheduler": recipe.scheduler_digest,
                "num_steps": recipe.num_steps,
                "guidance": self.guidance,
                "tools": versions(),
            },
        }

    def _reference(self) -> tuple[ReferenceRun, dict[str, list[Sample]]]:
        pipeline = self.source.pipeline

        def write(folder: Path) -> None:
            height, width = self.rows * self.downscale, self.columns * self.downscale
            run = record_run(
                pipeline, self.scheduler, self.plan.recipe.num_steps, height, width, self.guidance, self.rule
            )
            save_samples(folder, run, collect_samples(pipeline, self.plan, run, self.rule, self.vae))

        words = "running the source pipeline in torch"
        return load_samples(self.stages.made("reference_run", words, self._keys["run"], write))

    def _text_encoder(self) -> Path:
        pipeline = self.source.pipeline
        tokens = pipeline.tokenizer.model_max_length

        def write(folder: Path) -> None:
            export_onnx(
                TextEncoderGraph(pipeline.text_encoder),
                [torch.zeros(2 if self._dynamic else 1, tokens, dtype=torch.int64)],
                folder / _GRAPH,
                inputs=["input_ids"],
                outputs=["last_hidden_state", "pooler_output"],
                opset=self._opset,
                batched=["input_ids"] if self._dynamic else [],
            )

        return self.stages.made("text_encoder", "exporting the text encoder", self._keys["text_encoder"], write)

    def _vae_decoder(self) -> Path:
        def write(folder: Path) -> None:
            export_onnx(
                decoder_graph(self.vae),
                [torch.zeros(2 if self._dynamic else 1, self.plan_channels, self.rows, self.columns)],
                folder / _GRAPH,
                inputs=["latent_sample"],
                outputs=["sample"],
                opset=self._opset,
                batched=["latent_sample"] if self._dynamic else [],
            )

        return self.stages.made("vae_decoder", "exporting the VAE decoder", self._keys["vae_decoder"], write)

    def _unet(self) -> Path:
        pipeline = self.source.pipeline
        tokens, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size

        def write(folder: Path) -> None:
            latents = self._example()
            export_onnx(
                UNetGraph(pipeline.unet),
                [latents, torch.tensor(1.0), torch.zeros(len(latents), tokens, width)],
                folder / _GRAPH,
                inputs=["sample", "timestep", "encoder_hidden_states"],
                outputs=["out_sample"],
                opset=self._opset,
                batched=["sample", "encoder_hidden_states"] if self._dynamic else [],
                external=UNET_DATA,
                kernels=self.profile.backend.kernels,
            )

        return self.stages.made("unet", "exporting the U-Net", self._keys["unet"], write)

    def _example(self) -> torch.Tensor:
        """Latents of the batch that is traced; a dynamic axis wants more than one."""
        batch = 2 if self._dynamic else self.rule.branches
        return torch.zeros(batch, self.plan_channels, self.rows, self.columns)

    def _parity(self, made: Mapping[str, Path], samples: Mapping[str, list[Sample]]) -> dict[str, dict[str, float]]:
        def write(folder: Path) -> None:
            paths = {component: stage / _GRAPH for component, stage in made.items()}
            write_json(folder / _PARITY, check_components(paths, samples, self.stages.progress))

        graphs = {component: stage_digest(stage) for component, stage in made.items()}
        inputs = {"graphs": graphs, "run": self._keys["run"]}
        stage = self.stages.made("parity", "comparing every graph with torch", inputs, write)
        report: dict[str, dict[str, float]] = read_json(stage, _PARITY)
        return report

    def _components(self, samples: Mapping[str, list[Sample]], refined: Refined) -> dict[str, Component]:
        own = self.precision
        precisions = {"vae_decoder": "fp32", "text_encoder": "fp32", **refined.precisions}
        others = {name: precision for name, precision in precisions.items() if precision != own}
        components = ports(samples, dynamic_batch=self._dynamic)
        return {name: replace(each, precision=others.get(name)) for name, each in components.items()}


def _digest(module: Any) -> str:
    return weights_digest((name, tensor.detach().cpu().numpy()) for name, tensor in module.state_dict().items())


def _optional_versions() -> dict[str, str]:
    """Of those that are not always there."""
    found = {}
    for tool in ("onnx-ir", "safetensors", "coremltools", "openvino"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[tool] = metadata.version(tool)
    return found


def versions() -> dict[str, str]:
    """The versions of what makes a bundle, by package."""
    tools = ("latentrelay", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy")
    try:
        return {tool: metadata.version(tool) for tool in tools} | _optional_versions()
    except metadata.PackageNotFoundError as error:
        raise ExportError(
            f"{error.name} is not installed as a package", do="Run: pip install latentrelay[export]"
        ) from error
