"""The public export: a source pipeline and a device profile go in, a checked bundle folder comes out.

Order: source and architecture, schedule and solver tables, the torch reference run, graphs, parity gate, self-test,
manifest, rename. Everything is written beside the final place, so a refusal at any point leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch
from latentrelay.compress.lora import Adapter
from latentrelay.compress.plan import Plan, PlanSource, full_plan
from latentrelay.compress.solver_tables import solver_table
from latentrelay.device_profiles import DeviceProfile, load_profile
from latentrelay.export.architecture import latent_size
from latentrelay.export.bundle_folder import bundle_folder, check_output, write_layout
from latentrelay.export.bundle_manifest import PATHS, ports, write_manifest
from latentrelay.export.errors import ExportError, UnsupportedSourceError
from latentrelay.export.light_decoder import checked_light_vae, decoder_spec
from latentrelay.export.merge_step import merge_step
from latentrelay.export.onnx_graphs import UNET_DATA, TextEncoderGraph, UNetGraph, decoder_graph, export_onnx
from latentrelay.export.parity import check_parity, collect_samples
from latentrelay.export.reference_run import record_run
from latentrelay.export.selftest import write_selftest
from latentrelay.export.source import SourceModel, load_source
from latentrelay.export.step_graph import FewStepTail, StepHead, StepTail
from latentrelay.export.student import with_student
from latentrelay.export.tokenizer_file import write_tokenizer
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import SamplerRule, is_few_step, sampler_for, sampler_rule, scheduler_digest

Progress = Callable[[str], None]
_OPSET_LOWEST, _OPSET_HIGHEST = 18, 20  # what torch.onnx writes here and ONNX Runtime and Optimum read alike


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the folder, its digest ("sha256:<hex>"), lowest SNR in dB per component, seconds a stage."""

    bundle: Path
    digest: str
    parity_db: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass
