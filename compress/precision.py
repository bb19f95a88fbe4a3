"""What every layer of a U-Net is computed in: a plain function of the layer, the precision and the kernels.

In: `Layer` records (read off the exported graph by export/layers.py). Out: a `PrecisionRecipe`, one `LayerRule` per
layer, which goes into the Plan as data. Nothing here measures: layers that a measurement wants in float are an
argument. The time-embedding path and the first and last convolution compute in float wherever activations are
quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from latentrelay.compress.errors import PrecisionError

PRECISIONS = ("fp32", "fp16", "w8a16", "w8a8", "w4a16", "w4a8")
SIMULATED = ("w4a4",)  # no CPU runs it; reports show it as a simulation
KERNELS = ("onnxruntime-x64", "onnxruntime-arm", "openvino", "coreml")
INT4_GROUP = 32  # weights that share a scale; what 4-bit kernels take everywhere

Kind = Literal["conv", "linear"]
Role = Literal["time", "first", "last", "body"]

_ORT = {
    "fp32": "Everything float32.",
    "fp16": "Weights stored in float16 and widened when the session opens; computed in float32.",
    "w8a16": "Linears int8 in groups of 32 to 128 (MatMulNBits), convolutions int8 per output channel, widened in "
    "front; computed in float32.",
    "w8a8": "",  # by architecture, below
    "w4a16": "Linears int4 in groups of 32 (MatMulNBits), convolutions int8, widened in front (int4 runs too: a fifth "
    "fewer bytes, ten dB less on the reference); computed in float32.",
    "w4a8": "",
}
MEANING: Mapping[tuple[str, str], str] = {
    **{(precision, kernels): words for kernels in KERNELS[:2] for precision, words in _ORT.items()},
    (
        "w8a8",
        "onnxruntime-x64",
    ): "Convolutions and linears u8 x s8 with static scales, weights per output channel.",
    (
        "w8a8",
        "onnxruntime-arm",
    ): "Convolutions and linears s8 x s8 with static scales, weights per output channel.",
    ("w4a8", "onnxruntime-x64"): "Linears int4 in groups of 32 at accuracy level 4; convolutions u8 x s8, static.",
    ("w4a8", "onnxruntime-arm"): "Linears int4 in groups of 32 at accuracy level 4; convolutions s8 x s8, static.",
    ("fp32", "openvino"): "Everything float32 in the file; the plug-in may compute in bf16 when it is told to.",
    ("fp16", "openvino"): "Weights stored in float16; computed in what the plug-in is told to (float32 or bf16).",
    ("w8a16", "openvino"): "Weights int8 per output channel, widened inside the kernels; computed in float32 or bf16.",
    ("w8a8", "openvino"): "Convolutions and linears u8 x s8, static, quantised at their inputs only; attention too.",
    ("w4a16", "openvino"): "Linears int4 in groups of 32, computed in float; convolutions int8, widened.",
    ("w4a8", "openvino"): "Linears int4 in groups of 32 with activations quantised as they come; convolutions u8 x s8.",
    ("fp32", "coreml"): "Everything float32; the Neural Engine is not used.",
    ("fp16", "coreml"): "Float16; the step's tables, solver and timestep sine float32.",
    ("w8a16", "coreml"): "Weights int8 per output channel; computed in float16 (iOS 16).",
    ("w8a8", "coreml"): "Weights int8 per output channel, activations int8 per tensor, symmetric, static (iOS 17).",
    ("w4a16", "coreml"): "Weights int4 in blocks of 32; computed in float16 (iOS 18).",
    ("w4a8", "coreml"): "As w4a16, activations int8 per tensor, symmetric, static (iOS 18).",
}
"""(precision, kernels) -> what it means there, in one sentence."""


@dataclass(frozen=True)
class Layer:
    """One convolution or linear with constant weights.

    `name`: torch module path in the U-Net ("down_blocks.0.resnets.0.conv1"); `shape`: (out, in) or (out, in, kh, kw),
    torch's order whatever the file's; `macs`: multiply-adds of one call at batch 1; `role`: where it stands.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    macs: int
    role: Role


@dataclass(frozen=True)
class LayerRule:
    """How one layer is stored and computed.

    `activations` "float32"/"float16": computed in float; "uint8"/"int8": static scale; "dynamic": int8, scaled as they
    come. `group`: weights along the input that share a scale, 0: all of an output channel. `rank`: of the float branch
    beside the quantised weights, 0: none. `reason`: why, where it is not the precision's plain rule.
    """

    weights: Literal["float32", "float16", "int8", "int4"] = "float32"
    activations: Literal["float32", "float16", "uint8", "int8", "dynamic"] = "float32"
    group: int = 0
    rank: int = 0
    reason: str = ""

    @property
    def integer(self) -> bool:
        """True when the layer's products are computed on integers."""
        return self.activations in ("uint8", "int8", "dynamic")


