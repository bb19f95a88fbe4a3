"""Where an exported U-Net can be cut, and the cutting: a graph between given values, over the same external weights.

In: a U-Net's ONNX graph as the build leaves it, in float or quantised, whose layers are called by their torch module
paths (onnx_graphs.py). `cut_points` finds the value that a predicted step stands in for (deep, the DeepCache point:
the hidden state that the last up block's last ResNet reads, before the skip connection is concatenated to it) and what
candidates can be compared on early (probes P0-P3); `module_output` what a named module adds; `cut_graph` keeps the
nodes between values. Only protobufs are read and written: no weight is, and a cut graph must stand beside the data
file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
from latentrelay.export.errors import CutError
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_LAYOUT = ("Reshape", "Transpose", "Cast")
_NORMS = ("InstanceNormalization", "GroupNormalization")
_LAST_LAYERS = ("", ".to_out.0", ".net.2", ".conv2", ".proj_out")  # a module's last layer, by the end of its path


@dataclass(frozen=True)
class CutPoints:
    """Value names. `deep` and `skip` (batch, C, h, w) are what the last Concat reads; `probes` by name, "P0" cheapest:
    conv_in's result; what norm2 of the first ResNet reads; that ResNet's result; the first attention's, where there is
    one."""

    deep: str
    skip: str
    probes: Mapping[str, str]


def cut_points(model: ModelProto) -> CutPoints:
    """Find them by the layers' names. Raises CutError naming the place where the graph is another U-Net's."""
    walk = _Walk(model)
    last = walk.last_resnet()
    joined = walk.norm_input(f"{last}.conv1")
    concat = walk.producer.get(joined)
    if concat is None or concat.op_type != "Concat" or len(concat.input) != 2:
        got = None if concat is None else f"{concat.op_type} of {len(concat.input)} values"
        raise CutError(f"{last}.norm1", got=got, expected="a Concat of the hidden state and one skip connection")
    deep, skip = concat.input
    if not walk.depends_on(deep, "mid_block.", "up_blocks.") or walk.depends_on(skip, "mid_block.", "up_blocks."):
        raise CutError(f"{last}: the Concat", got=f"{deep}, {skip}", expected="the hidden state first, then the skip")
    return CutPoints(deep, skip, walk.probes())


def probe_value(points: CutPoints, probe: str) -> str:
    """The value of a probe by its name. Raises CutError where this network has no such probe."""
    if probe not in points.probes:
        raise CutError(f"probe {probe}", got="not in this network", expected=" | ".join(points.probes))
    return points.probes[probe]


def module_output(model: ModelProto, path: str) -> str:
    """The value that the torch module `path` returns: a layer's, an attention's or a feed-forward's result before it is
    added to the residual stream; of `...resnets.i` and `...attentions.i` the sum. Raises CutError."""
    walk = _Walk(model)
    kind = path.split(".")[-2:][0]
    for ending in _LAST_LAYERS:
        if (name := f"{path}{ending}") in walk.layers:
            settled = walk.settled(walk.layers[name].output[0])
            return walk.residual_sum(settled, path) if kind in ("resnets", "attentions") else settled
    raise CutError(path, got="no layer of that name", expected="a torch module path of this network")


def cut_graph(model: ModelProto, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> ModelProto:
    """A copy of `model` with the nodes that `outputs` need, computed from `inputs` and the graph's own inputs.

    Both map values to the names that they get; an input may be any value of the graph, and the graph's own inputs stay
    where they are still read, under their names. Raises CutError for an unknown value and for a name that is taken.
    """
    walk = _Walk(model)
    for value in (*inputs, *outputs):
        if value not in walk.known:
            raise CutError(value, got="no such value", expected="a value of the graph")
    nodes = walk.needed(outputs, stop=inputs)
    used = {value for node in nodes for value in (*node.input, *node.output)}
    names = {**outputs, **inputs}
    taken = (used | {v.name for v in model.graph.input}) - set(names)
    if clash := sorted(taken & set(names.values())):
        raise CutError(clash[0], got="taken by another value", expected="a free name")

    cut = ModelProto()
    cut.CopyFrom(model)
    graph = cut.graph
    for field in (graph.node, graph.input, graph.output, graph.initializer, graph.value_info):
        del field[:]
    for node in nodes:
        graph.node.add().CopyFrom(node)
    for node in graph.node:
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names.get(value, value) for value in node.output]
    for value, name in outputs.items():
        if value in inputs and inputs[value] != name:  # what comes in goes out again
            graph.node.append(helper.make_node("Identity", [inputs[value]], [name], name=f"{name}/identity"))
    kept = [v for v in model.graph.input if v.name in (used | set(outputs)) - set(inputs)]
    graph.input.extend([*kept, *(walk.described(value, name) for value, name in inputs.items())])
    graph.output.extend(walk.described(value, name) for value, name in outputs.items())
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    inner = {value for node in nodes for value in node.output} - set(names)
    graph.value_info.extend(value for value in model.graph.value_info if value.name in inner)
    return cut


class _Walk:
    """A graph's values by who makes and who reads them, and the ways through it that the cuts need."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.model, self.nodes = model, list(graph.node)
        self.layers = {node.name: node for node in self.nodes}
        self.producer = {value: node for node in self.nodes for value in node.output if value}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for value in node.input:
                self.readers.setdefault(value, []).append(node)
        self.constants = {tensor.name for tensor in graph.initializer}  # and what is computed from them alone
        for node in self.nodes:
            if all(value in self.constants for value in node.input if value):
                self.constants.update(node.output)
        self.inputs = {value.name for value in graph.input}
        self.known = {*self.producer, *self.inputs}
        self._infos = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    def last_resnet(self) -> str:
        """The path of the last up block's last ResNet."""
        paths = [name.split(".") for name in self.layers if name.startswith("up_blocks.") and ".resnets." in name]
        numbers = [(int(p[1]), int(p[3])) for p in paths if len(p) > 4 and p[1].isdigit() and p[3].isdigit()]
        if not numbers:
            raise CutError(
                "up_blocks", got="no layer called up_blocks.<i>.resnets.<j>.*", expected="a U-Net's up blocks"
            )
        block, resnet = max(numbers)
        return f"up_blocks.{block}.resnets.{resnet}"

    def probes(self) -> dict[str, str]:
        """Those that the network has."""
        found = {"P0": self.settled(self.layer("conv_in").output[0])}
        resnet, attention = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0"
        if f"{resnet}.conv2" in self.layers:
            found["P1"] = self.norm_input(f"{resnet}.conv2")
            found["P2"] = self.residual_sum(self.settled(self.layer(f"{resnet}.conv2").output[0]), resnet)
        if f"{attention}.proj_out" in self.layers:
            found["P3"] = self.residual_sum(self.settled(self.layer(f"{attention}.proj_out").output[0]), attention)
        return found

    def layer(self, name: str) -> NodeProto:
        if name not in self.layers:
            raise CutError(name, got="no such layer", expected="a U-Net exported by this project")
        return self.layers[name]

    def norm_input(self, conv: str) -> str:
        """What the group norm before the convolution `conv` reads: back through SiLU, scale, shift and quantisers."""
        value = self.layer(conv).input[0]
        for _ in range(16):
            node = self.producer.get(value)
            if node is None:
                break
            if node.op_type in _NORMS:
                before = self.producer.get(node.input[0])  # an InstanceNormalization over groups has a Reshape before
                if node.op_type == "InstanceNormalization" and before is not None and before.op_type == "Reshape":
                    return str(before.input[0])
                return str(node.input[0])
            value = self._before(node, conv)
        raise CutError(f"{conv}: its norm", got="none within 16 nodes", expected=" | ".join(_NORMS))

    def _before(self, node: NodeProto, conv: str) -> str:
        if node.op_type in (*_QUANTISERS, *_LAYOUT):
            return str(node.input[0])
        live = [str(value) for value in node.input if value and value not in self.constants]
        if node.op_type == "Mul" and len(live) == 2:  # x * sigmoid(x)
            gates = [value for value in live if getattr(self.producer.get(value), "op_type", "") == "Sigmoid"]
            live = [value for value in live if value not in gates]
        if node.op_type not in ("Add", "Mul", "Swish") or len(live) != 1:
            raise CutError(f"{conv}: its norm", got=f"{node.op_type} {node.name} before it", expected="SiLU and a norm")
        return live[0]

    def settled(self, value: str) -> str:
        """`value` after its bias and its quantiser, if it has them: what the rest of the network reads."""
        while len(readers := self.readers.get(value, [])) == 1:
            node = readers[0]
            bias = node.op_type == "Add" and any(other in self.constants for other in node.input)
            if not bias and (node.op_type not in (*_QUANTISERS, "Cast") or not self._back_in_float(node)):
                break
            value = node.output[0]
        return value

    def _back_in_float(self, node: NodeProto) -> bool:
        """A quantiser counts where a dequantiser alone reads it: else it belongs to the next layer."""
        if node.op_type != "QuantizeLinear":
            return True
        after = self.readers.get(node.output[0], [])
        return node.name.endswith("/output/quantise") and [each.op_type for each in after] == ["DequantizeLinear"]

    def residual_sum(self, value: str, path: str) -> str:
        """The sum of two activations that `value`, a module's last layer, goes into next."""
        for _ in range(8):
            readers = self.readers.get(value, [])
            if len(readers) != 1:
                break
            node = readers[0]
            if node.op_type == "Add" and not any(other in self.constants for other in node.input):
                return self.settled(str(node.output[0]))
            if node.op_type not in (*_LAYOUT, *_QUANTISERS, "Add"):
                break
            value = node.output[0]
        raise CutError(f"{path}: its sum", got=f"none after {value}", expected="the layer's result plus its input")

    def depends_on(self, value: str, *prefixes: str) -> bool:
        """Whether a layer called by one of the prefixes stands before `value`."""
        return any(node.name.startswith(prefixes) for node in self.needed([value], stop=()))

    def needed(self, outputs: Iterable[str], stop: Iterable[str]) -> list[NodeProto]:
        """The nodes that compute `outputs` from `stop`, in the graph's order."""
        ends, wanted = set(stop), set()
        waiting = [value for value in outputs if value not in ends]
        while waiting:
            node = self.producer.get(waiting.pop())
            if node is None or id(node) in wanted:
                continue
            wanted.add(id(node))
            waiting.extend(value for value in node.input if value and value not in ends)
        return [node for node in self.nodes if id(node) in wanted]

    def described(self, value: str, name: str) -> ValueInfoProto:
        """Type and shape of a value under another name. Raises CutError where the graph does not say them."""
        if value not in self._infos:
            inferred = onnx.shape_inference.infer_shapes(self.model)
            self._infos = {each.name: each for each in inferred.graph.value_info} | self._infos
        if value not in self._infos or not self._infos[value].type.tensor_type.HasField("shape"):
            raise CutError(value, got="no shape in the graph", expected="a value whose shape is known")
        described = ValueInfoProto()
        described.CopyFrom(self._infos[value])
        described.name = name
        return described


def shape_of(model: ModelProto, value: str) -> tuple[int | str, ...]:
    """A value's shape as the graph has it, free axes by name. Raises CutError."""
    return tuple(_sizes(_Walk(model).described(value, value)))


def _sizes(value: ValueInfoProto) -> Iterator[int | str]:
    for size in value.type.tensor_type.shape.dim:
        yield size.dim_param or size.dim_value
