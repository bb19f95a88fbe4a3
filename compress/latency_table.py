"""The latency of one U-Net step as the sum of its blocks, each timed by itself through ONNX Runtime.

In: a U-Net (meta device) and a `LatencyTable` of timings by block shape, measured on one machine (tools/time_blocks.py
writes the graphs and times them, and a table for SD 1.4's shapes ships). Out: milliseconds of one guided step there,
and, scaled by a profile's published or measured figure, an estimate for another device. Blocks between two measured
widths are interpolated. It is not a simulation: what a whole graph saves between blocks is not seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from latentrelay.compress.errors import CompressError
from latentrelay.device_profiles import DeviceProfile

SCHEMA_VERSION = "1.0"
SHIPPED = Path(__file__).parent / "latency_sd14.json"


class LatencyTableError(CompressError):
    """A latency table cannot be read, or has no timing near a block."""

    exit_status = 3


@dataclass(frozen=True)
class BlockShape:
    """One block: kind, rows and columns of its latents (of what comes out, for samplers), channels in and out, its
    prunable `width` (hidden channels, heads, inner channels), the channels of one head, and the text it attends to
    (tokens, channels). Batch 2 throughout: one guided step."""

    kind: str
    rows: int
    columns: int
    inputs: int
    outputs: int
    width: int = 0
    head: int = 0
    tokens: int = 0
    text_width: int = 0
    groups: int = 32

    @property
    def family(self) -> str:
        """Everything but the width, as a key."""
        sizes = (self.rows, self.columns, self.inputs, self.outputs, self.head, self.tokens, self.text_width)
        return self.kind + ":" + "x".join(map(str, sizes))


@dataclass(frozen=True)
class BlockTiming:
    """Median and interquartile range of `runs` runs, in ms of the one thread that runs the block."""

    shape: BlockShape
    median_ms: float
    spread_ms: float
    runs: int


@dataclass(frozen=True)
class LatencyTable:
    """Timings of one machine. `machine`: processor, threads, versions. whole_over_sum: a whole graph's measured step
    over the sum of its blocks, where it was measured."""

    machine: Mapping[str, str]
    timings: tuple[BlockTiming, ...]
    whole_over_sum: float | None = None

    def block_ms(self, shape: BlockShape) -> float:
        """A block's time, interpolated between the widths of its family. Raises LatencyTableError."""
        mine = [each for each in self.timings if each.shape.family == shape.family]
        known = sorted({each.shape.width: each.median_ms for each in mine}.items())
        if not known:
            raise LatencyTableError(
                "the latency table has no such block", got=shape.family, do="Measure this model's own blocks."
            )
        return _interpolated(known, shape.width)


@dataclass(frozen=True)
class StepLatency:
    """Milliseconds of one guided step on the table's machine, and by kind of block."""

    ms: float
    by_kind: Mapping[str, float]


def step_latency(unet: Any, rows: int, columns: int, tokens: int, table: LatencyTable) -> StepLatency:
    """One guided step of a U-Net: the sum over its blocks, times the table's whole over sum where there is one."""
    by_kind: dict[str, float] = {}
    ratio = table.whole_over_sum or 1.0
    for shape in block_shapes(unet, rows, columns, tokens):
        by_kind[shape.kind] = by_kind.get(shape.kind, 0.0) + ratio * table.block_ms(shape)
    return StepLatency(sum(by_kind.values()), by_kind)


