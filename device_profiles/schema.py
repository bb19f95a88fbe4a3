"""The schema of a device profile: what a device can hold, compute and be expected to do.

In: the content of one TOML file. Out: a frozen `DeviceProfile`; its `model_dump(mode="json")` is the snapshot that a
plan and a manifest carry. Strict: no unknown keys, no silent conversions; every number names a source or says that it
is an estimate. It does not read files (catalogue.py does) and does not measure.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

SCHEMA_VERSION = "1.1"  # 1.1: backend.instruction_set; 1.0 still loads

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=64)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Label = Literal["measured", "published", "estimate"]
Precision = Literal["fp32", "fp16", "w8a16", "w8a8", "w6a16", "w4a16", "w4a8"]
StudentClass = Literal["phone-high", "phone-mid", "phone-low", "tablet", "pi", "desktop"]
Mib = Annotated[int, Field(gt=0, le=1 << 22)]

_PRECISION_NEEDS = {"fp16": "fp16", "w8a16": "int8", "w8a8": "int8", "w4a16": "int4", "w4a8": "int4"}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Strict):
    """Where numbers come from. `id` is what the other tables cite; a document without an address has only a title."""

    id: Name
    title: Text
    url: Annotated[str, StringConstraints(pattern=r"^https://\S+$")] | None = None


class Npu(_Strict):
    """Neural accelerators: how many, and their peak in TOPS where the maker publishes it (absent otherwise)."""

    name: Text | None = None
    count: Annotated[int, Field(ge=0, le=64)]
    tops: Annotated[float, Field(gt=0, le=10_000)] | None = None
    source: Name | None = None


class Memory(_Strict):
    """Memory in MiB. The ceiling is what one application may hold before the system ends it, with its derivation."""

    total_mib: Mib
    application_ceiling_mib: Mib
    ceiling_label: Label
    ceiling_derivation: Text
    ceiling_source: Name | None = None
    largest_file_mib: Mib
    largest_file_reason: Text

    @model_validator(mode="after")
    def _ceiling_fits(self) -> Self:
        if self.application_ceiling_mib > self.total_mib:
            raise ValueError(
                f"application_ceiling_mib is {self.application_ceiling_mib}, expected at most total_mib = "
                f"{self.total_mib}; lower the ceiling or correct the total"
            )
        return self


class Support(_Strict):
    """What the device computes. `static_shapes_only` decides between a static and a dynamic batch in the export."""

    fp16: bool
    int8: bool
    int4: bool
    static_shapes_only: bool
    denied_ops: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.]*$")], ...] = ()
    onnx_opset: Annotated[int, Field(ge=17, le=25)] | None = None
    coreml_deployment_target: Literal["iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15"] | None = None

    @model_validator(mode="after")
    def _some_target(self) -> Self:
        if self.onnx_opset is None and self.coreml_deployment_target is None:
            raise ValueError("neither onnx_opset nor coreml_deployment_target is given, expected at least one")
        return self


class ExecutionProvider(_Strict):
    """One ONNX Runtime execution provider by its full name, with its options (ONNX Runtime takes strings only)."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]+ExecutionProvider$")]
    options: dict[str, str] = {}


class Backend(_Strict):
    """What runs the graphs: providers in order of preference (what a bundle's ONNX graphs use), threads, units.

    threads: intra-op threads, 0 = let the backend choose. compute_units: Core ML only. instruction_set: the
    processor's, which decides how integer types are paired (u8 x s8 on x64, s8 x s8 on arm64).
    """

    name: Literal["onnxruntime", "openvino", "coreml"]
    execution_providers: Annotated[tuple[ExecutionProvider, ...], Field(min_length=1)]
    threads: Annotated[int, Field(ge=0, le=256)]
    compute_units: Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"] | None = None
    instruction_set: Literal["x64", "arm64"] = "arm64"

    @property
    def kernels(self) -> str:
        """The kernel set that ONNX graphs are laid out for: onnxruntime-x64, onnxruntime-arm or openvino."""
        if self.name == "openvino":
            return "openvino"
        return "onnxruntime-x64" if self.instruction_set == "x64" else "onnxruntime-arm"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.execution_providers[-1].name != "CPUExecutionProvider":
            raise ValueError(
                f"the last execution provider is {self.execution_providers[-1].name}, expected CPUExecutionProvider, "
                "because operators that the others refuse must run somewhere"
            )
        if (self.name == "coreml") != (self.compute_units is not None):
            raise ValueError(
                f"backend {self.name} with compute_units = {self.compute_units!r}, expected compute_units for coreml "
                "and for no other backend"
            )
        return self


