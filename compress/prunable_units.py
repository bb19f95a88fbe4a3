"""Which parts of a U-Net can be narrowed, and by what measure: the units that are scored, budgeted and pruned.

In: a diffusers U-Net. Out: one `PrunableUnit` for every resnet (hidden channels between its two convolutions), self-
and cross-attention (heads) and feed-forward (inner channels). A unit's width is local: what goes in and comes out of
its block keeps its shape, so units are independent and their savings add up. Whole blocks are remove_blocks.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

UnitKind = Literal["resnet", "self_attention", "cross_attention", "feed_forward"]


@dataclass(frozen=True)
class PrunableUnit:
    """One unit of a U-Net.

    path: the module's dotted name. width: hidden channels (resnet), heads (attention) or inner channels (feed-forward).
    Kept widths are multiples of `granularity` and at least `minimum`. parameters_per_width: what one unit of width
    costs; a unit's parameters are linear in its width.
    """

    path: str
    kind: UnitKind
    width: int
    granularity: int
    minimum: int
    parameters_per_width: int

    def kept(self, keep_ratio: float) -> int:
        """The width at a keep-ratio (0..1]: rounded up to the granularity, never below the minimum."""
        granules = -(-round(self.width * keep_ratio, 6) // self.granularity)
        return int(min(self.width, max(self.minimum, granules * self.granularity)))


def prunable_units(unet: nn.Module) -> tuple[PrunableUnit, ...]:
    """Every unit of a U-Net in module order. A narrowed network's units start from their present widths."""
    return tuple(_units(unet))


def _units(unet: nn.Module) -> Iterator[PrunableUnit]:
    for path, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            yield _resnet(path, module)
        elif isinstance(module, BasicTransformerBlock):
            yield _attention(f"{path}.attn1", module.attn1, "self_attention")
            if module.attn2 is not None:
                yield _attention(f"{path}.attn2", module.attn2, "cross_attention")
            yield _feed_forward(f"{path}.ff", module.ff)


def _resnet(path: str, resnet: Any) -> PrunableUnit:
    conv1, conv2, groups = resnet.conv1, resnet.conv2, resnet.norm2.num_groups
    time = resnet.time_emb_proj.in_features + 1 if resnet.time_emb_proj is not None else 0
    each = 9 * conv1.in_channels + 1 + 2 + 9 * conv2.out_channels + time
    return PrunableUnit(path, "resnet", conv1.out_channels, groups, groups, each)


def _attention(path: str, attention: Attention, kind: UnitKind) -> PrunableUnit:
    layers = cast("list[nn.Linear]", [attention.to_q, attention.to_k, attention.to_v])
    rows = sum(layer.in_features + (layer.bias is not None) for layer in layers)
    out = cast(nn.Linear, attention.to_out[0]).out_features
    head = layers[0].out_features // attention.heads
    return PrunableUnit(path, kind, attention.heads, 1, 1, head * (rows + out))


def _feed_forward(path: str, feed_forward: Any) -> PrunableUnit:
    proj, out = feed_forward.net[0].proj, feed_forward.net[2]
    halves = proj.out_features // out.in_features  # 2 for GEGLU: value and gate
    each = halves * (proj.in_features + (proj.bias is not None)) + out.out_features
    return PrunableUnit(path, "feed_forward", out.in_features, 8, 8, each)
