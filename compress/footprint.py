"""What a bundle of a pipeline takes: parameters, bytes, files, and the peak memory of the process that runs it.

In: a `Geometry` (configurations only). Out: a `Footprint`, in seconds and without a weight. Peak memory is the resident
set (VmHWM on Linux) of one fresh process that opens the bundle and makes one picture by the runtime's own order: text
encoder, released; all steps, released; decoder. It is the largest of the three stages, each
baseline + resident weights + activations. The constants are fitted on ONNX Runtime 1.32's CPU provider in float32,
which is what a build writes; other precisions and other providers are estimates and say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from latentrelay.compress.activation_memory import Operation, peak_bytes, record
from latentrelay.compress.errors import CompressError
from latentrelay.compress.geometry import Geometry
from torch import Tensor, nn

MIB = 2**20
CALIBRATED = "fp32"
BRANCHES = 2  # unconditional and conditional
INLINE_LIMIT = 1_500_000_000  # bytes: larger graphs keep their weights in a file of their own, as the export does

GRAPH_BYTES = 4_000_000  # graphs without weights, tokenizer, plan, manifest
SELFTEST_LATENTS, SELFTEST_STATES = 12, 4  # latents and text states in selftest.safetensors

# Bytes a weight, quantisation scales included (one float16 per 32 weights at 4 bits).
WEIGHT_BYTES: Mapping[str, float] = MappingProxyType(
    {"fp32": 4.0, "fp16": 2.0, "w8a16": 1.02, "w8a8": 1.02, "w6a16": 0.77, "w4a16": 0.57, "w4a8": 0.57}
)
# Bytes an activation. Eight-bit graphs on a CPU still normalise and attend in float32.
ACTIVATION_BYTES: Mapping[str, float] = MappingProxyType(
    {"fp32": 4.0, "fp16": 2.0, "w8a16": 2.0, "w8a8": 4.0, "w6a16": 2.0, "w4a16": 2.0, "w4a8": 4.0}
)


@dataclass(frozen=True)
class MemoryRules:
    """How a process's memory follows from weights and activations; the ratios are measured (docs/measured/footprint).

    session_options: the manifest's, for which they hold. baseline_mib: interpreter, libraries, tokenizer. external:
    resident weights over their bytes where they stand in a file of their own. inline_convolutions, inline_others: the
    same inside the graph, where ONNX Runtime holds convolutions a second time. unet_calls: activations over the plan's
    peak in the first call and in later ones. decoder_call: the same for the decoder's one call.
    """

    session_options: Mapping[str, bool]
    baseline_mib: float
    external: float
    inline_convolutions: float
    inline_others: float
    unet_calls: tuple[float, float]
    decoder_call: float


# ONNX Runtime's defaults: from the second call on it takes one block for the whole plan, beside the first's arena.
WITH_ARENA = MemoryRules(MappingProxyType({}), 80.0, 1.03, 2.85, 1.05, (1.06, 2.1), 1.72)
# Session options cpu_arena and memory_pattern off: buffers are taken from the system and given back.
_NONE = MappingProxyType({"cpu_arena": False, "memory_pattern": False})
WITHOUT_ARENA = MemoryRules(_NONE, 80.0, 1.03, 2.1, 1.05, (1.06, 1.06), 1.3)
# What the manifests of today's builds ask for.
RULES = WITHOUT_ARENA


@dataclass(frozen=True)
class Stage:
    """One component of a run. Bytes but for `peak_mib`, the whole process's while this stage runs.

    largest_weight: the largest single tensor, which is held twice while a graph with its weights inside is read.
    largest_activation: the largest buffer, in words.
    """

    name: str
    parameters: int
    weight_bytes: int
    resident_bytes: int
    largest_weight: int
    activation_bytes: int
    largest_activation: str
    peak_mib: float


@dataclass(frozen=True)
class Footprint:
    """What a bundle takes. `parameters` are the U-Net's, as in the profiles; `bytes` all files of the bundle.

    limiting_stage: the stage whose peak is the process's. calibrated: whether the figures were fitted to measurements
    at this precision, or are an estimate.
    """

    precision: str
    calibrated: bool
    parameters: int
    all_parameters: int
    bytes: int
    largest_file: str
    largest_file_bytes: int
    peak_memory_mib: float
    limiting_stage: str
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """A stage by name: text_encoder, steps or vae_decoder."""
        return next(each for each in self.stages if each.name == name)


class FootprintError(CompressError):
    """A footprint was asked for at a precision that is not known."""

    exit_status = 2


class _Decode(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Any:
        return self.vae.decode(latents, return_dict=False)[0]  # type: ignore[operator]


@dataclass(frozen=True)
class _Kind:
    """A stage's place in the bundle and in the run."""

    name: str
    file: str
    external: bool
    calls: int