@dataclass(frozen=True)
class FloatList:
    """The layers that a recipe leaves out of its own precision, and their share of the multiply-adds (0..1)."""

    names: tuple[str, ...]
    mac_share: float


@dataclass(frozen=True)
class PrecisionRecipe:
    """One rule per layer; `macs` are the layers' own, for the float list. Raises PrecisionError on unknown names."""

    precision: str
    kernels: str
    rules: Mapping[str, LayerRule]
    macs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _known("precision", self.precision, PRECISIONS)
        _known("kernels", self.kernels, KERNELS)

    @property
    def float_list(self) -> FloatList:
        """Layers kept in float where the precision says integer: in weights, or in products where it ends in a8."""
        quantised, integer = self.precision.startswith("w"), self.precision.endswith("a8")
        names = tuple(
            name
            for name, rule in self.rules.items()
            if (quantised and rule.weights.startswith("float")) or (integer and not rule.integer)
        )
        total = sum(self.macs.get(name, 0) for name in self.rules)
        share = sum(self.macs.get(name, 0) for name in names) / total if total else 0.0
        return FloatList(names, share)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping of strings and integers, as the Plan's `recipe.quantisation` holds it."""
        rules = {name: dataclasses.asdict(rule) for name, rule in self.rules.items()}
        return {"precision": self.precision, "kernels": self.kernels, "rules": rules, "macs": dict(self.macs)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PrecisionRecipe:
        """The inverse; a bare {"precision": ...} of an older plan has no rules. Raises PrecisionError."""
        known = {"precision", "kernels", "rules", "macs"}
        if "precision" not in document or not set(document) <= known:
            raise PrecisionError(
                "a recipe has other keys", got=", ".join(sorted(document)), expected=", ".join(sorted(known))
            )
        try:
            rules = {str(name): LayerRule(**rule) for name, rule in document.get("rules", {}).items()}
        except TypeError as error:
            raise PrecisionError(f"a layer's rule is malformed: {error}", do="Build the bundle again.") from error
        kernels = str(document.get("kernels", KERNELS[0]))
        return cls(str(document["precision"]), kernels, rules, dict(document.get("macs", {})))


def rule_for(layer: Layer, precision: str, kernels: str) -> LayerRule:
    """The rule of one layer by its kind and role alone; `MEANING` says the same in words.

    Raises PrecisionError on an unknown precision (the simulated w4a4 included) or kernel set.
    """
    _known("precision", precision, PRECISIONS)
    _known("kernels", kernels, KERNELS)
    floating: Any = "float16" if kernels == "coreml" and precision != "fp32" else "float32"
    if precision in ("fp32", "fp16"):
        return LayerRule("float32" if precision == "fp32" else "float16", floating)
    if precision == "w8a16":
        return LayerRule("int8", floating)
    if layer.role != "body":  # too few products to gain by, and all later layers hang on them
        kept: Any = floating if precision == "w8a8" else "int8"
        return LayerRule(kept, floating, reason=f"{layer.role} layer")
    static: Any = "uint8" if kernels in ("onnxruntime-x64", "openvino") else "int8"
    if precision == "w8a8":
        return LayerRule("int8", static)
    if layer.kind == "conv" and kernels != "coreml":  # no 4-bit convolution kernels on CPUs
        return LayerRule("int8", static if precision == "w4a8" else floating)
    if precision == "w4a16":
        return LayerRule("int4", floating, group=INT4_GROUP)
    return LayerRule("int4", static if kernels == "coreml" else "dynamic", group=INT4_GROUP)


def recipe_for(
    layers: Iterable[Layer], precision: str, kernels: str, float_layers: Collection[str] = ()
) -> PrecisionRecipe:
    """`rule_for` for every layer, except that those named in `float_layers` stay float; raises PrecisionError."""
    known = {layer.name: layer for layer in layers}
    for name in float_layers:
        _known("float layer", name, known)
    rules = {name: rule_for(layer, precision, kernels) for name, layer in known.items()}
    half = kernels == "coreml" and precision != "fp32"
    kept: Any = "float16" if half else "float32"
    for name in float_layers:
        rules[name] = LayerRule(kept, kept, reason="kept in float by measurement")
    return PrecisionRecipe(precision, kernels, rules, {name: layer.macs for name, layer in known.items()})


def _known(what: str, name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        shown = list(allowed)
        expected = " | ".join(shown[:8]) + (f" ... ({len(shown)} in all)" if len(shown) > 8 else "")
        raise PrecisionError(f"unknown {what}", got=name, expected=expected)
