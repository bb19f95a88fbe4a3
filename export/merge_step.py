"""A step graph from its parts: head, U-Net (or what is left of it) and tail in one graph that shares the weights.

Pure graph surgery on protobufs: the U-Net's initializers stay references into `model.onnx_data`, so no weight is read,
copied or written. The file must stand beside `model.onnx`, because ONNX Runtime refuses external data elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from latentrelay.export.errors import ExportError
from onnx import ModelProto, NodeProto

STATES, PROMPT = "encoder_hidden_states", "prompt_embeds"


@dataclass(frozen=True)
class Part:
    """One graph to merge. Its values become `names[value]`, or the prefix and their own name; a value that one part
    makes and another reads has one name in both."""

    model: ModelProto
    prefix: str
    names: Mapping[str, str] = field(default_factory=dict)


def module_part(model: ModelProto, prefix: str, names: Mapping[str, str] | None = None) -> Part:
    """An exported module: its inputs and outputs keep their names, which are the step graph's, but for `names`."""
    own = {value.name: value.name for value in (*model.graph.input, *model.graph.output)}
    return Part(model, prefix, {**own, **(names or {})})


def network_part(model: ModelProto) -> Part:
    """The U-Net or a cut of it: every name stays, but for the text states, which are the step's `prompt_embeds`."""
    own = {value: value for node in model.graph.node for value in (*node.input, *node.output) if value}
    own |= {value.name: value.name for value in (*model.graph.input, *model.graph.initializer)}
    return Part(model, "", {**own, STATES: PROMPT})


def merge_parts(name: str, parts: Sequence[Part], outputs: Sequence[str], network: Part, branches: int) -> ModelProto:
    """The parts as one graph called `name`, in a valid order of nodes. Inputs are what no part makes, in the parts'
    order; `network` (one of the parts) gives the opsets; `branches` is the batch of a step: 2 with classifier-free
    guidance, 1 without. Raises ExportError for a name that two parts make, and for an output that none does.
    """
    merged = ModelProto()
    merged.CopyFrom(network.model)
    renamed = [_renamed(part) for part in parts]
    made = [value for model in renamed for node in model.graph.node for value in node.output if value]
    if len(set(made)) != len(made):
        twice = sorted(value for value in set(made) if made.count(value) > 1)
        raise ExportError(f"{name}: two parts make {twice[0]}", expected="one", do="Report the model.")
    inputs = {value.name: value for model in renamed for value in model.graph.input if value.name not in made}
    results = {value.name: value for model in renamed for value in model.graph.output}
    if missing := [value for value in outputs if value not in results]:
        raise ExportError(f"{name}: no part makes {missing[0]}", got=", ".join(results), expected=", ".join(outputs))
    prompt = inputs.get(PROMPT)
    if prompt is not None and prompt.type.tensor_type.shape.dim[0].dim_param:
        prompt.type.tensor_type.shape.dim[0].dim_value = branches
    graph = merged.graph
    graph.name = name
    for field_, values in (
        (graph.node, _sorted([node for model in renamed for node in model.graph.node], set(made))),
        (graph.initializer, [tensor for model in renamed for tensor in model.graph.initializer]),
        (graph.input, inputs.values()),
        (graph.output, [results[value] for value in outputs]),
    ):
        kept = list(values)
        del field_[:]
        field_.extend(kept)
    del graph.value_info[:]
    return merged


def _renamed(part: Part) -> ModelProto:
    """A copy with every value renamed; "" (an absent input) stays."""

    def new(name: str) -> str:
        return part.names.get(name, part.prefix + name) if name else name

    model = ModelProto()
    model.CopyFrom(part.model)
    graph = model.graph
    for node in graph.node:
        node.name = part.prefix + node.name
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = new(value.name)
    return model


def _sorted(nodes: Sequence[NodeProto], made: set[str]) -> list[NodeProto]:
    """The nodes with every reader behind what it reads, otherwise in the order given."""
    done: set[str] = set()
    waiting, ordered = list(nodes), []
    while waiting:
        late = []
        for node in waiting:
            if all(value in done or value not in made for value in node.input):
                ordered.append(node)
                done.update(node.output)
            else:
                late.append(node)
        if len(late) == len(waiting):
            raise ExportError("the parts of a step graph read each other in a circle", got=late[0].name)
        waiting = late
    return ordered