class _Stages:
    """Announces a stage and times it."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, words: str) -> Iterator[None]:
        self.progress(words)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def export(
    pipeline_or_model: Any,
    profile: DeviceProfile | str,
    out: Path | str,
    *,
    sampler: str | None = None,
    num_steps: int = 25,
    height: int | None = None,
    width: int | None = None,
    guidance: float = 7.5,
    few_step: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    light_vae: Any = None,
    student: Any = None,
    student_loras: Sequence[Adapter] = (),
) -> ExportResult:
    """Export a Stable Diffusion pipeline as a bundle for a device.

    `pipeline_or_model`: a StableDiffusionPipeline (moved to float32 on the CPU), a hub id, a folder, a .safetensors
    file, or what `load_source` returned. `profile`: a DeviceProfile or its name. `sampler`: "dpmsolver++", "ddim" or
    "lcm", by default the source's own where it has tables, else DPM-Solver++(2M). `height`, `width`: pixels, by default
    the U-Net's own size. `guidance`: the bundle's default scale (>= 1), which the parity run uses too; with "lcm" it is
    in the network and the bundle's is 1. "lcm" is for networks distilled to latent consistency; where the source does
    not say that it is one (its scheduler is LCM's), `few_step=True` says so. `progress` is called with one sentence per
    stage. `light_vae`: an AutoencoderTiny, or the folder of one, whose decoder the bundle holds in the place of the
    source's; latents on the wire, and which cloud model may start a run, stay the source's. `student`: a compressed
    U-Net, or the folder that `latentrelay compress` wrote, which runs on the device in the place of the source's,
    with `student_loras` merged into it.

    Raises ExportError and its kin (source, architecture, output, parity), UnsupportedSchedulerError, ProfileError,
    RequestError.
    """
    if not 1.0 <= guidance < math.inf:
        raise RequestError(
            "guidance is out of range", got=guidance, expected=">= 1 (1 is no guidance)", do="Change it."
        )
    target = load_profile(profile) if isinstance(profile, str) else profile
    folder = Path(out).absolute()
    check_output(folder, overwrite=overwrite)
    stages = _Stages(progress or (lambda words: None))
    with stages("source", "reading the source pipeline"):
        source = load_source(pipeline_or_model)
        compression: Mapping[str, Any] = {}
        if student is not None:
            source, compression = with_student(source, student, student_loras)
    scheduler, plan = _schedule(source, target, sampler, num_steps, few_step, compression)
    if sampler_rule(plan.recipe.sampler).branches == 1:
        guidance = 1.0
    downscale = 2 ** (len(source.pipeline.vae.config.block_out_channels) - 1)
    vae = source.pipeline.vae if light_vae is None else checked_light_vae(light_vae, source.pipeline)
    rows, columns = latent_size(source.pipeline.unet, height, width, downscale)
    with bundle_folder(folder, overwrite=overwrite) as partial:
        job = _Job(source, target, plan, scheduler, rows, columns, downscale, guidance, partial, stages, vae)
        digest, parity_db = job.run(folder.name)
    return ExportResult(folder, digest, parity_db, stages.seconds)


def _schedule(
    source: SourceModel,
    profile: DeviceProfile,
    sampler: str | None,
    num_steps: int,
    few_step: bool,
    compression: Mapping[str, Any],
) -> tuple[Any, Plan]:
    own = source.pipeline.scheduler
    name = sampler or sampler_for(type(own).__name__)
    rule = sampler_rule(name)
    _check_few_step(name, type(own).__name__, few_step)
    scheduler = getattr(diffusers, rule.scheduler_class).from_config(own.config, **rule.overrides)
    trained = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= trained:
        raise UnsupportedSourceError("number of steps", got=num_steps, expected=f"1..{trained}")
    digest = scheduler_digest(rule.scheduler_class, dict(scheduler.config))
    plan = full_plan(
        PlanSource(source.model, source.digest, source.family),
        profile.model_dump(mode="json"),
        name,
        rule.scheduler_class,
        digest,
        solver_table(scheduler, num_steps),
        compression,
    )
    return scheduler, plan


def _check_few_step(sampler: str, own: str, few_step: bool) -> None:
    """A network that was not distilled to consistency makes mush of four steps, and one that was of twenty-five."""
    distilled = few_step or is_few_step(own)
    if sampler == "lcm" and not distilled:
        raise RequestError(
            "sampler lcm is for networks distilled to latent consistency, which the source does not say it is",
            got=f"its scheduler is {own}",
            expected="LCMScheduler, or a consistency adapter merged",
            do="Merge one with --lora, or give --few-step (in Python, few_step=True) if it is one.",
        )
    if sampler != "lcm" and distilled:
        raise RequestError(
            "the source was distilled to latent consistency: its guidance is in the network",
            got=f"sampler {sampler}",
            expected="lcm",
            do="Leave the sampler out, or give the model it was distilled from.",
        )


@dataclass(frozen=True)
class _Job:
    """One export under way; `rows`, `columns` are latent rows and columns, `folder` is the partial bundle."""

    source: SourceModel
    profile: DeviceProfile
    plan: Plan
    scheduler: Any
    rows: int
    columns: int
    downscale: int
    guidance: float
    folder: Path
    stages: _Stages
    vae: Any

    @property
    def rule(self) -> SamplerRule:
        return sampler_rule(self.plan.recipe.sampler)

    def run(self, name: str) -> tuple[str, dict[str, float]]:
        pipeline, stages = self.source.pipeline, self.stages
        with stages("reference_run", "running the source pipeline in torch"):
            height, width = self.rows * self.downscale, self.columns * self.downscale
            reference = record_run(
                pipeline, self.scheduler, self.plan.recipe.num_steps, height, width, self.guidance, self.rule
            )
            samples = collect_samples(pipeline, self.plan, reference, self.rule, self.vae)
        with stages("layout", "writing configuration, tokenizer and plan"):
            write_layout(pipeline, self.scheduler, self.folder, self.vae)
            tokenizer = write_tokenizer(pipeline.tokenizer, self.folder / "tokenizer")
            self.plan.save(self.folder)
        self._write_graphs()
        with stages("parity", "comparing every graph with torch"):
            parity = check_parity(self.folder, PATHS, samples, reference, self.rule, stages.progress)
        with stages("manifest", "writing the self-test and the manifest"):
            selftest = write_selftest(self.folder, samples)
            digest = write_manifest(
                self.folder,
                name=name,
                source=self.source,
                profile=self.profile,
                plan=self.plan,
                latent=(self.rows, self.columns, self.downscale),
                tokenizer=tokenizer,
                guidance=self.guidance,
                components=ports(samples, dynamic_batch=self._dynamic),
                parity=parity,
                selftest=selftest,
                tools=_versions(),
                decoder=None if self.vae is pipeline.vae else decoder_spec(self.vae),
            )
        return digest, {component: values["snr_db"] for component, values in parity.items()}

    @property
    def _dynamic(self) -> bool:
        return not self.profile.support.static_shapes_only

    def _write_graphs(self) -> None:
        pipeline, stages = self.source.pipeline, self.stages
        opset = min(max(self.profile.support.onnx_opset or _OPSET_HIGHEST, _OPSET_LOWEST), _OPSET_HIGHEST)
        batch = 2 if self._dynamic else 1
        tokens, width = pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.hidden_size
        channels = pipeline.unet.config.in_channels
        latents = torch.zeros(2 if self._dynamic else self.rule.branches, channels, self.rows, self.columns)
        with stages("text_encoder", "exporting the text encoder"):
            export_onnx(
                TextEncoderGraph(pipeline.text_encoder),
                [torch.zeros(batch, tokens, dtype=torch.int64)],
                self.folder / PATHS["text_encoder"],
                inputs=["input_ids"],
                outputs=["last_hidden_state", "pooler_output"],
                opset=opset,
                batched=["input_ids"] if self._dynamic else [],
            )
        with stages("vae_decoder", "exporting the VAE decoder"):
            export_onnx(
                decoder_graph(self.vae),
                [latents[:batch]],
                self.folder / PATHS["vae_decoder"],
                inputs=["latent_sample"],
                outputs=["sample"],
                opset=opset,
                batched=["latent_sample"] if self._dynamic else [],
            )
        with stages("unet", "exporting the U-Net"):
            export_onnx(
                UNetGraph(pipeline.unet),
                [latents, torch.tensor(1.0), torch.zeros(len(latents), tokens, width)],
                self.folder / PATHS["unet"],
                inputs=["sample", "timestep", "encoder_hidden_states"],
                outputs=["out_sample"],
                opset=opset,
                batched=["sample", "encoder_hidden_states"] if self._dynamic else [],
                external=UNET_DATA,
            )
        with stages("step_graphs", "merging the step graph"):
            self._write_step(latents, opset)

    def _write_step(self, latents: torch.Tensor, opset: int) -> None:
        unet = self.folder / PATHS["unet"]
        head, tail = unet.with_name("head.onnx"), unet.with_name("tail.onnx")
        one, step = latents[:1], torch.tensor(0, dtype=torch.int64)
        export_onnx(
            StepHead(self.plan, self.rule.branches),
            [one, step],
            head,
            inputs=["latents", "step"],
            outputs=["sample", "timestep"],
            opset=opset,
        )
        if self.rule.branches == 1:  # an example is a tensor of its own: one passed twice becomes one input twice
            module: torch.nn.Module = FewStepTail(self.plan)
            examples = {"noise_pred": one.clone(), "latents": one, "step": step, "noise": one.clone()}
            results = ["next_latents"]
        else:
            memory = self.rule.needs_x0_prev
            module = StepTail(self.plan)
            examples = {"noise_pred": latents, "latents": one, "step": step, "guidance": torch.tensor(7.5)}
            examples |= {"x0_prev": one.clone()} if memory else {}
            results = ["next_latents", *(["next_x0_prev"] if memory else [])]
        export_onnx(module, list(examples.values()), tail, inputs=list(examples), outputs=results, opset=opset)
        merge_step(unet, head, tail, self.folder / PATHS["step_full"], self.rule.branches)
        head.unlink()
        tail.unlink()


def _versions() -> dict[str, str]:
    tools = ("latentrelay", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy")
    try:
        return {tool: metadata.version(tool) for tool in tools}
    except metadata.PackageNotFoundError as error:
        raise ExportError(
            f"{error.name} is not installed as a package", do="Run: pip install latentrelay[export]"
        ) from error
