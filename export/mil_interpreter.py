"""Runs a saved Core ML package without Core ML: its program read back from disk and evaluated operation by operation.

`MilProgram(package)(inputs) -> outputs`: numpy arrays by the package's own names. Every result is rounded to the type
that the program declares for it, and compressed weights are expanded as the package stores them, so conversion,
serialisation and compression are what is tested. It says nothing about a processor's speed, nor about how the Neural
Engine adds up; that is measured on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.export.coreml_convert import load_program
from latentrelay.export.coremltools_import import coremltools
from latentrelay.export.errors import UnknownOperatorError
from latentrelay.export.mil_operators import OPERATORS, TORCH_TYPES, Arguments, Value
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[Any]]
Observer = Callable[[Any, Arguments], None]


class MilProgram:
    """One package's program, ready to run. `inputs` and `outputs` are its names, in order.

    Raises UnknownOperatorError, naming operator and output, if the program holds an operator without an entry in
    `OPERATORS`: before anything runs.
    """

    def __init__(self, package: Path) -> None:
        function = load_program(Path(package)).functions["main"]
        self._inputs, self._outputs = dict(function.inputs), list(function.outputs)
        self.inputs, self.outputs = tuple(self._inputs), tuple(var.name for var in self._outputs)
        self._constants: dict[Any, Value] = {}
        self.operations = []
        for op in function.operations:
            if op.op_type.startswith("constexpr_"):
                self._constants[op.outputs[0]] = _constant(op.materialized_val_inference(), op.outputs[0])
            elif op.op_type in OPERATORS:
                self.operations.append(op)
            elif op.op_type != "const":
                raise UnknownOperatorError(op.op_type, op.outputs[0].name)
        # coremltools computes an operation's inputs and types anew whenever they are asked for
        self._given = [[(name, var) for name, var in op.inputs.items() if var is not None] for op in self.operations]
        self._made = [[(var, TORCH_TYPES.get(type_name(var))) for var in op.outputs] for op in self.operations]
        self._last_use = self._find_last_use()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, NDArray[Any]], observe: Observer | None = None) -> Arrays:
        """Outputs by name. `observe(operation, arguments)` sees every operation before it runs.

        Raises ValueError for a missing or extra input, or a shape that is not the program's.
        """
        values: dict[Any, Value] = {}
        if set(inputs) != set(self._inputs):
            raise ValueError(f"inputs are {sorted(inputs)}, expected {sorted(self._inputs)}")
        for name, var in self._inputs.items():
            if tuple(inputs[name].shape) != tuple(var.shape):
                raise ValueError(f"{name} has shape {tuple(inputs[name].shape)}, expected {tuple(var.shape)}")
            values[var] = _rounded(torch.from_numpy(np.array(inputs[name])), TORCH_TYPES.get(type_name(var)))
        for i, op in enumerate(self.operations):
            arguments = Arguments({name: self._value(var, values) for name, var in self._given[i]})
            if observe is not None:
                observe(op, arguments)
            result = OPERATORS[op.op_type](arguments)
            results = result if isinstance(result, tuple) else (result,)
            for (var, declared), tensor in zip(self._made[i], results, strict=True):
                values[var] = _rounded(tensor, declared)
            for var in self._last_use.get(i, ()):
                values.pop(var, None)
        return {var.name: _array(self._value(var, values)) for var in self._outputs}

    def _value(self, var: Any, values: Mapping[Any, Value]) -> Value:
        if isinstance(var, (list, tuple)):
            tensors = [self._value(each, values) for each in var]
            return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        if var in values:
            return values[var]
        if var not in self._constants:
            self._constants[var] = _constant(var.val, var)
        return self._constants[var]

    def _find_last_use(self) -> dict[int, list[Any]]:
        """Which values can be forgotten after operation i, so that a large network does not keep every activation."""
        last: dict[Any, int] = {}
        for i, given in enumerate(self._given):
            for _, found in given:
                for var in found if isinstance(found, (list, tuple)) else (found,):
                    last[var] = i
        for var in self._outputs:
            last.pop(var, None)
        ends: dict[int, list[Any]] = {}
        for var, i in last.items():
            ends.setdefault(i, []).append(var)
        return ends


def type_name(var: Any) -> str:
    """MIL's name of a value's element type: "fp16", "fp32", "int32", "bool", ..."""
    return str(coremltools.converters.mil.mil.types.builtin_to_string(var.dtype))


def _constant(values: Any, var: Any) -> Value:
    """A constant in its declared type; float16 is widened at once, as `Arguments` would at every call."""
    if isinstance(values, str):
        return values
    array = np.array(values, order="C")  # a copy: what coremltools hands out may be read-only
    if array.dtype == np.uint16:
        array = array.astype(np.int32)
    tensor = _rounded(torch.from_numpy(array), TORCH_TYPES.get(type_name(var)))
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _rounded(tensor: Tensor, declared: torch.dtype | None) -> Tensor:
    """In the declared type, and in row order: torch sums in another order over another layout."""
    return tensor.to(tensor.dtype if declared is None else declared).contiguous()


def _array(value: Value) -> NDArray[Any]:
    if not isinstance(value, Tensor):
        raise TypeError(f"an output is {type(value).__name__}, expected a tensor")
    return np.asarray(value.numpy())
