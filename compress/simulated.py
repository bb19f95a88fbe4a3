"""w4a4 as a simulation: weights and activations of a torch U-Net rounded to 4 bits where a layer would read them.

In: a float U-Net. Out: the same U-Net behind a context manager, its convolutions and linears computing in float on
rounded numbers: symmetric, 64 input channels to a scale, activations scaled as they come, per token or pixel. It is the
quantiser that TCEC (arXiv 2508.12094) is reported on. No CPU kernel runs it: every report must call it simulated, and
it has no size or speed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

LABEL = "w4a4 (simulated)"
GROUP, BITS = 64, 4


@contextmanager
def simulated_w4a4(unet: nn.Module, keep: Collection[str] = ()) -> Iterator[nn.Module]:
    """`unet` with 4-bit weights and activations while the context lasts; restored bit for bit afterwards.

    Left in float: the time embedding, `conv_in`, `conv_out` and the modules named in `keep`.
    """
    changed: list[tuple[nn.Conv2d | nn.Linear, Tensor]] = []
    hooks = []
    try:
        for name, module in unet.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not _kept(name, keep):
                changed.append((module, module.weight.data))
                module.weight.data = rounded(module.weight.data)
                hooks.append(module.register_forward_pre_hook(_round_input))
        yield unet
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in changed:
            module.weight.data = weight


def rounded(values: Tensor, axis: int = 1, bits: int = BITS, group: int = GROUP) -> Tensor:
    """`values` on a symmetric grid of 2^bits - 1 levels, one scale for each `group` neighbours along `axis` and each
    place of all other axes; the last group may be shorter. Same shape and dtype."""
    moved = values.movedim(axis, -1)
    size = moved.shape[-1]
    padded = functional.pad(moved, (0, -size % group))
    grouped = padded.reshape(*moved.shape[:-1], -1, group)
    levels = (1 << (bits - 1)) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / levels
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round(grouped / scale).clamp(-levels, levels)
    return (codes * scale).reshape(padded.shape)[..., :size].movedim(-1, axis).contiguous()


def _round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Channels are axis 1 in front of a convolution, the last axis in front of a linear."""
    return (rounded(inputs[0], 1 if isinstance(module, nn.Conv2d) else inputs[0].ndim - 1), *inputs[1:])


def _kept(name: str, keep: Collection[str]) -> bool:
    return name in keep or name in ("conv_in", "conv_out") or "time_emb" in name or name.startswith("add_embedding")
