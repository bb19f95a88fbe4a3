"""step_full.onnx: head, U-Net and tail of one step as one graph that shares the U-Net's external weights.

Pure graph surgery on protobufs: the U-Net's initializers stay references into `model.onnx_data`, so no weight is read,
copied or written. The file must stand beside `model.onnx`, because ONNX Runtime refuses external data elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto

_HEAD, _TAIL = "step_head/", "step_tail/"


def merge_step(unet: Path, head: Path, tail: Path, output: Path, branches: int = 2) -> None:
    """Write `output` (in the U-Net's folder) from the three graphs.

    Head outputs `sample, timestep` feed the U-Net's inputs of those names; the U-Net's `out_sample` feeds the tail's
    `noise_pred`; every other input is the step graph's own, `encoder_hidden_states` under the name `prompt_embeds`.
    `branches` is the batch of a step: 2 with classifier-free guidance, 1 without.
    """
    if output.parent != unet.parent:
        raise ValueError(f"{output} must stand in {unet.parent}, beside the external data")
    network = onnx.load(str(unet), load_external_data=False)
    first, last = onnx.load(str(head)), onnx.load(str(tail))
    own = {value.name: value.name for graph in (first, last) for value in graph.graph.input}
    results = {value.name: value.name for value in last.graph.output}
    _rename(first, _HEAD, {**own, "sample": "sample", "timestep": "timestep"})
    _rename(last, _TAIL, {**own, **results, "noise_pred": "out_sample"})
    _rename(network, "", {"encoder_hidden_states": "prompt_embeds"})

    merged = ModelProto()
    merged.CopyFrom(network)
    graph = merged.graph
    graph.name = "step_full"
    nodes = [*first.graph.node, *network.graph.node, *last.graph.node]
    initializers = [*first.graph.initializer, *network.graph.initializer, *last.graph.initializer]
    prompt = next(value for value in network.graph.input if value.name == "prompt_embeds")
    if prompt.type.tensor_type.shape.dim[0].dim_param:
        prompt.type.tensor_type.shape.dim[0].dim_value = branches
    inputs = {value.name: value for value in (*first.graph.input, prompt, *last.graph.input)}
    inputs.pop("out_sample")
    for field, values in (
        (graph.node, nodes),
        (graph.initializer, initializers),
        (graph.input, inputs.values()),
        (graph.output, last.graph.output),
    ):
        kept = list(values)
        del field[:]
        field.extend(kept)
    del graph.value_info[:]
    onnx.save(merged, str(output))


def _rename(model: ModelProto, prefix: str, fixed: dict[str, str]) -> None:
    """Rename every value to `prefix` + name, except those that `fixed` names; "" (an absent input) stays."""

    def new(name: str) -> str:
        return fixed.get(name, prefix + name) if name else name

    graph = model.graph
    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new(value.name)
