"""Narrow the units of a trained U-Net: what is kept is chosen by magnitude and keeps its weights.

In: a U-Net and `{unit path: kept width}`. Out: a `StudentUNet2DConditionModel` with those widths, which computes what
the pruned network computes. Convolutions go by torch-pruning's dependency graph; attention and feed-forward layers are
sliced here, because torch-pruning leaves stale head counts and cuts GEGLU's two halves wrongly. How much each unit
keeps is decided elsewhere (budget.py, sensitivity.py). Compare Hybrid SD (arXiv 2408.06646), which keeps the first
heads; here heads are ranked by the norm of what they write.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch_pruning
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnitError
from latentrelay.compress.prunable_units import PrunableUnit, prunable_units
from latentrelay.compress.student_unet import StudentUNet2DConditionModel, set_heads, widths_of
from torch import Tensor, nn


def prune_unet(unet: UNet2DConditionModel, widths: Mapping[str, int]) -> StudentUNet2DConditionModel:
    """A student with `widths` (units that are not named keep theirs); `unet` is left as it was.

    All widths kept: the same weights, bit for bit. Raises UnitError for an unknown path or a width it cannot have.
    """
    units = {unit.path: unit for unit in prunable_units(unet)}
    for path, width in widths.items():
        _check(units.get(path), path, width)
    changed = [(units[path], width) for path, width in widths.items() if width != units[path].width]
    pruned = copy.deepcopy(unet)
    resnets = [(unit, width) for unit, width in changed if unit.kind == "resnet"]
    if resnets:
        graph = _dependencies(pruned)
        for unit, width in resnets:
            _prune_resnet(graph, cast(Any, pruned.get_submodule(unit.path)), width)
    for unit, width in changed:
        module = pruned.get_submodule(unit.path)
        if unit.kind == "feed_forward":
            _prune_feed_forward(module, width)
        elif unit.kind != "resnet":
            _prune_attention(module, width)
    return as_student(pruned)


def as_student(unet: UNet2DConditionModel) -> StudentUNet2DConditionModel:
    """The same network as a StudentUNet2DConditionModel, whose config.json states its present widths."""
    config = {name: value for name, value in dict(unet.config).items() if not name.startswith("_")}
    student = cast(Any, StudentUNet2DConditionModel).from_config({**config, **widths_of(unet)})
    student.load_state_dict(unet.state_dict())
    return cast(StudentUNet2DConditionModel, student.eval())


def _check(unit: PrunableUnit | None, path: str, width: int) -> None:
    if unit is None:
        raise UnitError("the U-Net has no such unit", got=path, do="`prunable_units` lists them.")
    if not unit.minimum <= width <= unit.width or width % unit.granularity:
        expected = f"a multiple of {unit.granularity} in {unit.minimum}..{unit.width}"
        raise UnitError(f"{path} cannot have this width", got=width, expected=expected)


# ---- resnets: by torch-pruning -------------------------------------------------------------------------------------


def _dependencies(unet: Any) -> torch_pruning.DependencyGraph:
    """torch-pruning's graph of the network, traced on a small latent of the lowest size that its samplers take."""
    config = unet.config
    side = 2 ** (len(config.block_out_channels) - 1)
    width = config.cross_attention_dim
    width = width[0] if isinstance(width, (list, tuple)) else width
    example = {
        "sample": torch.zeros(1, config.in_channels, side, side, dtype=unet.dtype),
        "timestep": torch.tensor([1.0], dtype=unet.dtype),
        "encoder_hidden_states": torch.zeros(1, 2, width, dtype=unet.dtype),
    }
    with torch.enable_grad():
        required = {name: p.requires_grad for name, p in unet.named_parameters()}
        unet.requires_grad_(True)  # tracing follows gradient functions
        graph = torch_pruning.DependencyGraph().build_dependency(
            unet, example_inputs=example, forward_fn=lambda model, inputs: model(**inputs).sample, verbose=False
        )
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(required[name])
    return graph


def _prune_resnet(graph: torch_pruning.DependencyGraph, resnet: Any, width: int) -> None:
    """Channels of conv1 by the L2 norm of their filters; time embedding, norm2 and conv2 follow by dependency."""
    norms = resnet.conv1.weight.detach().float().flatten(1).norm(dim=1)
    gone = norms.argsort(descending=True, stable=True)[width:].tolist()
    group = graph.get_pruning_group(resnet.conv1, torch_pruning.prune_conv_out_channels, idxs=sorted(gone))
    group.prune()
    got = (resnet.conv1.out_channels, resnet.norm2.num_channels, resnet.conv2.in_channels)
    if got != (width,) * 3 or (resnet.time_emb_proj is not None and resnet.time_emb_proj.out_features != width):
        raise UnitError("torch-pruning left a resnet's widths inconsistent", got=got, expected=width)


# ---- attention and feed-forward: by hand ---------------------------------------------------------------------------


@torch.no_grad()
def head_norms(attention: Any) -> Tensor:
    """(heads,): the Frobenius norm of what each head writes, `W_out[:, head] @ W_value[head]`, over all inputs."""
    heads = attention.heads
    value = attention.to_v.weight.detach().float().unflatten(0, (heads, -1))  # (heads, dim, in)
    out = attention.to_out[0].weight.detach().float().unflatten(1, (heads, -1))  # (out, heads, dim)
    norms: Tensor = torch.einsum("ohd,hdi->hoi", out, value).flatten(1).norm(dim=1)
    return norms


def _prune_attention(attention: Any, heads: int) -> None:
    kept = head_norms(attention).argsort(descending=True, stable=True)[:heads].sort().values
    size = attention.to_q.out_features // attention.heads
    rows = (kept[:, None] * size + torch.arange(size)).flatten()
    for name in ("to_q", "to_k", "to_v"):
        setattr(attention, name, _rows(getattr(attention, name), rows))
    attention.to_out[0] = _columns(attention.to_out[0], rows)
    set_heads(attention, heads, len(rows))


def _prune_feed_forward(feed_forward: Any, width: int) -> None:
    """Inner channels by the product of what they read (value and gate) and what they write; both halves of GEGLU."""
    gate, out = feed_forward.net[0], feed_forward.net[2]
    halves = gate.proj.out_features // out.in_features
    read = gate.proj.weight.detach().float().unflatten(0, (halves, -1)).norm(dim=2).prod(0)
    written = out.weight.detach().float().norm(dim=0)
    kept = (read * written).argsort(descending=True, stable=True)[:width].sort().values
    rows = torch.cat([half * out.in_features + kept for half in range(halves)])
    gate.proj = _rows(gate.proj, rows)
    feed_forward.net[2] = _columns(out, kept)


def _rows(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    bias = None if layer.bias is None else layer.bias.detach()[rows]
    return _linear(layer.weight.detach()[rows], bias)


def _columns(layer: nn.Linear, columns: Tensor) -> nn.Linear:
    return _linear(layer.weight.detach()[:, columns], None if layer.bias is None else layer.bias.detach())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
