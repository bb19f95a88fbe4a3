"""manifest.json: what a bundle is, file by file. Frozen dataclasses, a strict parser, and the digest.

The export writes with `Manifest.to_json_bytes()`, the runtime reads with `Manifest.from_json_bytes()`. Unknown keys are
errors that name them; what a producer wants to add goes under `additional_metadata`. `digest` is the digest of the
canonical form of everything else, so one altered character shows.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrelay.runtime.digest import json_digest
from latentrelay.runtime.errors import BundleLayoutError, BundleTamperedError, ManifestError
from latentrelay.runtime.prediction_check import NORMAL, check_predicted_steps
from latentrelay.runtime.samplers import SAMPLERS
from latentrelay.runtime.strict_json import check_schema_version, parse_record, read_json, record_to_json

MANIFEST_NAME = "manifest.json"
# 1.1: one guidance branch, the `noise` input, `decoder`. 1.2: precision by component, provider options, a self-test's
# tolerance by component, Core ML packages. 1.3: predicted steps. 1.4: masks by level, the preview's factors. Older ones
# still load.
SCHEMA_VERSION = "1.4"
MAX_MANIFEST_BYTES = 4 * 2**20
REQUIRED_COMPONENTS = ("text_encoder", "step_full", "vae_decoder")
DTYPES = ("float32", "float16", "int64", "int32")


@dataclass(frozen=True)
class Source:
    """The pipeline that the bundle was made from; `digest` is its model digest, "sha256:<hex>"."""

    model: str
    family: str
    digest: str
    licence: str
    revision: str | None = None


@dataclass(frozen=True)
class LatentSpec:
    """Latent geometry: channels, rows, columns, the VAE's scaling and shift, pixels per latent row."""

    channels: int
    height: int
    width: int
    scaling_factor: float
    shift_factor: float
    downscale: int


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder in the place of the source's own: its class, its weights' digest ("sha256:<hex>"), and the scaling and
    shift of the latents that *it* takes. `LatentSpec` stays the source's: that is what travels between machines."""

    class_name: str
    digest: str
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class ImageSpec:
    """Picture size in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Schedule:
    """The run that is baked into the step graph; `timesteps` has one entry a step, the first step first."""

    sampler: str
    scheduler_class: str
    scheduler_digest: str
    num_steps: int
    timesteps: tuple[float, ...]
    init_noise_sigma: float
    needs_x0_prev: bool


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: the default scale and the number of branches (2: unconditional, conditional).

    With one branch the step graph takes the conditional states alone: guidance is in the network and the scale is 1.
    """

    default: float
    branches: int = 2


@dataclass(frozen=True)
class TokenizerSpec:
    """Where tokenizer.json lies and how prompts are cut and padded to `max_length` ids."""

    path: str
    max_length: int
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: its name there, its role in the loop, dtype, shape (strings: dynamic axes)."""

    name: str
    role: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """One graph of the bundle; `precision` where it is not the bundle's own."""

    role: str
    path: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str | None = None


@dataclass(frozen=True)
class CoreMLPackage:
    """One .mlpackage folder of the bundle, or one of the parts that a component was cut into (`part` from 1, run in
    order, each taking the outputs of the one before by name). `parity_db` is its whole component's, against torch."""

    role: str
    path: str
    bytes: int
    precision: str
    parity_db: float
    deployment_target: str
    compute_units: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    part: int = 1
    parts: int = 1


