"""FLOPs against sums by hand: single layers, attention, and a U-Net whose attention the CPU would run fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latentrelay.compress.flops import RunFlops, count_flops, decode_flops, text_encoder_flops, unet_step_flops
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def test_layers_by_hand() -> None:
    assert count_flops(nn.Linear(3, 5), torch.empty(7, 3)) == 2 * 7 * 3 * 5
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    assert count_flops(convolution, torch.empty(2, 4, 8, 10)) == 2 * 2 * 6 * 4 * 9 * (4 * 5)
    assert count_flops(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), torch.empty(2, 4, 8, 8)) == 0


def test_attention_is_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(query, key, key)

    batch, heads, queries, keys, width = 2, 3, 16, 5, 8
    flops = count_flops(Attention(), torch.empty(batch, heads, queries, width), torch.empty(batch, heads, keys, width))
    assert flops == 2 * (2 * batch * heads * queries * keys * width)


def test_nothing_is_computed_and_nothing_changed() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    assert count_flops(layer, torch.full((1, 4), torch.nan)) == 32
    assert torch.equal(layer.weight, before)
    assert layer.weight.device.type == "cpu"


def test_a_unet_counts_as_it_does_when_it_runs(tiny: Any) -> None:
    torch.manual_seed(0)
    unet = tiny.make_unet()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        unet(torch.zeros(2, 4, 8, 8), torch.tensor(3), encoder_hidden_states=torch.zeros(2, 16, 16))
    counted = unet_step_flops(unet, 8, 8, 16)
    assert counted == counter.get_total_flops()
    assert unet_step_flops(unet, 8, 8, 16, batch=1) * 2 == counted
    # One more text token costs, at each of three cross-attentions 8 wide over 64 queries and one 16 wide over 16:
    # its key and its value (2 x 16 x width) and its share of two products (queries x width each).
    wide, middle = (2 * (2 * 16 * width + 2 * queries * width) for width, queries in ((8, 64), (16, 16)))
    assert unet_step_flops(unet, 8, 8, 17) - counted == 2 * (3 * wide + middle)


def test_the_other_parts(tmp_path: Path, tiny: Any) -> None:
    pipeline = tiny.make_pipeline(tmp_path)
    encoder, vae = pipeline.text_encoder, pipeline.vae
    # per token: four projections 16x16, a feed-forward 16x32 and back; per token pair: two products of width 16
    assert text_encoder_flops(encoder, 16) == 2 * (16 * 2 * (4 * 256 + 2 * 512) + 2 * 2 * 16 * 16 * 16)
    assert decode_flops(vae, 8, 8) == count_flops(vae.post_quant_conv, torch.empty(1, 4, 8, 8)) + count_flops(
        vae.decoder, torch.empty(1, 4, 8, 8)
    )


def test_a_run_by_hand() -> None:
    run = RunFlops(num_steps=25, cloud_step=100, device_step=30, text_encoder=10, cloud_decode=400, device_decode=40)
    assert [run.cloud(split) for split in (0, 8, 25)] == [0, 810, 2510]
    assert [run.device(split) for split in (0, 8, 25)] == [760, 520, 0]
    assert run.saving(8) == pytest.approx(1 - 810 / 2910)
    assert run.saving_without_decode(8) == pytest.approx(1 - 810 / 2510)
    assert run.saving(0) == 1
    assert run.saving_without_decode(25) == 0


def test_the_counter_behind_it_misses_fused_attention() -> None:
    """Why attention is run as two products: when torch learns the CPU's kernel, this says so."""
    query = torch.zeros(1, 1, 4, 8)
    with FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 0
