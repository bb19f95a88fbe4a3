"""FLOPs of a hybrid run: one counter for the cloud's steps, the device's steps, the text encoder and both decoders.

Counted are convolutions and matrix products, two FLOPs a multiply-add, attention's own products included;
normalisations, activations and additions are not, as in the papers' figures. In: modules, of which only shapes matter
(weights are replaced by shapes alone, so nothing is computed and SD 1.x counts in seconds). Out: integers. These are
not seconds, and operations that a compiler removes are counted all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

GUIDED = 2  # rows a call: unconditional and conditional


class _Method(nn.Module):
    """A method of a module as a module's `forward`, so that its weights can be swapped for shapes."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return getattr(self.module, self.method)(*arguments, **named)


def count_flops(module: nn.Module, *arguments: torch.Tensor, method: str = "forward", **named: torch.Tensor) -> int:
    """FLOPs of one call of `module.<method>` on tensors of these shapes and dtypes (their values are not read).

    torch's counter knows no formula for the fused attention of the CPU and would count it as nothing, so attention is
    run as its two products.
    """
    called = _Method(module, method)
    shapes = {name: value.to("meta") for name, value in [*called.named_parameters(), *called.named_buffers()]}
    inputs = tuple(value.to("meta") for value in arguments)
    options = {name: value.to("meta") for name, value in named.items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        torch.func.functional_call(called, shapes, inputs, options)
    return int(counter.get_total_flops())


def unet_step_flops(unet: Any, rows: int, columns: int, tokens: int, *, batch: int = GUIDED) -> int:
    """One call of a `UNet2DConditionModel` (or a student): latents (batch, C, rows, columns), text (batch, tokens, D).

    The default batch is one picture with guidance. One sampler step is one call.
    """
    config = unet.config
    return count_flops(
        unet,
        torch.empty(batch, config.in_channels, rows, columns),
        torch.tensor(0.0),
        encoder_hidden_states=torch.empty(batch, tokens, _text_width(config)),
    )


def _text_width(config: Any) -> int:
    width = config.cross_attention_dim
    return int(width[0] if isinstance(width, (list, tuple)) else width)


def text_encoder_flops(encoder: nn.Module, tokens: int, *, batch: int = GUIDED) -> int:
    """The text encoder on ids (batch, tokens): the negative prompt and the prompt, once a picture."""
    return count_flops(encoder, torch.zeros(batch, tokens, dtype=torch.int64))


def decode_flops(vae: Any, rows: int, columns: int) -> int:
    """`vae.decode` of one picture's latents (1, C, rows, columns); for `AutoencoderKL` and `AutoencoderTiny`."""
    return count_flops(vae, torch.empty(1, vae.config.latent_channels, rows, columns), method="decode")


@dataclass(frozen=True)
class RunFlops:
    """FLOPs of the parts of one picture's run; `num_steps` is N, `split` k below is the first step on the device.

    The cloud encodes the prompt where it makes a step, the device where it makes one, so a hybrid run counts the text
    encoder twice. The all-cloud run is k = N with the source's decoder in the cloud.
    """

    num_steps: int
    cloud_step: int
    device_step: int
    text_encoder: int
    cloud_decode: int
    device_decode: int

    def cloud(self, split: int) -> int:
        """Steps 0 .. k-1 and the prompt, without any decode."""
        return split * self.cloud_step + (self.text_encoder if split > 0 else 0)

    def device(self, split: int) -> int:
        """Steps k .. N-1 and the prompt, without any decode."""
        left = self.num_steps - split
        return left * self.device_step + (self.text_encoder if left > 0 else 0)

    def saving(self, split: int) -> float:
        """1 - cloud FLOPs of the hybrid (decoded on the device) / those of the all-cloud run, its decode included."""
        return 1 - self.cloud(split) / (self.cloud(self.num_steps) + self.cloud_decode)

    def saving_without_decode(self, split: int) -> float:
        """The same with the all-cloud run's decode left out."""
        return 1 - self.cloud(split) / self.cloud(self.num_steps)
