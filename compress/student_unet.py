"""The student: a `UNet2DConditionModel` whose config.json holds the width of every prunable unit.

In: the stock U-Net's arguments and four mappings from a module's path to its width. Out: a ModelMixin that saves and
loads like any other (safetensors, bit for bit) without pruning code: the stock network is built and the units that are
narrower are replaced. Stock U-Nets have one width a level, which pruning breaks; that is all this class adds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin, UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from latentrelay.compress.prunable_units import PrunableUnit, UnitKind, prunable_units
from torch import nn

__all__ = [
    "WIDTH_FIELDS",
    "ModelMixin",
    "StudentUNet2DConditionModel",
    "widths_of",
]  # diffusers looks ModelMixin up here

# The field of config.json that holds a kind's widths.
WIDTH_FIELDS: dict[UnitKind, str] = {
    "resnet": "resnet_mid_channels",
    "self_attention": "self_attention_heads",
    "cross_attention": "cross_attention_heads",
    "feed_forward": "feed_forward_channels",
}


class StudentUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A U-Net with its own width in every resnet, attention and feed-forward.

    The four mappings go from a module's path ("down_blocks.0.resnets.0") to its width (channels, heads, heads,
    channels); a unit that is not named keeps the stock width. Everything else is UNet2DConditionModel's. Raises
    UnitError for a path that does not exist or a width that the unit cannot have.
    """

    def __init__(
        self,
        *,
        resnet_mid_channels: Mapping[str, int] | None = None,
        self_attention_heads: Mapping[str, int] | None = None,
        cross_attention_heads: Mapping[str, int] | None = None,
        feed_forward_channels: Mapping[str, int] | None = None,
        **stock: Any,
    ) -> None:
        super().__init__(**stock)
        given: dict[UnitKind, Mapping[str, int]] = {
            "resnet": resnet_mid_channels or {},
            "self_attention": self_attention_heads or {},
            "cross_attention": cross_attention_heads or {},
            "feed_forward": feed_forward_channels or {},
        }
        self.register_to_config(**{WIDTH_FIELDS[kind]: dict(widths) for kind, widths in given.items()})
        units = {unit.path: unit for unit in prunable_units(self)}
        for kind, widths in given.items():
            for path, width in widths.items():
                _narrow(self, _checked(units.get(path), kind, path, width), width)


def _merged_signature() -> inspect.Signature:
    """diffusers reads the keys that a config may hold off the constructor's signature, which `**stock` hides."""
    own = inspect.signature(StudentUNet2DConditionModel.__init__).parameters
    stock = inspect.signature(UNet2DConditionModel.__init__).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    named = [each.replace(kind=keyword) for name, each in {**stock, **own}.items() if name not in ("self", "stock")]
    return inspect.Signature([own["self"], *named])


StudentUNet2DConditionModel.__init__.__signature__ = _merged_signature()  # type: ignore[attr-defined]


def widths_of(unet: nn.Module) -> dict[str, dict[str, int]]:
    """The four config fields with the present width of every unit of a U-Net."""
    fields: dict[str, dict[str, int]] = {field: {} for field in WIDTH_FIELDS.values()}
    for unit in prunable_units(unet):
        fields[WIDTH_FIELDS[unit.kind]][unit.path] = unit.width
    return fields


def _checked(unit: PrunableUnit | None, kind: UnitKind, path: str, width: int) -> PrunableUnit:
    if unit is None or unit.kind != kind:
        raise UnitError(
            f"{WIDTH_FIELDS[kind]}: the network has no such unit",
            got=path,
            expected=f"a {kind.replace('_', '-')} of it",
            do="Correct config.json.",
        )
    if type(width) is not int or not 0 < width <= unit.width or width % unit.granularity:
        raise UnitError(
            f"{WIDTH_FIELDS[kind]}: {path} cannot have this width",
            got=width,
            expected=f"a multiple of {unit.granularity} in {unit.granularity}..{unit.width}",
            do="Correct config.json.",
        )
    return unit


def _narrow(unet: nn.Module, unit: PrunableUnit, width: int) -> None:
    if width == unit.width:
        return
    module: Any = unet.get_submodule(unit.path)
    if unit.kind == "resnet":
        narrow_resnet(module, width)
    elif unit.kind == "feed_forward":
        narrow_feed_forward(module, width)
    else:
        narrow_attention(module, width)


def narrow_resnet(resnet: Any, width: int) -> None:
    """Fresh inner layers of `width` channels; modified in place."""
    conv1, conv2, norm2, time = resnet.conv1, resnet.conv2, resnet.norm2, resnet.time_emb_proj
    resnet.conv1 = nn.Conv2d(conv1.in_channels, width, 3, padding=1)
    resnet.norm2 = nn.GroupNorm(norm2.num_groups, width, eps=norm2.eps)
    resnet.conv2 = nn.Conv2d(width, conv2.out_channels, 3, padding=1)
    if time is not None:
        resnet.time_emb_proj = nn.Linear(time.in_features, width)


def narrow_attention(attention: Any, heads: int) -> None:
    """Fresh projections of `heads` heads of the same width each; modified in place, its head count too."""
    inner = attention.to_q.out_features // attention.heads * heads
    for name in ("to_q", "to_k", "to_v"):
        layer = getattr(attention, name)
        setattr(attention, name, nn.Linear(layer.in_features, inner, bias=layer.bias is not None))
    out = attention.to_out[0]
    attention.to_out[0] = nn.Linear(inner, out.out_features, bias=out.bias is not None)
    set_heads(attention, heads, inner)


def set_heads(attention: Any, heads: int, inner: int) -> None:
    """Every place where diffusers' Attention keeps its head count; a stale one silently computes another attention."""
    attention.heads = attention.sliceable_head_dim = heads
    attention.inner_dim = attention.inner_kv_dim = inner


def narrow_feed_forward(feed_forward: Any, width: int) -> None:
    """Fresh layers of `width` inner channels, the gate's half too; modified in place."""
    gate, out = feed_forward.net[0], feed_forward.net[2]
    halves = gate.proj.out_features // out.in_features
    gate.proj = nn.Linear(gate.proj.in_features, halves * width, bias=gate.proj.bias is not None)
    feed_forward.net[2] = nn.Linear(width, out.out_features, bias=out.bias is not None)
