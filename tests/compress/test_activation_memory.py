"""Activations by ONNX Runtime's plan: buffers of one shape are taken again and wait for it, in-place work is free."""

from __future__ import annotations

import torch
from latentrelay.compress.activation_memory import Operation, activation_bytes, buffers_of, peak_bytes, record
from torch import Tensor, nn
from torch.nn import functional


def test_a_buffer_waits_until_its_shape_comes_again() -> None:
    waits = [Operation((0,), 1, (100,)), Operation((1,), 2, (10,)), Operation((2,), 3, (50,)),
             Operation((3,), 4, (100,))]  # fmt: skip
    # 0..3: [100] is written, read, waits while [50] lives, and is written again. In use at once are at most 150.
    assert peak_bytes(waits, 1) == 160
    assert [buffer.shape for buffer in buffers_of(waits)] == [(100,), (10,), (50,)]
    assert peak_bytes(waits[:3], 1) == 110  # nothing needs its shape again: it is given back


def test_only_the_last_reader_lets_an_operation_write_in_place() -> None:
    start, double = Operation((0,), 1, (8,)), Operation((1,), 2, (8,), in_place=True)
    assert peak_bytes([start, double], 4) == 32
    assert peak_bytes([start, double, Operation((1, 2), 3, (8,), in_place=True)], 4) == 64


def test_a_renamed_value_keeps_its_buffer_alive() -> None:
    renamed = [Operation((0,), 1, (4, 4)), Operation((1,), 2, (16,), alias=True), Operation((0,), 3, (5,)),
               Operation((2, 3), 4, (1,))]  # fmt: skip
    assert peak_bytes(renamed, 1) == 16 + 5 + 1


def test_two_linear_layers_by_hand() -> None:
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    assert activation_bytes(network, torch.zeros(2, 8)) == 4 * (2 * 16 + 2 * 8)


class Attend(nn.Module):
    """Plain attention of (1, heads, tokens, 4)."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(x)
        return functional.scaled_dot_product_attention(y, y, y)


def test_scores_are_written_once_and_grow_with_heads() -> None:
    # relu over the caller's input is a buffer of its own: x is no buffer of the plan.
    one, two = (activation_bytes(Attend(), torch.zeros(1, heads, 64, 4)) for heads in (1, 2))
    assert one == 4 * (64 * 64 + 2 * 64 * 4)
    assert two == 2 * one


def test_a_convolution_is_reordered_on_both_sides() -> None:
    kinds = [each.kind for each in record(nn.Conv2d(16, 16, 3), torch.zeros(1, 16, 8, 8))]
    assert kinds == ["reorder_input", "conv", "reorder_output"]


def test_nothing_is_computed_and_the_module_stays_as_it_was() -> None:
    network = nn.Linear(2, 2)
    before = network.weight.detach().clone()
    record(network, torch.zeros(1, 2))
    assert torch.equal(network.weight, before)
    assert network.weight.device.type == "cpu"
