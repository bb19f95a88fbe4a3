"""Compressed weights and activations in a Core ML package: which encodings there are, and which a precision asks for.

Weights are compressed in the converted program by coremltools (`compress`), by layer where a recipe's rules say so.
Activations are quantised in torch before conversion (`quantise_inputs`): coremltools' own calibration runs the model,
which needs a Mac, while our ranges come from recorded runs. An encoding that the deployment target lacks is refused by
the name of its operator, before anything is converted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from latentrelay.compress.precision import LayerRule
from latentrelay.export.coreml_convert import target_of
from latentrelay.export.coremltools_import import coremltools, quiet
from latentrelay.export.errors import ConversionError, DeploymentTargetError
from torch import Tensor, nn

Range = tuple[float, float]
SMALLEST = 2048  # weights of fewer elements stay float16: their tables would be as large as they are


@dataclass(frozen=True)
class Encoding:
    """How weights are stored: `bits` each, as a linear scale (`block`: weights along the input that share one, 0: all
    of an output channel) or as a palette (`block`: output channels that share one, 0: all of the tensor)."""

    kind: Literal["linear", "palette"]
    bits: int
    block: int = 0

    @property
    def needs(self) -> str:
        """The first deployment target that has it."""
        return "iOS18" if (self.kind == "linear" and self.bits < 8) or self.block else "iOS16"

    @property
    def operator(self) -> str:
        """The operator that expands it on the device."""
        if self.kind == "palette":
            return "constexpr_lut_to_dense"
        return "constexpr_blockwise_shift_scale" if self.needs == "iOS18" else "constexpr_affine_dequantize"


ENCODINGS: Mapping[str, Encoding] = {
    "linear8": Encoding("linear", 8),
    "linear4_block32": Encoding("linear", 4, 32),
    "palette8": Encoding("palette", 8),
    "palette6": Encoding("palette", 6),
    "palette4": Encoding("palette", 4),
    "palette4_group16": Encoding("palette", 4, 16),
}
# What a bundle's precision asks for. Encodings that no precision names are chosen by name.
WEIGHTS_OF: Mapping[str, str | None] = {
    "fp32": None,
    "fp16": None,
    "w8a16": "linear8",
    "w8a8": "linear8",
    "w4a16": "linear4_block32",
    "w4a8": "linear4_block32",
}
ACTIVATIONS_NEED = "iOS17"  # `quantize` and `dequantize`


def check_target(precision: str, encoding: str | None, target: str) -> None:
    """Raise DeploymentTargetError, naming the operator and the precision, where `target` lacks what they need."""
    wanted = target_of(target)
    if encoding is not None:
        found = ENCODINGS[encoding]
        if wanted < target_of(found.needs):
            raise DeploymentTargetError(
                found.operator, f"{precision}, weights {encoding}", target=target, needs=found.needs
            )
    if precision.endswith("a8") and wanted < target_of(ACTIVATIONS_NEED):
        raise DeploymentTargetError("quantize", f"{precision}, activations", target=target, needs=ACTIVATIONS_NEED)


def compress(
    model: Any, encoding: str | None, rules: Mapping[str, LayerRule] | None = None, prefix: str = "unet_unet_"
) -> Any:
    """`model` (a coremltools MLModel) with compressed weights.

    Without `rules`, every weight of SMALLEST elements or more takes `encoding`. With them (by module path, `prefix`
    being where the network stands in the converted module), each layer takes its own: "int8" per output channel, "int4"
    as `encoding` where that has 4 bits, else in blocks of the rule's group; float layers and what no rule names stay
    float16. Raises ConversionError for a rule whose layer is not in the program.
    """
    if encoding is None and not rules:
        return model
    chosen: dict[Encoding, list[str] | None] = {}
    if rules is None:
        if encoding is not None:
            chosen[ENCODINGS[encoding]] = None
    else:
        names = _weight_names(model)
        for path, rule in rules.items():
            stored = _encoding_of(path, rule, encoding)
            if stored is not None:
                chosen.setdefault(stored, []).append(_weight_of(path, prefix, names))  # type: ignore[union-attr]
    for stored, weights in chosen.items():
        model = _compressed(model, stored, weights)
    return model


def _encoding_of(path: str, rule: LayerRule, encoding: str | None) -> Encoding | None:
    if rule.rank:
        raise ConversionError(f"{path}: a low-rank branch of rank {rule.rank} has no Core ML form", do="Use rank 0.")
    if rule.weights == "int8":
        return ENCODINGS["linear8"]
    if rule.weights != "int4":
        return None
    if encoding is not None and ENCODINGS[encoding].bits == 4:
        return ENCODINGS[encoding]
    return Encoding("linear", 4, rule.group or 32)


def _compressed(model: Any, encoding: Encoding, weights: list[str] | None) -> Any:
    """One pass of coremltools over all weights, or over the constants named."""
    optimize = coremltools.optimize.coreml
    if encoding.kind == "palette":
        settings: Any = optimize.OpPalettizerConfig(
            mode="kmeans",
            nbits=encoding.bits,
            granularity="per_grouped_channel" if encoding.block else "per_tensor",
            group_size=encoding.block or 32,
            weight_threshold=SMALLEST,
        )
        run = optimize.palettize_weights
    else:
        settings = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric",
            dtype="int8" if encoding.bits == 8 else "int4",
            granularity="per_block" if encoding.block else "per_channel",
            block_size=encoding.block or 32,
            weight_threshold=SMALLEST,
        )
        run = optimize.linear_quantize_weights
    plan = optimize.OptimizationConfig(global_config=settings if weights is None else None)
    for name in weights or ():
        plan.set_op_name(name, settings)
    with quiet():
        return run(model, plan)


def _weight_names(model: Any) -> set[str]:
    functions = model.get_spec().mlProgram.functions["main"].block_specializations
    return {op.outputs[0].name for block in functions.values() for op in block.operations if op.type == "const"}


def _weight_of(path: str, prefix: str, names: set[str]) -> str:
    stem = prefix + path.replace(".", "_") + "_weight"
    for name in (f"{stem}_to_fp16", stem):
        if name in names:
            return name
    raise ConversionError(
        f"the recipe has a rule for {path}, whose weight is not in the Core ML program",
        got=stem,
        do="Make the recipe from this network.",
    )


@contextlib.contextmanager
def quantise_inputs(
    network: nn.Module, ranges: Mapping[str, Range], rules: Mapping[str, LayerRule] | None = None
) -> Iterator[None]:
    """Inside, every convolution and linear of `network` takes its input rounded to int8, symmetric about zero.

    `ranges`: module path -> lowest and highest input. Layers whose rule computes in float are left alone. Raises
    ConversionError naming a layer without a range.
    """
    hooks = []
    try:
        for path, module in network.named_modules():
            if not isinstance(module, nn.Conv2d | nn.Linear) or (rules is not None and not _integer(rules.get(path))):
                continue
            if path not in ranges:
                raise ConversionError(f"{path} has no activation range", do="Record ranges on this network.")
            low, high = ranges[path]
            hooks.append(module.register_forward_pre_hook(_Rounding(max(abs(low), abs(high)) / 127.0)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _integer(rule: LayerRule | None) -> bool:
    return rule is not None and rule.integer


class _Rounding:
    """A forward pre-hook: its module's first argument through `quantize` and `dequantize`."""

    def __init__(self, scale: float) -> None:
        self.scale = scale if scale > 0.0 else 1.0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        steps = torch.quantize_per_tensor(arguments[0], self.scale, 0, torch.qint8)
        return (steps.dequantize(), *arguments[1:])


def input_ranges(network: nn.Module, calls: Any) -> dict[str, Range]:
    """Lowest and highest input of every convolution and linear while `calls()` runs the network in torch."""
    found: dict[str, Range] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            low, high = arguments[0].min().item(), arguments[0].max().item()
            before = found.get(path, (low, high))
            found[path] = (min(before[0], low), max(before[1], high))

        return hook

    layers = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_pre_hook(note(path)) for path, module in layers]
    try:
        with torch.no_grad():
            calls()
    finally:
        for hook in hooks:
            hook.remove()
    return found