class UNetTarget(_Strict):
    """How many parameters the device's U-Net should have, which limit decided it, and the calculation in words."""

    parameters: Annotated[int, Field(ge=100_000, le=20_000_000_000)]
    limited_by: Literal["memory", "storage", "latency"]
    derivation: Annotated[str, StringConstraints(min_length=20, max_length=2000)]


class Defaults(_Strict):
    """What a run uses unless told otherwise: image size in pixels for SD-sized models, steps, steps in the cloud."""

    height: Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
    width: Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
    num_steps: Annotated[int, Field(ge=1, le=1000)]
    split: Annotated[int, Field(ge=0, le=1000)]

    @model_validator(mode="after")
    def _split_in_run(self) -> Self:
        if self.split > self.num_steps:
            raise ValueError(f"split is {self.split}, expected 0..num_steps = {self.num_steps}")
        return self


class LatencyAnchor(_Strict):
    """One latency figure in ms. `device` is the hardware it holds for; `unet` is one call for one CFG branch."""

    component: Literal["unet", "vae_decoder", "text_encoder", "image"]
    model: Text
    precision: Precision
    ms: Annotated[float, Field(gt=0, le=1e9)]
    label: Label
    device: Text
    source: Name
    conditions: Text | None = None


class DeviceProfile(_Strict):
    """One device: who makes it, what it holds, how graphs run there, what is built for it, and the sources."""

    schema_version: Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
    name: Name
    title: Text
    aliases: tuple[Text, ...] = ()
    vendor: Text
    chipset: Text
    os: Text
    form_factor: Literal["phone", "tablet", "laptop", "desktop", "single-board"]
    student_class: StudentClass
    target_precision: Precision
    npu: Npu
    memory: Memory
    support: Support
    backend: Backend
    target_unet_parameters: UNetTarget
    defaults: Defaults
    latency: tuple[LatencyAnchor, ...] = ()
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _version_is_read(self) -> Self:
        if self.schema_version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(f"schema_version is {self.schema_version}, expected {SCHEMA_VERSION}; update latentrelay")
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        known = [source.id for source in self.sources]
        if len(set(known)) != len(known):
            raise ValueError(f"source ids are {known}, expected each once")
        cited = [anchor.source for anchor in self.latency]
        cited += [name for name in (self.npu.source, self.memory.ceiling_source) if name is not None]
        missing = sorted(set(cited) - set(known))
        if missing:
            raise ValueError(f"sources {missing} are cited but not listed, expected among {sorted(known)}")
        if self.npu.tops is not None and self.npu.source is None:
            raise ValueError(f"npu.tops is {self.npu.tops} without npu.source, expected the id of its source")
        return self

    @model_validator(mode="after")
    def _precision_is_supported(self) -> Self:
        need = _PRECISION_NEEDS.get(self.target_precision)
        if need is not None and not getattr(self.support, need):
            raise ValueError(
                f"target_precision is {self.target_precision} but support.{need} is false; "
                "choose a precision that the device computes"
            )
        return self

    def latency_ms(self, component: str) -> float | None:
        """The profile's first figure for a component in ms (files list the one to plan with first), or None."""
        return next((anchor.ms for anchor in self.latency if anchor.component == component), None)

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this profile's name or one of its aliases; case, spaces and underscores do not matter."""
        return normalised(name) in {normalised(self.name), *(normalised(alias) for alias in self.aliases)}


def normalised(name: str) -> str:
    """A device name as it is compared: lower case, runs of spaces, underscores and hyphens as one hyphen."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower())
