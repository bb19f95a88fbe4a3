"""What each Core ML operator computes, over torch: one entry a MIL operator, the set that diffusion models convert to.

In: `Arguments`, an operation's inputs by MIL's own names (float16 arrives widened to float32). Out: a tensor, or a
tuple where the operation has several outputs; whoever calls rounds it to the declared type. Written after the MIL
operator reference (coremltools 9.0, opsets iOS 15 to 18). It models values, not any processor: sums run in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Value = Tensor | str | list[Tensor]
Result = Tensor | tuple[Tensor, ...]

TORCH_TYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "uint16": torch.int32,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Arguments:
    """The inputs of one operation. An optional input that is absent takes the default that the caller names."""

    given: Mapping[str, Value]

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, float16 widened to float32."""
        value = self.given[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}, expected a tensor")
        return value.float() if value.dtype == torch.float16 else value

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or None where the operation leaves it out."""
        return self[name] if name in self.given else None

    def tensors(self, name: str) -> list[Tensor]:
        """A list of tensors, float16 widened to float32."""
        value = self.given[name]
        if not isinstance(value, list):
            raise TypeError(f"{name} is {type(value).__name__}, expected a list of tensors")
        return [each.float() if each.dtype == torch.float16 else each for each in value]

    def setting(self, name: str, default: Any = None) -> Any:
        """A parameter as plain Python: a number, a string or a list of numbers; `default` where it is absent."""
        value = self.given.get(name)
        if value is None:
            return default
        return value.tolist() if isinstance(value, Tensor) else value


def _reduced(compute: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Arguments], Tensor]:
    def apply(a: Arguments) -> Tensor:
        axes = a.setting("axes") or list(range(a["x"].ndim))
        return compute(a["x"], axes, bool(a.setting("keep_dims", False)))

    return apply


def _argmax(a: Arguments) -> Tensor:
    return a["x"].argmax(dim=a.setting("axis", -1), keepdim=bool(a.setting("keep_dims", False)))


def _argmin(a: Arguments) -> Tensor:
    """The first of equals, as torch has it."""
    return a["x"].argmin(dim=a.setting("axis", -1), keepdim=bool(a.setting("keep_dims", False)))


def _gelu(a: Arguments) -> Tensor:
    mode = a.setting("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return a["x"] * torch.sigmoid(1.702 * a["x"])
    return functional.gelu(a["x"], approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _conv(a: Arguments) -> Tensor:
    """x (N,C,*space), weight (O,C/groups,*kernel) -> (N,O,*space'); padding "custom", "valid", "same", "same_lower"."""
    x, weight = a["x"], a["weight"]
    space = x.ndim - 2
    stride, dilation = a.setting("strides", [1] * space), a.setting("dilations", [1] * space)
    kind = a.setting("pad_type", "valid")
    pads = a.setting("pad", [0] * (2 * space)) if kind == "custom" else [0] * (2 * space)
    if kind.startswith("same"):
        for i in range(space):
            reach = (weight.shape[2 + i] - 1) * dilation[i] + 1
            total = max(0, (math.ceil(x.shape[2 + i] / stride[i]) - 1) * stride[i] + reach - x.shape[2 + i])
            small, large = total // 2, total - total // 2
            pads[2 * i : 2 * i + 2] = (large, small) if kind == "same_lower" else (small, large)
    even = pads[0::2] == pads[1::2]
    if not even:
        x = functional.pad(x, [pads[2 * i + side] for i in reversed(range(space)) for side in (0, 1)])
    run = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[space]
    bias = a.get("bias")
    padding = pads[0::2] if even else [0] * space
    return run(x, weight, bias, stride, padding, dilation, a.setting("groups", 1))


def _matmul(a: Arguments) -> Tensor:
    x = a["x"].transpose(-1, -2) if a.setting("transpose_x", False) else a["x"]
    y = a["y"].transpose(-1, -2) if a.setting("transpose_y", False) else a["y"]
    return x @ y


def _linear(a: Arguments) -> Tensor:
    return functional.linear(a["x"], a["weight"], a.get("bias"))


def _attention(a: Arguments) -> Tensor:
    """query (...,L,E), key (...,S,E), value (...,S,F), attn_mask added or kept where true -> (...,L,F)."""
    return functional.scaled_dot_product_attention(a["query"], a["key"], a["value"], attn_mask=a.get("attn_mask"))


def _batch_norm(a: Arguments) -> Tensor:
    gamma = a.get("gamma")
    beta = a.get("beta")
    return functional.batch_norm(a["x"], a["mean"], a["variance"], gamma, beta, eps=a.setting("epsilon", 1e-5))


def _layer_norm(a: Arguments) -> Tensor:
    x, axes = a["x"], [axis % a["x"].ndim for axis in a.setting("axes", list(range(a["x"].ndim)))]
    centred = x - x.mean(axes, keepdim=True)
    normal = centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + a.setting("epsilon", 1e-5))
    shape = [x.shape[i] if i in axes else 1 for i in range(x.ndim)]
    normal = normal * a["gamma"].reshape(shape) if "gamma" in a else normal
    return normal + a["beta"].reshape(shape) if "beta" in a else normal