@dataclass(frozen=True)
class FileEntry:
    """One file: POSIX path inside the bundle, size, bare hex sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BackendSpec:
    """What runs the graphs: backend name, execution providers in order of preference, session options, and the
    options of each provider by its name."""

    name: str
    providers: tuple[str, ...]
    session_options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class SelftestSpec:
    """Sample inputs and expected outputs; a device passes when every component reaches `tolerance_db` SNR, or its own
    in `tolerances`."""

    path: str
    tolerance_db: float
    tolerances: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMask:
    """One split whose run has predicted steps: "full" or "predicted" for each device step split .. N-1, and the row of
    the mask-dependent tables that its graphs read. `level` "normal", or "hot": another mask for the same split with
    fewer computed steps, for a device that must give off less heat."""

    split: int
    row: int
    mask: tuple[str, ...]
    level: str = NORMAL


@dataclass(frozen=True)
class PredictionSpec:
    """Which steps the device predicts instead of computing them, and what its loop must keep between steps.

    `target` "whole_output" (the network's output is predicted) or "deep_feature" (its deep part's); `probe` and
    `metric` where the predictor is chosen by token; `feature_shape` and `probe_shape` (rungs, 2, channels, rows,
    columns) of the ladders, in `ladder_dtype`. A run from a split without a mask computes every step, with row 0.
    Where a predicted step's probe_error exceeds `fallback_threshold` it is computed after all; None: never.
    """

    target: str
    feature_shape: tuple[int, ...]
    masks: tuple[StepMask, ...]
    ladder_dtype: str = "float32"
    probe: str | None = None
    metric: str | None = None
    probe_shape: tuple[int, ...] | None = None
    fallback_threshold: float | None = None

    def mask(self, split: int, level: str = NORMAL) -> StepMask | None:
        """What a run from `split` follows: the mask of that level, in the place of a hot one that is not there the
        normal one, and None where every step is computed. Its `level` says which it is."""
        found = {mask.level: mask for mask in self.masks if mask.split == split}
        return found.get(level) or found.get(NORMAL)


@dataclass(frozen=True)
class PreviewSpec:
    """A linear picture of latents: RGB in 0..1 of a latent pixel is `factors @ latent + bias`, to be clipped.

    `factors` 3 rows (red, green, blue) of C, `bias` 3. They take latents as `run_steps` yields them and a handoff
    carries them: before division by `LatentSpec.scaling_factor`, and with no decoder's scaling or shift. Fitted on
    finished latents; of a step in the run's middle, x0_prev is nearer to those than the noisy latents are.
    """

    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """The whole manifest. Build one without `digest`, then `sealed()` fills it in."""

    name: str
    created_by: Mapping[str, str]
    source: Source
    profile: Mapping[str, Any]
    precision: str
    latent: LatentSpec
    image: ImageSpec
    prediction_type: str
    schedule: Schedule
    guidance: Guidance
    tokenizer: TokenizerSpec
    components: Mapping[str, Component]
    files: tuple[FileEntry, ...]
    backend: BackendSpec
    parity: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    selftest: SelftestSpec | None = None
    decoder: DecoderSpec | None = None
    coreml: tuple[CoreMLPackage, ...] = ()
    prediction: PredictionSpec | None = None
    preview: PreviewSpec | None = None
    additional_metadata: Mapping[str, Any] = field(default_factory=dict)
    schema_version: str = SCHEMA_VERSION
    digest: str = ""

    @property
    def decoder_scaling(self) -> tuple[float, float]:
        """Scaling and shift of the bundle's own decoder: it takes latents / scaling + shift."""
        spec = self.decoder or self.latent
        return spec.scaling_factor, spec.shift_factor

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        document: dict[str, Any] = record_to_json(self)
        return document

    def sealed(self) -> Manifest:
        """The same manifest with its digest filled in; raises ManifestError if the manifest contradicts itself."""
        document = self.to_dict()
        try:
            digest = manifest_digest(document)
        except (TypeError, ValueError) as error:
            raise ManifestError(
                f"the manifest cannot be written as JSON: {error}", do="Write finite numbers, strings, lists, objects."
            ) from error
        return Manifest.from_dict({**document, "digest": digest})

    def to_json_bytes(self) -> bytes:
        """What to write to manifest.json: indented for people, a newline at the end."""
        text = json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()

    @classmethod
    def from_dict(cls, document: Any) -> Manifest:
        """Parse and check the JSON form: ManifestError, BundleLayoutError (paths), BundleTamperedError (digest)."""
        try:
            if isinstance(document, dict):
                check_schema_version(document.get("schema_version"))
            manifest = parse_record(cls, document)
            if manifest.digest != manifest_digest(document):
                raise BundleTamperedError(
                    "the manifest's own digest differs from its content",
                    path=MANIFEST_NAME,
                    got=manifest_digest(document),
                    expected=manifest.digest or "a digest",
                    do="Fetch the bundle again, or build it again.",
                )
            _check(manifest)
        except ValueError as error:
            raise ManifestError(
                f"{MANIFEST_NAME} does not follow the schema: {error}",
                path=MANIFEST_NAME,
                do="Build the bundle again with this version of latentrelay.",
            ) from error
        return manifest

    @classmethod
    def from_json_bytes(cls, text: bytes) -> Manifest:
        """Parse manifest.json's bytes; errors as in `from_dict`."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise ManifestError(
                f"{MANIFEST_NAME} is too large", path=MANIFEST_NAME, got=len(text), expected=f"<= {MAX_MANIFEST_BYTES}"
            )
        try:
            document = read_json(text)
        except ValueError as error:
            raise ManifestError(
                f"{MANIFEST_NAME} is not valid JSON: {error}", path=MANIFEST_NAME, do="Fetch the bundle again."
            ) from error
        return cls.from_dict(document)


def manifest_digest(document: Mapping[str, Any]) -> str:
    """ "sha256:<hex>" of the JSON form without its `digest`."""
    return json_digest({key: value for key, value in document.items() if key != "digest"})


def check_path(path: str) -> str:
    """Return a bundle-relative POSIX path that cannot leave the bundle; raises BundleLayoutError otherwise."""
    bad = "\\" in path or ":" in path or any(ord(char) < 32 for char in path) or len(path) > 240
    if bad or any(part in ("", ".", "..") for part in path.split("/")):
        raise BundleLayoutError(
            "a path in the manifest could leave the bundle",
            path=path,
            got=repr(path),
            expected="a relative path with '/' and without '..'",
            do="Do not use this bundle.",
        )
    return path


def _check(manifest: Manifest) -> None:
    listed = [check_path(entry.path) for entry in manifest.files]
    if len({path.casefold() for path in listed}) != len(listed):
        raise ValueError("files: a path is listed twice (or differs only in case)")
    if MANIFEST_NAME in listed:
        raise ValueError(f"files: {MANIFEST_NAME} lists itself")
    for entry in manifest.files:
        if entry.bytes < 0 or len(entry.sha256) != 64 or not set(entry.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"files: {entry.path} needs bytes >= 0 and a lower-case hex sha256")
    used = [component.path for component in manifest.components.values()] + [manifest.tokenizer.path]
    used += [manifest.selftest.path] if manifest.selftest else []
    for path in used:
        if check_path(path) not in listed:
            raise ValueError(f"{path} is used but not listed under files")
    for package in manifest.coreml:
        if not any(path.startswith(check_path(package.path) + "/") for path in listed):
            raise ValueError(f"{package.path} is used but no file below it is listed under files")
        if not 1 <= package.part <= package.parts:
            raise ValueError(f"coreml: {package.path} is part {package.part} of {package.parts}")
    _check_numbers(manifest)


def _check_numbers(manifest: Manifest) -> None:
    latent, image, schedule, tokenizer = manifest.latent, manifest.image, manifest.schedule, manifest.tokenizer
    if (image.height, image.width) != (latent.height * latent.downscale, latent.width * latent.downscale):
        raise ValueError(f"image: got {image.height}x{image.width}, expected latent size times latent.downscale")
    if min(latent.channels, latent.height, latent.width, latent.downscale) < 1 or latent.scaling_factor == 0:
        raise ValueError("latent: sizes must be positive and scaling_factor not 0")
    if manifest.decoder is not None and manifest.decoder.scaling_factor == 0:
        raise ValueError("decoder.scaling_factor: got 0, expected another number")
    if schedule.num_steps < 1 or len(schedule.timesteps) != schedule.num_steps:
        raise ValueError(
            f"schedule: got {len(schedule.timesteps)} timesteps, expected num_steps = {schedule.num_steps}"
        )
    if schedule.sampler not in SAMPLERS:
        raise ValueError(f"schedule.sampler: got {schedule.sampler}, expected {' | '.join(SAMPLERS)}")
    if manifest.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type: got {manifest.prediction_type}, expected epsilon | v_prediction")
    branches = SAMPLERS[schedule.sampler].branches
    if manifest.guidance.branches != branches:
        raise ValueError(
            f"guidance.branches: got {manifest.guidance.branches}, expected {branches} with {schedule.sampler}"
        )
    if branches == 1 and manifest.guidance.default != 1.0:
        raise ValueError(f"guidance.default: got {manifest.guidance.default}, expected 1 with one branch")
    if tokenizer.max_length < 2 or min(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) < 0:
        raise ValueError("tokenizer: max_length must be at least 2 and ids not negative")
    missing = [name for name in REQUIRED_COMPONENTS if name not in manifest.components]
    if missing:
        raise ValueError(f"components: {missing[0]} is missing")
    for name, component in manifest.components.items():
        for port in component.inputs + component.outputs:
            if port.dtype not in DTYPES:
                raise ValueError(
                    f"components.{name}.{port.name}: got dtype {port.dtype}, expected {' | '.join(DTYPES)}"
                )
    check_predicted_steps(manifest)
    if manifest.preview is not None:
        _check_preview(manifest.preview, latent.channels)


def _check_preview(preview: PreviewSpec, channels: int) -> None:
    shape, bias = [len(row) for row in preview.factors], preview.bias
    if shape != [channels] * 3 or len(bias) != 3:
        raise ValueError(
            f"preview: got factors with rows of {shape} and {len(bias)} in bias, expected 3 of {channels}, and 3"
        )
    if not all(math.isfinite(value) for row in (*preview.factors, bias) for value in row):
        raise ValueError("preview holds NaN or Inf, expected finite numbers")


def replace_files(manifest: Manifest, files: tuple[FileEntry, ...]) -> Manifest:
    """A sealed copy with another file list, for a writer that adds files last."""
    return dataclasses.replace(manifest, files=files, digest="").sealed()
