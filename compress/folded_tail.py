"""The end of a light decoder, folded: its last two convolutions as one at half the picture's size.

An `AutoencoderTiny` decoder without blocks in its last stage ends in nearest upsampling, a 3x3 convolution and, with
nothing in between, another. That is one linear map of the features x (N, C, h, w): a 5x5 kernel on the upsampled grid,
which is a 3x3 kernel on x for each of the four pixel positions, so (N, 12, h, w) and a pixel shuffle. The fold is
exact, borders too: the second convolution pads its input with zeros where the fold would see the first one's response
beyond the border, and `_beyond` takes that back, on four strips one pixel wide. The decoder trains through the fold and
is exported with it; on disk it stays a plain AutoencoderTiny.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedTail(nn.Module):
    """x (N, C, h, w) -> (N, outputs, 2h, 2w), equal to `gain * second(first(upsample(x))) + offset`; both are 3x3 with
    padding 1, and `first` has no bias. `freeze` folds once and for all; before that gradients reach both."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d, gain: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.gain, self.offset = first, second, gain, offset
        self.frozen: Tensor | None = None

    def freeze(self) -> None:
        """Fold the kernel now; later changes of the weights go unseen."""
        del self.frozen
        self.register_buffer("frozen", folded_kernel(self.first.weight, self.second.weight * self.gain).detach())

    def forward(self, x: Tensor) -> Tensor:
        """One convolution, the pixel shuffle, and the border put right."""
        first, second = self.first.weight, self.second.weight * self.gain
        kernel = folded_kernel(first, second) if self.frozen is None else self.frozen
        bias = (cast(Tensor, self.second.bias) * self.gain + self.offset).repeat_interleave(4)
        inside = F.pixel_shuffle(F.conv2d(x, kernel, bias, padding=1), 2)
        return inside - self._beyond(x, first, second)

    @staticmethod
    def _beyond(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What the fold adds to the outermost pixels: `second` of `first`'s response one pixel beyond each border. The
        strips above and below hold the corners."""
        above = _strip(x[:, :, :1], first[:, :, 2:], second[:, :, :1], corners=True)
        below = _strip(x[:, :, -1:], first[:, :, :1], second[:, :, 2:], corners=True)
        left = _strip(x[..., :1], first[..., 2:], second[..., :1], corners=False)
        right = _strip(x[..., -1:], first[..., :1], second[..., 2:], corners=False)
        count, outputs, rows, columns = x.shape[0], second.shape[0], 2 * x.shape[2], 2 * x.shape[3]
        flat = above.new_zeros(1, outputs, rows - 2, columns).expand(count, -1, -1, -1)
        tall = above.new_zeros(1, outputs, rows, columns - 2).expand(count, -1, -1, -1)
        return torch.cat([above, flat, below], 2) + torch.cat([left, tall, right], 3)


def _strip(x: Tensor, first: Tensor, second: Tensor, *, corners: bool) -> Tensor:
    """Row x (N, C, 1, w) or column (N, C, h, 1) -> (N, outputs, 1, 2w) or (N, outputs, 2h, 1). With `corners` the first
    response reaches one pixel further at both ends; without, zeros stand there."""
    along = 3 if first.shape[2] == 1 else 2
    pads = (0, 1) if along == 3 else (1, 0)
    reach = 2 if corners else 1
    wide = F.interpolate(x, scale_factor=(1.0, 2.0) if along == 3 else (2.0, 1.0), mode="nearest")
    response = F.conv2d(wide, first, padding=(pads[0] * reach, pads[1] * reach))
    return F.conv2d(response, second, padding=0 if corners else pads)


def folded_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Kernels (M, C, 3, 3) and (O, M, 3, 3) -> (4 O, C, 3, 3), rows in the order of `pixel_shuffle`: pixel offset p of
    position a (0 or 1) lies in the source pixel floor((a + p) / 2)."""
    wide = F.conv_transpose2d(second, first)  # (O, C, 5, 5), offsets -2..2 on the upsampled grid
    place = torch.zeros(2, 3, 5, dtype=wide.dtype, device=wide.device)
    for position in range(2):
        for offset in range(-2, 3):
            place[position, (position + offset) // 2 + 1, offset + 2] = 1
    folded = torch.einsum("oipq,adp,beq->oabide", wide, place, place)
    return folded.reshape(-1, *folded.shape[3:])


class FoldedDecoder(nn.Module):
    """A `DecoderTiny` with its tail folded: latents (N, 4, h, w) -> (N, 3, 8h, 8w), what the decoder itself gives. The
    parameters are the decoder's own, not copies."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        layers = list(cast(nn.Sequential, decoder.layers))
        self.body = nn.Sequential(*layers[:-3])
        self.tail = FoldedTail(cast(nn.Conv2d, layers[-2]), cast(nn.Conv2d, layers[-1]), gain=2.0, offset=-1.0)

    def forward(self, latents: Tensor) -> Tensor:
        """As `DecoderTiny.forward`: a soft clamp, the layers, [0, 1] to [-1, 1]."""
        picture: Tensor = self.tail(self.body(torch.tanh(latents / 3) * 3))
        return picture


def folds(decoder: nn.Module) -> bool:
    """Whether a decoder ends as the fold needs: nearest upsampling by two, a 3x3 convolution without bias, another
    with."""
    layers = list(cast(nn.Sequential, decoder.layers))[-3:]
    if len(layers) < 3 or not (isinstance(layers[1], nn.Conv2d) and isinstance(layers[2], nn.Conv2d)):
        return False
    up, first, second = layers
    plain = all(
        (each.kernel_size, each.padding, each.stride, each.groups) == ((3, 3), (1, 1), (1, 1), 1)
        for each in (first, second)
        if isinstance(each, nn.Conv2d)
    )
    doubles = isinstance(up, nn.Upsample) and up.scale_factor == 2 and up.mode == "nearest"
    return doubles and plain and first.bias is None and second.bias is not None
