"""Blocks as ONNX graphs: every kind runs through ONNX Runtime and computes what the torch block computes in shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.latency_table import BlockShape, block_shapes, step_latency
from latentrelay.tools.time_blocks import block_graph, block_inputs, measured_table, widths_to_measure

SHAPES = [
    BlockShape("conv_in", 4, 4, 4, 8, groups=4),
    BlockShape("conv_out", 4, 4, 8, 4, groups=4),
    BlockShape("resnet", 4, 4, 8, 16, 8, groups=4),
    BlockShape("resnet", 4, 4, 8, 8, 4, groups=4),
    BlockShape("self_attention", 4, 4, 8, 8, 2, 4),
    BlockShape("cross_attention", 4, 4, 8, 8, 1, 4, 5, 12),
    BlockShape("feed_forward", 4, 4, 8, 8, 24),
    BlockShape("projections", 4, 4, 8, 8, groups=4),
    BlockShape("downsampler", 2, 2, 8, 8),
    BlockShape("upsampler", 8, 8, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.kind}-{shape.inputs}-{shape.outputs}")
def test_every_kind_of_block_runs(shape: BlockShape) -> None:
    session = onnxruntime.InferenceSession(block_graph(shape), providers=["CPUExecutionProvider"])
    result = session.run(None, block_inputs(shape))[0]
    pixels = shape.rows * shape.columns
    flat = shape.kind in ("self_attention", "cross_attention", "feed_forward")
    assert result.shape == ((2, pixels, shape.outputs) if flat else (2, shape.outputs, shape.rows, shape.columns))
    assert np.isfinite(result).all()
    assert result.std() > 0


def test_a_family_is_measured_at_three_widths() -> None:
    resnet = BlockShape("resnet", 4, 4, 8, 8, 128, groups=32)
    fixed = BlockShape("conv_in", 4, 4, 4, 8)
    widths = [(shape.kind, shape.width) for shape in widths_to_measure([resnet, fixed, resnet])]
    assert widths == [("resnet", 32), ("resnet", 64), ("resnet", 128), ("conv_in", 0)]


def test_a_measured_network_is_read_from_the_cache_the_second_time(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=4, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
        )  # fmt: skip
    timed: list[str] = []
    first = measured_table(unet, 4, 4, 5, tmp_path, timed.append)
    assert len(timed) == len(first.timings) == len(widths_to_measure(block_shapes(unet, 4, 4, 5)))
    again = measured_table(unet, 4, 4, 5, tmp_path, timed.append)
    assert again == first
    assert len(timed) == len(first.timings)
    assert step_latency(unet, 4, 4, 5, first).ms > 0
