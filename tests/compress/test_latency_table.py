"""Step latency as a sum of blocks: counted by hand, interpolated in width, kept as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.latency_table import (
    BlockShape,
    BlockTiming,
    LatencyTable,
    LatencyTableError,
    block_shapes,
    device_step_ms,
    load_table,
    save_table,
    step_latency,
    table_key,
)
from latentrelay.device_profiles import load_profile


def tiny_unet(**changes: Any) -> Any:
    arguments = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**{**arguments, **changes})


def test_every_block_of_a_network_is_counted_at_its_size() -> None:
    shapes = block_shapes(tiny_unet(), 8, 8, 5)
    kinds = [shape.kind for shape in shapes]
    # Resnets: 1 + 1 down, 2 in the middle, 2 + 2 up. Transformers: 1 down, 1 middle, 2 up.
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "conv_in": 1, "conv_out": 1, "resnet": 8, "projections": 4, "self_attention": 4, "cross_attention": 4,
        "feed_forward": 4, "downsampler": 1, "upsampler": 1,
    }  # fmt: skip
    down = next(shape for shape in shapes if shape.kind == "downsampler")
    up = next(shape for shape in shapes if shape.kind == "upsampler")
    assert (down.rows, up.rows) == (4, 8)
    middle = [shape for shape in shapes if shape.kind == "self_attention" and shape.rows == 4]
    assert [(shape.inputs, shape.width, shape.head) for shape in middle] == [(16, 2, 8)]
    assert all(shape.tokens == 5 and shape.text_width == 16 for shape in shapes if shape.kind == "cross_attention")


def table(shapes: list[BlockShape], ms: float, **more: Any) -> LatencyTable:
    return LatencyTable({"processor": "test"}, tuple(BlockTiming(shape, ms, 0.1, 5) for shape in shapes), **more)


def test_the_step_is_the_sum_times_the_ratio_of_a_whole_graph() -> None:
    unet = tiny_unet()
    shapes = block_shapes(unet, 8, 8, 5)
    assert step_latency(unet, 8, 8, 5, table(shapes, 2.0)).ms == pytest.approx(2.0 * len(shapes))
    scaled = step_latency(unet, 8, 8, 5, table(shapes, 2.0, whole_over_sum=0.9))
    assert scaled.ms == pytest.approx(1.8 * len(shapes))
    assert scaled.by_kind["resnet"] == pytest.approx(1.8 * 8)


def test_widths_between_are_interpolated_and_beyond_extended() -> None:
    points = ((8, 1.0), (16, 2.0), (32, 6.0))
    timings = [BlockTiming(BlockShape("feed_forward", 4, 4, 8, 8, width), ms, 0.0, 5) for width, ms in points]
    known = LatencyTable({}, tuple(timings))
    at = {width: known.block_ms(BlockShape("feed_forward", 4, 4, 8, 8, width)) for width in (4, 8, 12, 24, 32, 40)}
    assert at == {4: 0.5, 8: 1.0, 12: 1.5, 24: 4.0, 32: 6.0, 40: 8.0}
    with pytest.raises(LatencyTableError, match="Measure"):
        known.block_ms(BlockShape("feed_forward", 8, 4, 8, 8, 16))


def test_tables_are_kept_as_they_are(tmp_path: Path) -> None:
    shapes = block_shapes(tiny_unet(), 8, 8, 5)
    before = table(shapes, 1.25, whole_over_sum=0.95)
    save_table(before, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]
    assert table_key(shapes, {"a": "1"}) != table_key(shapes, {"a": "2"}) != table_key(shapes[1:], {"a": "2"})
    (tmp_path / "table.json").write_text('{"schema_version": "2.0"}')
    with pytest.raises(LatencyTableError, match="schema_version"):
        load_table(tmp_path / "table.json")


def test_another_device_is_scaled_from_its_published_figure() -> None:
    phone = load_profile("galaxy-s24")  # 79.1 ms a branch for the full U-Net
    assert device_step_ms(phone, 0.5) == pytest.approx(79.1)