def footprint(
    geometry: Geometry, precision: str = CALIBRATED, *, rules: MemoryRules = RULES, num_steps: int = 25
) -> Footprint:
    """The footprint of the bundle that an export of this geometry makes.

    Raises FootprintError for a precision that is not known, GeometryError for a configuration that is not served.
    """
    if precision not in WEIGHT_BYTES:
        raise FootprintError("no such precision", got=precision, expected=" | ".join(WEIGHT_BYTES))
    unet, vae, text = geometry.build_unet(), geometry.build_vae(), geometry.build_text_encoder()
    latents = torch.empty(1, int(geometry.unet["in_channels"]), geometry.rows, geometry.columns, device="meta")
    states = torch.empty(BRANCHES, geometry.tokens, int(geometry.text_encoder["hidden_size"]), device="meta")
    ids = torch.zeros(1, geometry.tokens, dtype=torch.int64, device="meta")
    time = torch.tensor(1.0, device="meta")
    decoding = [part for name in ("decoder", "post_quant_conv") if (part := getattr(vae, name, None)) is not None]
    kinds = (
        (_Kind("text_encoder", "text_encoder/model.onnx", False, BRANCHES), [text], record(text, ids)),
        (
            _Kind("steps", "unet/model.onnx_data", True, num_steps),
            [unet],
            record(unet, latents.expand(2, -1, -1, -1), time, states),
        ),
        (_Kind("vae_decoder", "vae_decoder/model.onnx", False, 1), decoding, record(_Decode(vae), latents)),
    )
    stages = tuple(_stage(kind, modules, operations, precision, rules) for kind, modules, operations in kinds)
    files = {kind.file: stage.weight_bytes for (kind, _, _), stage in zip(kinds, stages, strict=True)}
    largest = max(files, key=lambda name: files[name])
    limiting = max(stages, key=lambda stage: stage.peak_mib)
    return Footprint(
        precision=precision,
        calibrated=precision == CALIBRATED,
        parameters=stages[1].parameters,
        all_parameters=sum(stage.parameters for stage in stages),
        bytes=sum(files.values()) + _other_bytes(geometry),
        largest_file=largest,
        largest_file_bytes=files[largest],
        peak_memory_mib=limiting.peak_mib,
        limiting_stage=limiting.name,
        stages=stages,
    )


def unet_stage(
    geometry: Geometry, unet: nn.Module, precision: str = CALIBRATED, *, rules: MemoryRules = RULES, num_steps: int = 25
) -> Stage:
    """The stage of the steps alone, for a U-Net at hand (meta device or not)."""
    latents = torch.empty(BRANCHES, int(geometry.unet["in_channels"]), geometry.rows, geometry.columns, device="meta")
    states = torch.empty(BRANCHES, geometry.tokens, int(geometry.text_encoder["hidden_size"]), device="meta")
    operations = record(unet, latents, torch.tensor(1.0, device="meta"), states)
    kind = _Kind("steps", "unet/model.onnx_data", True, num_steps)
    return _stage(kind, [unet], operations, precision, rules)


def _stage(
    kind: _Kind, modules: Sequence[nn.Module], operations: Sequence[Operation], precision: str, rules: MemoryRules
) -> Stage:
    convolutions = others = largest = 0
    for module in modules:
        for part in module.modules():
            own = [parameter.numel() for parameter in part.parameters(recurse=False)]
            largest = max([largest, *own])
            if isinstance(part, nn.Conv2d):
                convolutions += sum(own)
            else:
                others += sum(own)
    each = WEIGHT_BYTES[precision]
    weights = (convolutions + others) * each
    inline = not kind.external and weights <= INLINE_LIMIT
    resident = weights * rules.external
    reading = 0.0
    if inline:
        resident = (convolutions * rules.inline_convolutions + others * rules.inline_others) * each
        reading = max(0.0, weights + largest * each - resident)
    planned = peak_bytes(operations, 1) * ACTIVATION_BYTES[precision]
    ratio = rules.decoder_call if kind.name == "vae_decoder" else rules.unet_calls[kind.calls > 1]
    peak = resident + max(reading, planned * ratio)
    return Stage(
        kind.name,
        convolutions + others,
        int(weights),
        int(resident),
        int(largest * each),
        int(planned * ratio),
        _largest(operations, ACTIVATION_BYTES[precision]),
        round(rules.baseline_mib + peak / MIB, 1),
    )


def _largest(operations: Sequence[Operation], bytes_each: float) -> str:
    largest = max(operations, key=lambda operation: math.prod(operation.shape))
    shape = " x ".join(map(str, largest.shape))
    kind = {"scores": "attention scores"}.get(largest.kind, largest.kind.replace("_", " "))
    return f"{kind} {shape}, {math.prod(largest.shape) * bytes_each / MIB:.0f} MiB"


def _other_bytes(geometry: Geometry) -> int:
    """Everything but weights: the graphs' nodes, tokenizer, configuration, and the self-test's samples."""
    latents = int(geometry.unet["in_channels"]) * geometry.rows * geometry.columns
    picture = 3 * geometry.rows * geometry.columns * geometry.downscale**2
    states = geometry.tokens * int(geometry.text_encoder["hidden_size"])
    return GRAPH_BYTES + 4 * (SELFTEST_LATENTS * latents + picture + SELFTEST_STATES * states)
