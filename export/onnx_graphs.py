"""Torch modules to ONNX files: U-Net, text encoder, VAE decoder (Optimum's names and inputs), head and tail of a step.

All go through `torch.onnx.export(dynamo=True)`: one clean graph, no control flow. The batch axis is static unless the
caller asks otherwise; latent size and token count are always baked. The U-Net's weights go to one external file beside
it, the others stay inside their file while a protobuf can hold them.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir
import torch
from latentrelay.compress.folded_tail import FoldedDecoder, folds
from latentrelay.export.simplify_graph import simplify
from onnxscript import optimizer
from torch import Tensor, nn

UNET_DATA = "model.onnx_data"
_INLINE_LIMIT = 1_500_000_000  # bytes; a protobuf message ends at 2 GiB
_NAMED_THRESHOLD = 1024  # bytes; smaller tensors stay in the graph even with external data


class UNetGraph(nn.Module):
    """sample (B,C,h,w), timestep (), encoder_hidden_states (B,T,D) -> out_sample (B,C,h,w), all float32."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The U-Net's output, epsilon or v as trained."""
        result: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return result


class TextEncoderGraph(nn.Module):
    """input_ids i64 (B,T) -> last_hidden_state f32 (B,T,D), pooler_output f32 (B,D)."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The states after the final layer norm, and the state at the end-of-text token."""
        result = self.text_encoder(input_ids)
        return result.last_hidden_state, result.pooler_output


class VaeDecoderGraph(nn.Module):
    """latent_sample (B,C,h,w), already divided by the scaling factor -> sample (B,3,H,W) in about [-1, 1]."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The decoded picture, not clamped."""
        result: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]  # type: ignore[operator]
        return result


class LightDecoderGraph(nn.Module):
    """The same for an `AutoencoderTiny`, its tail folded where it folds (exact; see `compress/folded_tail.py`)."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        decoder = cast(nn.Module, vae.decoder)
        if folds(decoder):
            decoder = FoldedDecoder(decoder)
            decoder.tail.freeze()
        self.decoder = decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The decoded picture, not clamped."""
        result: Tensor = self.decoder(latent_sample)
        return result


def decoder_graph(vae: nn.Module) -> nn.Module:
    """What a VAE's decoder is exported as."""
    return LightDecoderGraph(vae) if type(vae).__name__ == "AutoencoderTiny" else VaeDecoderGraph(vae)


def export_onnx(
    module: nn.Module,
    arguments: Sequence[Tensor],
    path: Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
    batched: Sequence[str] = (),
    external: str | None = None,
    kernels: str | None = None,
) -> None:
    """Write `module` to `path`; inputs named in `batched` get a dynamic first axis called "batch".

    `external`: the name of the data file beside `path` that takes the weights; None keeps them inside unless they are
    too large for one protobuf (then the name is `<path>_data`). `kernels`: what a U-Net's graph is simplified for
    (simplify_graph.py); None leaves it as the exporter wrote it.
    """
    dynamic = None
    if batched:
        batch = torch.export.Dim("batch", min=1, max=63)  # diffusers upsamples batches from 64 on in another way
        dynamic = tuple({0: batch} if name in batched else {} for name in inputs)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(arguments),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing")
        # Once, not twice as torch does: a third of the time for 3 % more nodes, which ONNX Runtime folds when it loads.
        optimizer.optimize_ir(program.model, num_iterations=1)
    _name_layers(program.model)
    if kernels is not None:
        simplify(program.model, kernels)
    _forget_origins(program.model)
    if external is None and _initializer_bytes(program.model) > _INLINE_LIMIT:
        external = path.name + "_data"
    options: Mapping[str, Any] = {}
    if external is not None:
        options = {"external_data": external, "size_threshold_bytes": _NAMED_THRESHOLD}
    onnx_ir.save(program.model, path, **options)


def _initializer_bytes(model: onnx_ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _name_layers(model: onnx_ir.Model) -> None:
    """Name what holds weights by its torch module path, without the wrapper's own attribute ("unet.").

    The node that multiplies by a layer's weights is called by the path ("down_blocks.0.resnets.0.conv1"), its weights
    `<path>.weight`, also where the exporter transposed them for a MatMul and gave them a number.
    """
    roots: set[str] = set()
    taken = {node.name for node in model.graph}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        roots.update(scopes[1:2] if len(scopes) > 2 else [])
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        weighted = node.op_type in ("Conv", "Gemm", "MatMul") and weight is not None and weight.is_initializer()
        if weighted and weight is not None and len(scopes) > 2:
            path = scopes[-2].partition(".")[2]
            if path not in taken:  # a module that computes in several parts: the first has its name
                taken.add(path)
                node.name = path
            if f"{scopes[-2]}.weight" not in model.graph.initializers:  # parts of one weight keep their numbers
                weight.name = f"{scopes[-2]}.weight"
    for value in tuple(model.graph.initializers.values()):
        root, _, path = (value.name or "").partition(".")
        if root in roots and path and path not in model.graph.initializers:
            value.name = path


def _forget_origins(model: onnx_ir.Model) -> None:
    """Drop stack traces and local paths: they are no part of the graph and would make equal exports differ."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch.onnx says about itself: missing torchvision, its own deprecated calls, the shared axis."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=r".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx|copyreg)\b.*")
            warnings.filterwarnings("ignore", category=UserWarning, message=r"# The axis name: .* will not be used")
            yield
    finally:
        logger.setLevel(level)
