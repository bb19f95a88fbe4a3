"""Peak memory of a network's activations under ONNX Runtime's static plan, from shapes alone.

In: a torch module (its weights are swapped for the meta device, nothing is computed) and inputs by shape. Out: bytes.
A pass records every operation with the buffers that the exported graph makes for it; then ONNX Runtime's planner is
followed: an operation writes over its input where it may, else takes a free buffer of exactly its shape, and a buffer
that will be taken again later stays allocated until then. That last rule, and not the tensors that are in use at once,
decides the peak: the scores of the first attention wait for the last one. It is not a simulation of the arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of the exported graph: values read, the value written (an index), its shape and bytes an element;
    `in_place`: it may write over an input of its own size that nobody else reads; `alias`: it only renames its input.
    """

    inputs: tuple[int, ...]
    output: int
    shape: Shape
    in_place: bool = False
    alias: bool = False
    kind: str = ""


@dataclass
class _Recorder(TorchFunctionMode):
    """Records calls of torch functions as operations; every tensor that a module makes gets a number."""

    operations: list[Operation] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    depth: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is functional.scaled_dot_product_attention:
            query, key, value = [*args, *(kwargs[each] for each in ("query", "key", "value")[len(args) :])][:3]
            return self._attention(query, key, value)
        result = func(*args, **kwargs)
        rule = RULES.get(name)
        tensors = [each for each in _tensors(args, kwargs) if id(each) in self.numbers]
        if rule is None or not tensors:
            for each in _tensors((result,), {}):
                if tensors and id(each) not in self.numbers:
                    self._write(tensors[:1], each, alias=each.numel() == tensors[0].numel(), kind=name)
            return result
        rule(self, tensors, result)
        return result

    def see(self, tensor: Tensor) -> int:
        """Give a tensor a number; it is held so that its identity stays its own."""
        self.kept.append(tensor)
        self.numbers[id(tensor)] = self.count
        self.count += 1
        return self.count - 1

    def temporary(self) -> int:
        """A value of the exported graph that torch does not have."""
        self.count += 1
        return self.count - 1

    def _write(self, inputs: Sequence[Tensor], output: Tensor, *, kind: str, **how: Any) -> None:
        numbers = tuple(self.numbers[id(each)] for each in inputs if id(each) in self.numbers)
        if id(output) in self.numbers and self.numbers[id(output)] in numbers:
            return  # a call that returned its argument
        self.operations.append(Operation(numbers, self.see(output), tuple(output.shape), kind=kind, **how))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scores are written once (softmax works in place), and read by the product with the values."""
        scores = self.temporary()
        shape = (*query.shape[:-1], key.shape[-2])
        numbers = [self.numbers[id(each)] for each in (query, key, value)]
        self.operations.append(Operation((numbers[0], numbers[1]), scores, shape, kind="scores"))
        result = torch.empty((*query.shape[:-1], value.shape[-1]), device="meta")
        self.operations.append(Operation((scores, numbers[2]), self.see(result), tuple(result.shape), kind="attend"))
        return result


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for each in [*args, *kwargs.values()]:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += _tensors(each, {})
    return found


Rule = Callable[[_Recorder, list[Tensor], Any], None]


def _new(kind: str) -> Rule:
    return lambda recorder, inputs, result: recorder._write(inputs, result, kind=kind)


def _in_place(kind: str) -> Rule:
    return lambda recorder, inputs, result: recorder._write(inputs, result, kind=kind, in_place=True)


def _convolution(recorder: _Recorder, inputs: list[Tensor], result: Tensor) -> None:
    """Reordered into channel blocks, convolved, reordered back: three buffers."""
    blocked, output = recorder.temporary(), recorder.temporary()
    source = inputs[0]
    recorder.operations.append(
        Operation((recorder.numbers[id(source)],), blocked, tuple(source.shape), kind="reorder_input")
    )
    recorder.operations.append(Operation((blocked,), output, tuple(result.shape), kind="conv"))
    recorder.operations.append(Operation((output,), recorder.see(result), tuple(result.shape), kind="reorder_output"))


def _group_norm(recorder: _Recorder, inputs: list[Tensor], result: Tensor) -> None:
    """Instance normalisation of (N, groups, rest), then scale and shift in place."""
    recorder._write(inputs[:1], result, kind="group_norm")


def _pieces(recorder: _Recorder, inputs: list[Tensor], result: Any) -> None:
    for piece in result:
        recorder._write(inputs[:1], piece, kind="split")


RULES: dict[str, Rule] = {
    "linear": _new("linear"),
    "conv2d": _convolution,
    "group_norm": _group_norm,
    "layer_norm": _new("layer_norm"),
    "silu": _new("silu"),
    "gelu": _new("gelu"),
    "sigmoid": _new("sigmoid"),
    "softmax": _in_place("softmax"),
    "relu": _in_place("relu"),
    "tanh": _in_place("tanh"),
    "add": _in_place("add"),
    "sub": _in_place("sub"),
    "mul": _in_place("mul"),
    "div": _in_place("div"),
    "__add__": _in_place("add"),
    "__mul__": _in_place("mul"),
    "cat": _new("cat"),
    "interpolate": _new("interpolate"),
    "transpose": _new("transpose"),
    "permute": _new("permute"),
    "chunk": _pieces,
    "split": _pieces,
    "matmul": _new("matmul"),
    "bmm": _new("matmul"),
    "baddbmm": _new("matmul"),
    "pad": _new("pad"),
}


@dataclass
class _Buffer:
    shape: Shape
    first: int
    last: int


def record(module: nn.Module, *inputs: Tensor) -> list[Operation]:
    """The operations of one call on inputs of these shapes; values are not read. Meta tensors are fine."""
    shapes = {name: value.to("meta") for name, value in [*module.named_parameters(), *module.named_buffers()]}
    arguments = tuple(each.to("meta") for each in inputs)
    recorder = _Recorder()
    for each in arguments:
        recorder.see(each)
    with torch.no_grad(), recorder:
        torch.func.functional_call(module, shapes, arguments)
    return recorder.operations


def buffers_of(operations: Sequence[Operation]) -> list[_Buffer]:
    """The buffers of ONNX Runtime's plan with the operations at which each is allocated and freed."""
    uses: dict[int, int] = {}
    for operation in operations:
        for each in operation.inputs:
            uses[each] = uses.get(each, 0) + 1
    owner: dict[int, int] = {}  # value -> buffer
    left: dict[int, int] = {}  # buffer -> readers to come
    free: dict[Shape, list[int]] = {}
    buffers: list[_Buffer] = []
    for now, operation in enumerate(operations):
        buffer = _reused(operation, owner, left, buffers)
        if buffer is None:
            waiting = free.get(operation.shape)
            if waiting:
                buffer = waiting.pop()
            else:
                buffers.append(_Buffer(operation.shape, now, now))
                buffer = len(buffers) - 1
        owner[operation.output] = buffer
        left[buffer] = left.get(buffer, 0) + uses.get(operation.output, 0)
        for each in operation.inputs:
            if each in owner:
                left[owner[each]] -= 1
        for each in {*(owner[each] for each in operation.inputs if each in owner), buffer}:
            buffers[each].last = now
            if left[each] == 0:
                free.setdefault(buffers[each].shape, []).append(each)
    return buffers


def _reused(operation: Operation, owner: dict[int, int], left: dict[int, int], buffers: list[_Buffer]) -> int | None:
    mine = [owner[each] for each in operation.inputs if each in owner]
    if operation.alias and mine:
        return mine[0]
    if operation.in_place:
        for each in mine:
            if left[each] == 1 and math.prod(buffers[each].shape) == math.prod(operation.shape):
                return each
    return None


def peak_bytes(operations: Sequence[Operation], bytes_each: int = 4) -> int:
    """The most bytes that the plan's buffers hold at once."""
    buffers = buffers_of(operations)
    change = [0] * (len(operations) + 1)
    for buffer in buffers:
        size = math.prod(buffer.shape) * bytes_each
        change[buffer.first] += size
        change[buffer.last + 1] -= size
    peak = total = 0
    for each in change:
        total += each
        peak = max(peak, total)
    return peak


def activation_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Peak bytes of the activations of one call in float32."""
    return peak_bytes(record(module, *inputs))
