"""A U-Net in stages, as torch modules: the whole network with what prediction keeps of it, its shallow path, its probe.

`FullUNet` is the network's own forward, which also gives the deep feature (the hidden state that the last up block's
last resnet reads, before the skip is concatenated) and a probe. `ShallowUNet` computes the same output from such a
feature, running the first convolution and the last resnet alone; `ProbeUNet` gives the probe alone. All (2, C, h, w)
float32 a step of two guidance branches. They wrap the network's modules and copy no weight; fed its own feature the
shallow path gives the network's output bit for bit. DeepCache (arXiv 2312.00858) is where the cut comes from.
ONNX graphs are not made of these: `cut_unet.py` cuts them out of the exported one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from latentrelay.export.errors import UnsupportedSourceError
from torch import Tensor, nn

PROBES = ("P0", "P1", "P2", "P3")
_EMBEDDINGS = ("class_embedding", "add_embedding", "encoder_hid_proj", "time_embed_act")


def probes_of(unet: nn.Module) -> tuple[str, ...]:
    """The probes that a U-Net has: P0 what its first convolution gives; in the first down block, P1 what the first
    resnet's second norm reads, P2 that resnet's output, P3 the first attention's, where it has one."""
    first = unet.down_blocks[0]  # type: ignore[index]
    attends = bool(getattr(first, "has_cross_attention", False)) and len(getattr(first, "attentions", ())) > 0
    return PROBES if attends else PROBES[:-1]


def check_stages(unet: nn.Module, probe: str | None = None) -> None:
    """Raises UnsupportedSourceError, naming the part of the U-Net that has no shallow path or no such probe."""
    network: Any = unet
    for name in _EMBEDDINGS:
        if getattr(network, name, None) is not None:
            raise UnsupportedSourceError(f"U-Net's {name}, for predicted steps", got="present", expected="absent")
    if network.config.center_input_sample:
        raise UnsupportedSourceError("U-Net's center_input_sample, for predicted steps", got=True, expected=False)
    first, last = network.down_blocks[0].resnets[0], network.up_blocks[-1]
    if not isinstance(last, (CrossAttnUpBlock2D, UpBlock2D)):
        raise UnsupportedSourceError(
            "last up block, for predicted steps", got=type(last).__name__, expected="CrossAttnUpBlock2D | UpBlock2D"
        )
    if len(last.resnets) < 2 or last.upsamplers is not None:
        got = f"{len(last.resnets)} resnets, {'an' if last.upsamplers is not None else 'no'} upsampler"
        raise UnsupportedSourceError("last up block, for predicted steps", got=got, expected=">= 2 resnets, none")
    if all(getattr(last, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise UnsupportedSourceError("FreeU, for predicted steps", got="enabled", expected="unet.disable_freeu()")
    if probe is None:
        return
    if probe not in probes_of(unet):
        raise UnsupportedSourceError("first down block, for a probe", got=probe, expected=" | ".join(probes_of(unet)))
    plain = first.time_embedding_norm == "default" and first.upsample is None and first.downsample is None
    if probe != "P0" and not plain:
        raise UnsupportedSourceError(
            "first resnet, for a probe", got=first.time_embedding_norm, expected="the time embedding added"
        )


class FullUNet(nn.Module):
    """The whole network with its deep feature and, where one is named, a probe. Raises UnsupportedSourceError."""

    def __init__(self, unet: nn.Module, probe: str | None = None) -> None:
        super().__init__()
        check_stages(unet, probe)
        self.unet, self.probe = unet, probe

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        """sample (B,C,h,w), timestep (), states (B,T,D) -> out_sample (B,C,h,w), deep (B,Cf,hf,wf) [, probe]."""
        with _seen(self.unet, self.probe) as seen:
            out: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return (out, seen["deep"]) if self.probe is None else (out, seen["deep"], seen["probe"])


class ShallowUNet(nn.Module):
    """The first convolution, the last resnet with its attention, and the output layers, over a given deep feature."""

    def __init__(self, unet: nn.Module, probe: str | None = None) -> None:
        super().__init__()
        check_stages(unet, probe)
        self.unet, self.probe = unet, probe

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, deep: Tensor) -> Any:
        """As `FullUNet`, with deep (B,Cf,hf,wf) -> out_sample (B,C,h,w) [, probe]."""
        hidden, embedding = self.begin(sample, timestep)
        out = self.finish(hidden, embedding, encoder_hidden_states, deep)
        if self.probe is None:
            return out
        return out, probe_value(self.unet, self.probe, hidden, embedding, encoder_hidden_states)

    def begin(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What the first convolution gives, (B,C0,h,w), which is the skip too, and the time embedding (B,E)."""
        return _begin(self.unet, sample, timestep)

    def finish(self, hidden: Tensor, embedding: Tensor, encoder_hidden_states: Tensor, deep: Tensor) -> Tensor:
        """out_sample (B,C,h,w) of what `begin` gave and the deep feature."""
        unet: Any = self.unet
        last = unet.up_blocks[-1]
        x = last.resnets[-1](torch.cat([deep, hidden], dim=1), embedding)
        if isinstance(last, CrossAttnUpBlock2D):
            x = last.attentions[-1](x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        out: Tensor = unet.conv_out(x)
        return out


class ProbeUNet(nn.Module):
    """The probe alone: of the network's first layers nothing behind it runs. Raises UnsupportedSourceError."""

    def __init__(self, unet: nn.Module, probe: str) -> None:
        super().__init__()
        check_stages(unet, probe)
        self.unet, self.probe = unet, probe

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """As `FullUNet` -> probe (B,Cp,hp,wp); the states matter to P3 alone."""
        hidden, embedding = _begin(self.unet, sample, timestep)
        return probe_value(self.unet, self.probe, hidden, embedding, encoder_hidden_states)


def probe_value(unet: Any, probe: str, hidden: Tensor, embedding: Tensor, states: Tensor) -> Tensor:
    """The probe (B,Cp,hp,wp) of what the first convolution gives, (B,C0,h,w), the time embedding and the states."""
    if probe == "P0":
        return hidden
    block = unet.down_blocks[0]
    resnet = block.resnets[0]
    if probe == "P1":
        inner: Tensor = resnet.conv1(resnet.nonlinearity(resnet.norm1(hidden)))
        if resnet.time_emb_proj is None:
            return inner
        time = embedding if resnet.skip_time_act else resnet.nonlinearity(embedding)
        shifted: Tensor = inner + resnet.time_emb_proj(time)[:, :, None, None]
        return shifted
    found: Tensor = resnet(hidden, embedding)
    if probe == "P3":
        found = block.attentions[0](found, encoder_hidden_states=states, return_dict=False)[0]
    return found


def _begin(unet: Any, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    embedding: Tensor = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep), None)
    hidden: Tensor = unet.conv_in(sample)
    return hidden, embedding


@contextmanager
def _seen(unet: Any, probe: str | None) -> Iterator[dict[str, Tensor]]:
    """While open, a run of the network leaves its deep feature and probe here."""
    seen: dict[str, Tensor] = {}
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    source = last.attentions[-2] if isinstance(last, CrossAttnUpBlock2D) else last.resnets[-2]
    read = {
        "P0": unet.conv_in,
        "P1": first.resnets[0].norm2,
        "P2": first.resnets[0],
        "P3": first.attentions[0] if probe == "P3" else None,
    }

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            value = arguments[0] if name == "probe" and probe == "P1" else result
            seen[name] = value[0] if isinstance(value, tuple) else value

        return hook

    handles = [source.register_forward_hook(keep("deep"))]
    if probe is not None:
        handles.append(read[probe].register_forward_hook(keep("probe")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