def block_shapes(unet: Any, rows: int, columns: int, tokens: int) -> list[BlockShape]:
    """Every block of a U-Net, in module order, for latents of `rows` x `columns`."""
    config = unet.config
    levels, groups = len(config.block_out_channels), int(config.norm_num_groups or 32)
    first = int(config.block_out_channels[0])
    found = [
        BlockShape("conv_in", rows, columns, config.in_channels, first, groups=groups),
        BlockShape("conv_out", rows, columns, first, config.out_channels, groups=groups),
    ]
    for path, module in unet.named_modules():
        level = _level(path, levels)
        size = (rows >> level, columns >> level)
        if isinstance(module, ResnetBlock2D):
            found.append(_resnet(module, size))
        elif isinstance(module, Downsample2D):
            found.append(
                BlockShape("downsampler", size[0] // 2, size[1] // 2, module.conv.in_channels, module.out_channels)
            )
        elif isinstance(module, Upsample2D):
            found.append(
                BlockShape("upsampler", size[0] * 2, size[1] * 2, module.conv.in_channels, module.out_channels)
            )
        elif isinstance(module, Transformer2DModel):
            width = module.in_channels
            found.append(BlockShape("projections", *size, width, width, groups=groups))
        elif isinstance(module, BasicTransformerBlock):
            found += _transformer(module, size, tokens)
    return found


def device_step_ms(profile: DeviceProfile, ratio_to_full: float) -> float | None:
    """A guided step on a profile's device: its first figure for SD 1.x's U-Net (one branch), twice, times the student's
    time over the full U-Net's on the table's machine. None where the profile has no such figure. An estimate."""
    anchor = profile.latency_ms("unet")
    return None if anchor is None else 2 * anchor * ratio_to_full


def load_table(path: Path = SHIPPED) -> LatencyTable:
    """A table from JSON. Raises LatencyTableError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema_version"].split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(f"schema_version {document['schema_version']}, expected {SCHEMA_VERSION}")
        timings = tuple(
            BlockTiming(BlockShape(**each["shape"]), each["median_ms"], each["spread_ms"], each["runs"])
            for each in document["timings"]
        )
        return LatencyTable(document["machine"], timings, document["whole_over_sum"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LatencyTableError(f"{path.name} is no latency table ({error!r})", do="Measure it again.") from error


def save_table(table: LatencyTable, path: Path) -> None:
    """Write a table as JSON, all or nothing."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "machine": dict(table.machine),
        "whole_over_sum": table.whole_over_sum,
        "timings": [asdict(each) for each in table.timings],
    }
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def table_key(shapes: list[BlockShape], machine: Mapping[str, str]) -> str:
    """The name under which measured blocks are kept: a digest of the shapes, the machine and the versions."""
    content = json.dumps([[asdict(shape) for shape in shapes], dict(machine)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _resnet(module: Any, size: tuple[int, int]) -> BlockShape:
    outputs, width = module.conv2.out_channels, module.conv1.out_channels
    return BlockShape("resnet", *size, module.conv1.in_channels, outputs, width, groups=module.norm2.num_groups)


def _transformer(block: Any, size: tuple[int, int], tokens: int) -> list[BlockShape]:
    own, channels = block.attn1, block.attn1.to_q.in_features
    found = [BlockShape("self_attention", *size, channels, channels, own.heads, own.to_q.out_features // own.heads)]
    if block.attn2 is not None:
        text = block.attn2
        head, width = text.to_q.out_features // text.heads, text.to_k.in_features
        found.append(BlockShape("cross_attention", *size, channels, channels, text.heads, head, tokens, width))
    found.append(BlockShape("feed_forward", *size, channels, channels, block.ff.net[2].in_features))
    return found


def _level(path: str, levels: int) -> int:
    """0 for the level of the full latent size; samplers are counted at the level that they start from."""
    part = path.split(".")
    if part[0] == "mid_block":
        return levels - 1
    if part[0] not in ("down_blocks", "up_blocks") or len(part) < 2:
        return 0
    return int(part[1]) if part[0] == "down_blocks" else levels - 1 - int(part[1])


def _interpolated(known: list[tuple[int, float]], width: int) -> float:
    """Linear between the two nearest widths; below the least, in proportion to the least two, never under 0."""
    if len(known) == 1:
        return known[0][1]
    above = next((index for index, (each, _) in enumerate(known) if each >= width), len(known) - 1)
    (x0, y0), (x1, y1) = known[max(above - 1, 0)], known[max(above, 1)]
    return max(0.0, y0 + (y1 - y0) * (width - x0) / (x1 - x0))
