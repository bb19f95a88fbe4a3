"""manifest.json of a bundle: ports read off the samples, the schedule off the plan, files off the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrelay.compress.plan import Plan
from latentrelay.compress.precision import INT4_GROUP
from latentrelay.device_profiles import DeviceProfile
from latentrelay.export.bundle_folder import list_files
from latentrelay.export.parity import Sample
from latentrelay.export.source import SourceModel
from latentrelay.runtime.manifest import (
    MANIFEST_NAME,
    BackendSpec,
    Component,
    CoreMLPackage,
    DecoderSpec,
    Guidance,
    ImageSpec,
    LatentSpec,
    Manifest,
    Port,
    PredictionSpec,
    PreviewSpec,
    Schedule,
    SelftestSpec,
    Source,
    TokenizerSpec,
)
from latentrelay.runtime.samplers import sampler_rule

PATHS: Mapping[str, str] = {
    "text_encoder": "text_encoder/model.onnx",
    "unet": "unet/model.onnx",
    "step_full": "unet/step_full.onnx",
    "step_predicted": "unet/step_predicted.onnx",
    "vae_decoder": "vae_decoder/model.onnx",
}
# Activations are taken from the system and given back: with ONNX Runtime's arena and its block for the whole plan they
# are held twice, half as much again of a process's peak, for about a tenth of the processor time.
MEMORY_OPTIONS: Mapping[str, bool] = {"cpu_arena": False, "memory_pattern": False}
# A port's role is its name, but for the step graph's outputs, which are the next step's inputs.
_NEXT = ("latents", "x0_prev", "feature_ladder", "probe_ladder")
_ROLES = {f"next_{role}": role for role in _NEXT}
_BATCHED = ("text_encoder", "unet", "vae_decoder")


def ports(samples: Mapping[str, list[Sample]], *, dynamic_batch: bool) -> dict[str, Component]:
    """The components with their inputs and outputs, in the graphs' order, as the samples have them."""
    components = {}
    for name, cases in samples.items():
        free = dynamic_batch and name in _BATCHED
        sides = [
            tuple(_port(port, array, free) for port, array in arrays.items())
            for arrays in (cases[0].inputs, cases[0].outputs)
        ]
        components[name] = Component(name, PATHS[name], sides[0], sides[1])
    return components


def _port(name: str, array: Any, free: bool) -> Port:
    shape: tuple[int | str, ...] = tuple(int(size) for size in array.shape)
    if free and shape:
        shape = ("batch", *shape[1:])
    return Port(name, _ROLES.get(name, name), str(array.dtype), shape)


def backend_spec(profile: DeviceProfile, precision: str = "fp32") -> BackendSpec:
    """What runs the ONNX graphs there: OpenVINO where the profile asks for it, else ONNX Runtime with the profile's
    providers and their settings (a profile whose backend is Core ML runs its packages by that, and these as a spare).
    """
    group = INT4_GROUP if precision == "w4a8" else 0
    plug_in: Mapping[str, int | str] = {"inference_precision": "f32", "dynamic_quantization_group": group}
    providers = profile.backend.execution_providers
    openvino = profile.backend.name == "openvino"
    return BackendSpec(
        "openvino" if openvino else "onnxruntime",
        tuple(provider.name for provider in providers),
        {
            "intra_op_threads": profile.backend.threads,
            **(plug_in if openvino else MEMORY_OPTIONS),
        },
        {provider.name: dict(provider.options) for provider in providers if provider.options},
    )


def write_manifest(
    folder: Path,
    *,
    name: str,
    source: SourceModel,
    profile: DeviceProfile,
    plan: Plan,
    latent: tuple[int, int, int],
    tokenizer: TokenizerSpec,
    guidance: float,
    components: Mapping[str, Component],
    parity: Mapping[str, Mapping[str, float]],
    selftest: SelftestSpec,
    tools: Mapping[str, str],
    decoder: DecoderSpec | None = None,
    quality: Mapping[str, Any] | None = None,
    coreml: tuple[CoreMLPackage, ...] = (),
    prediction: PredictionSpec | None = None,
    preview: PreviewSpec | None = None,
) -> str:
    """Write manifest.json into the finished `folder`, return its digest; `latent` = rows, columns, downscale."""
    rows, columns, downscale = latent
    recipe, unet, vae = plan.recipe, source.pipeline.unet.config, source.pipeline.vae.config
    manifest = Manifest(
        name=name,
        created_by=dict(tools),
        source=Source(source.model, source.family, source.digest, source.licence, source.revision),
        profile=recipe.profile,
        precision=str(recipe.quantisation["precision"]),
        latent=LatentSpec(unet.in_channels, rows, columns, float(vae.scaling_factor), 0.0, downscale),
        image=ImageSpec(rows * downscale, columns * downscale),
        prediction_type=source.pipeline.scheduler.config.prediction_type,
        schedule=Schedule(
            recipe.sampler,
            recipe.scheduler_class,
            recipe.scheduler_digest,
            recipe.num_steps,
            recipe.timesteps,
            recipe.init_noise_sigma,
            sampler_rule(recipe.sampler).needs_x0_prev,
        ),
        guidance=Guidance(default=guidance, branches=sampler_rule(recipe.sampler).branches),
        tokenizer=tokenizer,
        components=dict(components),
        files=list_files(folder),
        backend=backend_spec(profile, str(recipe.quantisation["precision"])),
        parity=parity,
        selftest=selftest,
        decoder=decoder,
        quality=dict(quality or {}),
        coreml=coreml,
        prediction=prediction,
        preview=preview,
        additional_metadata=dict(source.notes),
    ).sealed()
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json_bytes())
    return manifest.digest