def _instance_norm(a: Arguments) -> Tensor:
    gamma = a.get("gamma")
    beta = a.get("beta")
    return functional.instance_norm(a["x"], weight=gamma, bias=beta, eps=a.setting("epsilon", 1e-5))


def _upsample(a: Arguments) -> Tensor:
    """x (..., H, W) -> each row and column repeated; whole factors only, as the models here use."""
    rows, columns = a.setting("scale_factor_height", 1), a.setting("scale_factor_width", 1)
    if rows != int(rows) or columns != int(columns):
        raise ValueError(f"upsample_nearest_neighbor by {rows} x {columns}, expected whole factors")
    return a["x"].repeat_interleave(int(rows), -2).repeat_interleave(int(columns), -1)


def _expand_dims(a: Arguments) -> Tensor:
    x, axes = a["x"], a.setting("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Arguments) -> Tensor:
    axes = a.setting("axes")
    return a["x"].squeeze() if axes is None else a["x"].squeeze(tuple(axes))


def _concat(a: Arguments) -> Tensor:
    values = [value.reshape(1) if value.ndim == 0 else value for value in a.tensors("values")]
    if a.setting("interleave", False):
        axis = a.setting("axis")
        return torch.stack(values, axis + 1 if axis >= 0 else axis).flatten(axis, axis + 1)
    return torch.cat(values, a.setting("axis"))


def _split(a: Arguments) -> tuple[Tensor, ...]:
    axis, sizes = a.setting("axis"), a.setting("split_sizes")
    return tuple(torch.split(a["x"], sizes or a["x"].shape[axis] // a.setting("num_splits"), axis))


def _slice_by_index(a: Arguments) -> Tensor:
    """x[begin:end:stride] per axis; a mask takes a whole side, `squeeze_mask` takes one element and drops the axis."""
    x = a["x"]
    off = [False] * x.ndim
    begin, end = a.setting("begin"), a.setting("end")
    strides = a.setting("stride", [1] * x.ndim)
    from_start, to_end = a.setting("begin_mask", off), a.setting("end_mask", off)
    single = a.setting("squeeze_mask", off)
    for axis in range(x.ndim):
        size, step = x.shape[axis], strides[axis]
        first = begin[axis] + size if begin[axis] < 0 else begin[axis]
        last = end[axis] + size if end[axis] < 0 else end[axis]
        if single[axis]:
            chosen = [first]
        else:
            whole = range(size) if step > 0 else range(size - 1, -1, -1)
            low = whole[0] if from_start[axis] else first
            high = whole[-1] + (1 if step > 0 else -1) if to_end[axis] else last
            chosen = [i for i in range(low, high, step) if 0 <= i < size]
        x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x.squeeze(tuple(axis for axis in range(x.ndim) if single[axis])) if any(single) else x


def _slice_by_size(a: Arguments) -> Tensor:
    x = a["x"]
    for axis, (begin, size) in enumerate(zip(a.setting("begin"), a.setting("size"), strict=True)):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _gather(a: Arguments) -> Tensor:
    """x with axis `axis` replaced by the axes of `indices`; indices below 0 count from the end."""
    x, indices = a["x"], a["indices"].long()
    axis, batch = a.setting("axis", 0) % x.ndim, a.setting("batch_dims", 0)
    if batch:
        raise ValueError(f"gather with batch_dims = {batch}, expected 0")
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    taken = x.index_select(axis, indices.flatten())
    return taken.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_along_axis(a: Arguments) -> Tensor:
    axis = a.setting("axis", 0)
    indices = a["indices"].long()
    return torch.gather(a["x"], axis, torch.where(indices < 0, indices + a["x"].shape[axis], indices))


def _gather_nd(a: Arguments) -> Tensor:
    if a.setting("batch_dims", 0):
        raise ValueError(f"gather_nd with batch_dims = {a.setting('batch_dims')}, expected 0")
    return a["x"][tuple(a["indices"].long().movedim(-1, 0))]


def _pad(a: Arguments) -> Tensor:
    pads, mode = a.setting("pad"), a.setting("mode", "constant")
    axes = len(pads) // 2
    flat = [pads[2 * i + side] for i in reversed(range(axes)) for side in (0, 1)]
    if mode == "constant":
        return functional.pad(a["x"], flat, value=a.setting("constant_val", 0.0))
    x = a["x"]
    lead = x.shape[: x.ndim - axes]
    batched = x.reshape(1, -1, *x.shape[x.ndim - axes :])
    out = functional.pad(batched, flat, mode="replicate" if mode == "replicate" else "reflect")
    return out.reshape(*lead, *out.shape[2:])


def _fill(a: Arguments) -> Tensor:
    value = a["value"]
    return value.reshape(()).expand(a.setting("shape")).clone()


def _aligned(parameter: Tensor, like: Tensor, axis: int | None) -> Tensor:
    if parameter.ndim == 0 or axis is None:
        return parameter
    return parameter.reshape([-1 if i == axis % like.ndim else 1 for i in range(like.ndim)])


def _quantize(a: Arguments) -> Tensor:
    """round(input / scale) + zero_point, clamped to `output_dtype` (int8 or uint8); half goes to even."""
    x, axis = a["input"], a.setting("axis")
    kind = torch.iinfo(TORCH_TYPES[a.setting("output_dtype")])
    steps = torch.round(x / _aligned(a["scale"], x, axis))
    if "zero_point" in a:
        steps = steps + _aligned(a["zero_point"].float(), x, axis)
    return steps.clamp(kind.min, kind.max)


def _dequantize(a: Arguments) -> Tensor:
    x, axis = a["input"].float(), a.setting("axis")
    if "zero_point" in a:
        x = x - _aligned(a["zero_point"].float(), x, axis)
    return x * _aligned(a["scale"], x, axis)


def _floor_div(a: Arguments) -> Tensor:
    return torch.div(a["x"], a["y"], rounding_mode="floor")


def _unary(compute: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: compute(a["x"])


def _binary(compute: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda a: compute(a["x"], a["y"])


OPERATORS: dict[str, Callable[[Arguments], Result]] = {
    # element by element, one input
    "abs": _unary(torch.abs),
    "ceil": _unary(torch.ceil),
    "clip": lambda a: a["x"].clamp(a.setting("alpha"), a.setting("beta")),
    "cos": _unary(torch.cos),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "floor": _unary(torch.floor),
    "gelu": _gelu,
    "identity": _unary(torch.clone),
    "inverse": lambda a: 1.0 / (a["x"] + a.setting("epsilon", 1e-4)),
    "leaky_relu": lambda a: functional.leaky_relu(a["x"], a.setting("alpha", 0.01)),
    "log": lambda a: torch.log(a["x"] + a.setting("epsilon", 1e-45)),
    "logical_not": _unary(torch.logical_not),
    "relu": _unary(torch.relu),
    "round": _unary(torch.round),
    "rsqrt": lambda a: torch.rsqrt(a["x"] + a.setting("epsilon", 1e-12)),
    "sigmoid": _unary(torch.sigmoid),
    "sign": _unary(torch.sign),
    "silu": _unary(functional.silu),
    "sin": _unary(torch.sin),
    "softplus": _unary(functional.softplus),
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "tanh": _unary(torch.tanh),
    # element by element, two inputs
    "add": _binary(torch.add),
    "equal": _binary(torch.eq),
    "floor_div": _floor_div,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and),
    "logical_or": _binary(torch.logical_or),
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mod": _binary(torch.remainder),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "select": lambda a: torch.where(a["cond"], a["a"], a["b"]),
    "sub": _binary(torch.sub),
    # reductions, normalisation, products
    "batch_norm": _batch_norm,
    "conv": _conv,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "reduce_argmax": _argmax,
    "reduce_argmin": _argmin,
    "reduce_max": _reduced(lambda x, axes, keep: torch.amax(x, axes, keep)),
    "reduce_mean": _reduced(lambda x, axes, keep: torch.mean(x, axes, keep)),
    "reduce_min": _reduced(lambda x, axes, keep: torch.amin(x, axes, keep)),
    "reduce_sum": _reduced(lambda x, axes, keep: torch.sum(x, axes, keep)),
    "scaled_dot_product_attention": _attention,
    "softmax": lambda a: torch.softmax(a["x"], a.setting("axis", -1)),
    # shape and place
    "concat": _concat,
    "expand_dims": _expand_dims,
    "fill": _fill,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "pad": _pad,
    "reshape": lambda a: a["x"].reshape(a.setting("shape")),
    "shape": lambda a: torch.tensor(a["x"].shape, dtype=torch.int32),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda a: torch.stack(a.tensors("values"), a.setting("axis")),
    "tile": lambda a: a["x"].repeat(a.setting("reps")),
    "transpose": lambda a: a["x"].permute(a.setting("perm")),
    "pixel_shuffle": lambda a: functional.pixel_shuffle(a["x"], a.setting("upscale_factor", 1)),
    "upsample_nearest_neighbor": _upsample,
    # number formats
    "cast": _unary(torch.clone),  # the declared type of the result is the cast
    "dequantize": _dequantize,
    "quantize": _quantize,
}
