"""The interpreter of Core ML programs, operator by operator: each one built in MIL, saved, read back and run, against
torch's own function on the same numbers. Expectations are torch calls, not the interpreter's table."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.export.coreml_convert import save_package
from latentrelay.export.coremltools_import import coremltools, quiet
from latentrelay.export.errors import UnknownOperatorError
from latentrelay.export.mil_interpreter import MilProgram
from latentrelay.export.mil_operators import OPERATORS
from torch.nn import functional as F

mb = coremltools.converters.mil.Builder
types = coremltools.converters.mil.mil.types
RNG = np.random.default_rng(0)


def numbers(*shape: int, low: float = -2.0, high: float = 2.0) -> np.ndarray:
    """Float32 numbers away from zero and from halves, so that no comparison or rounding hangs on the last bit."""
    return (np.round(RNG.uniform(low, high, shape) * 50) / 50 + 0.003).astype(np.float32)


X = numbers(2, 3, 4)
Y = numbers(2, 3, 4)
POSITIVE = numbers(2, 3, 4, low=0.1, high=3.0)
PICTURE = numbers(2, 6, 5, 7)
WEIGHT, BIAS = numbers(4, 3, 3, 3), numbers(4)
SCALE = np.float32(0.05)

# operator -> (inputs by name, the MIL expression, torch's); where one operator has several forms, "name/form"
Case = tuple[dict[str, np.ndarray], Callable[..., Any], Callable[..., Any]]
ONE: dict[str, tuple[np.ndarray, Callable[[torch.Tensor], torch.Tensor]]] = {
    "abs": (X, torch.abs),
    "ceil": (X, torch.ceil),
    "cos": (X, torch.cos),
    "erf": (X, torch.erf),
    "exp": (X, torch.exp),
    "floor": (X, torch.floor),
    "identity": (X, lambda x: x),
    "relu": (X, F.relu),
    "round": (X, torch.round),
    "sigmoid": (X, torch.sigmoid),
    "sign": (X, torch.sign),
    "silu": (X, F.silu),
    "sin": (X, torch.sin),
    "softplus": (X, F.softplus),
    "sqrt": (POSITIVE, torch.sqrt),
    "square": (X, torch.square),
    "tanh": (X, torch.tanh),
}
TWO: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "equal": lambda x, y: (x == y).float(),
    "floor_div": torch.floor_divide,
    "greater": lambda x, y: (x > y).float(),
    "greater_equal": lambda x, y: (x >= y).float(),
    "less": lambda x, y: (x < y).float(),
    "less_equal": lambda x, y: (x <= y).float(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": lambda x, y: (x != y).float(),
    "real_div": torch.div,
    "sub": torch.sub,
}
REDUCED: dict[str, Callable[..., torch.Tensor]] = {
    "reduce_max": torch.amax,
    "reduce_mean": torch.mean,
    "reduce_min": torch.amin,
    "reduce_sum": torch.sum,
}


def logic(name: str) -> Case:
    """A logical operator between x > 0 and y > 0."""
    torch_one = getattr(torch, name)

    def build(x: Any, y: Any) -> Any:
        return mb.cast(x=getattr(mb, name)(x=mb.greater(x=x, y=0.0), y=mb.greater(x=y, y=0.0)), dtype="fp32")

    return {"x": X, "y": Y}, build, lambda x, y: torch_one(x > 0, y > 0).float()


CASES: dict[str, Case] = {
    **{name: ({"x": x}, (lambda x, n=name: getattr(mb, n)(x=x)), run) for name, (x, run) in ONE.items()},
    **{
        name: (
            {"x": X, "y": np.where(X > 1, X, Y)},
            (lambda x, y, n=name: mb.cast(x=getattr(mb, n)(x=x, y=y), dtype="fp32")),
            run,
        )
        for name, run in TWO.items()
    },
    **{
        name: (
            {"x": X},
            (lambda x, n=name: getattr(mb, n)(x=x, axes=[0, 2], keep_dims=True)),
            (lambda x, r=run: r(x, (0, 2), True)),
        )
        for name, run in REDUCED.items()
    },
    "reduce_sum/all": ({"x": X}, lambda x: mb.expand_dims(x=mb.reduce_sum(x=x), axes=[0]), lambda x: x.sum()[None]),
    "logical_and": logic("logical_and"),
    "logical_or": logic("logical_or"),
    "logical_not": (
        {"x": X},
        lambda x: mb.cast(x=mb.logical_not(x=mb.greater(x=x, y=0.0)), dtype="fp32"),
        lambda x: (x <= 0).float(),
    ),
    "add/broadcast": ({"x": X, "y": numbers(4)}, lambda x, y: mb.add(x=x, y=y), lambda x, y: x + y),
    "clip": ({"x": X}, lambda x: mb.clip(x=x, alpha=-0.5, beta=1.25), lambda x: x.clamp(-0.5, 1.25)),
    "gelu": ({"x": X}, lambda x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    "gelu/tanh": (
        {"x": X},
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu/sigmoid": (
        {"x": X},
        lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        lambda x: x * torch.sigmoid(1.702 * x),
    ),
    "inverse": ({"x": POSITIVE}, lambda x: mb.inverse(x=x, epsilon=1e-3), lambda x: 1 / (x + 1e-3)),
    "leaky_relu": ({"x": X}, lambda x: mb.leaky_relu(x=x, alpha=0.2), lambda x: F.leaky_relu(x, 0.2)),
    "log": ({"x": POSITIVE}, lambda x: mb.log(x=x, epsilon=1e-3), lambda x: torch.log(x + 1e-3)),
    "rsqrt": ({"x": POSITIVE}, lambda x: mb.rsqrt(x=x, epsilon=1e-3), lambda x: torch.rsqrt(x + 1e-3)),
    "pow": ({"x": POSITIVE}, lambda x: mb.pow(x=x, y=1.7), lambda x: x**1.7),
    "select": (
        {"x": X, "y": Y},
        lambda x, y: mb.select(cond=mb.greater(x=x, y=0.5), a=x, b=y),
        lambda x, y: torch.where(x > 0.5, x, y),
    ),
    "softmax": ({"x": X}, lambda x: mb.softmax(x=x, axis=1), lambda x: torch.softmax(x, 1)),
    "reduce_argmax": (
        {"x": X},
        lambda x: mb.cast(x=mb.reduce_argmax(x=x, axis=1, keep_dims=False), dtype="fp32"),
        lambda x: x.argmax(1).float(),
    ),
    "reduce_argmin": (
        {"x": np.round(X)},  # with equals: the first wins
        lambda x: mb.cast(x=mb.reduce_argmin(x=x, axis=1, keep_dims=True), dtype="fp32"),
        lambda x: (torch.arange(3.0)[:, None] + 9 * (x != x.amin(1, keepdim=True))).amin(1, keepdim=True),
    ),
    "cast": ({"x": X}, lambda x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"), lambda x: x.int().float()),
    "cast/half": ({"x": X}, lambda x: mb.cast(x=mb.cast(x=x, dtype="fp16"), dtype="fp32"), lambda x: x.half().float()),
    # products and normalisation
    "linear": (
        {"x": X},
        lambda x: mb.linear(x=x, weight=WEIGHT[0, 0, :, :1].repeat(4, 1), bias=BIAS[:3]),
        lambda x: F.linear(x, torch.from_numpy(WEIGHT[0, 0, :, :1].repeat(4, 1)), torch.from_numpy(BIAS[:3])),
    ),
    "matmul": (
        {"x": X, "y": Y},
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=False, transpose_y=True),
        lambda x, y: x @ y.mT,
    ),
    "matmul/left": ({"x": X, "y": Y}, lambda x, y: mb.matmul(x=x, y=y, transpose_x=True), lambda x, y: x.mT @ y),
    "conv": (
        {"x": PICTURE[:, :3]},
        lambda x: mb.conv(
            x=x, weight=WEIGHT, bias=BIAS, strides=[2, 1], pad_type="custom", pad=[1, 0, 2, 1], dilations=[1, 2]
        ),
        lambda x: F.conv2d(
            F.pad(x, (2, 1, 1, 0)), torch.from_numpy(WEIGHT), torch.from_numpy(BIAS), stride=(2, 1), dilation=(1, 2)
        ),
    ),
    "conv/groups": (
        {"x": PICTURE},
        lambda x: mb.conv(x=x, weight=WEIGHT, groups=2, pad_type="valid"),
        lambda x: F.conv2d(x, torch.from_numpy(WEIGHT), groups=2),
    ),
    "conv/same": (
        {"x": PICTURE[:, :3]},
        lambda x: mb.conv(x=x, weight=WEIGHT, pad_type="same"),
        lambda x: F.conv2d(x, torch.from_numpy(WEIGHT), padding="same"),
    ),
    "batch_norm": (
        {"x": PICTURE[:, :4]},
        lambda x: mb.batch_norm(x=x, mean=BIAS, variance=BIAS**2 + 0.5, gamma=BIAS + 1, beta=BIAS - 1, epsilon=1e-3),
        lambda x: F.batch_norm(
            x, *(torch.from_numpy(v.astype(np.float32)) for v in (BIAS, BIAS**2 + 0.5, BIAS + 1, BIAS - 1)), eps=1e-3
        ),
    ),
    "layer_norm": (
        {"x": X},
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=BIAS, beta=BIAS + 1, epsilon=1e-3),
        lambda x: F.layer_norm(x, (4,), torch.from_numpy(BIAS), torch.from_numpy(BIAS + 1), eps=1e-3),
    ),
    "instance_norm": (
        {"x": PICTURE[:, :4]},
        lambda x: mb.instance_norm(x=x, gamma=BIAS, beta=BIAS + 1, epsilon=1e-3),
        lambda x: F.instance_norm(x, weight=torch.from_numpy(BIAS), bias=torch.from_numpy(BIAS + 1), eps=1e-3),
    ),
    "scaled_dot_product_attention": (
        {"q": X, "k": Y, "v": POSITIVE},
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        lambda q, k, v: torch.softmax(q @ k.mT / 2.0, -1) @ v,  # 4 channels
    ),
    "scaled_dot_product_attention/mask": (
        {"q": X, "k": Y, "v": POSITIVE, "m": numbers(3, 3)},
        lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
        lambda q, k, v, m: torch.softmax(q @ k.mT / 2.0 + m, -1) @ v,
    ),
    # shape and place
    "concat": ({"x": X, "y": Y}, lambda x, y: mb.concat(values=[x, y], axis=1), lambda x, y: torch.cat([x, y], 1)),
    "concat/interleave": (
        {"x": X, "y": Y},
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: torch.stack([x, y], 2).reshape(2, 6, 4),
    ),
    "expand_dims": ({"x": X}, lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None]),
    "fill": (
        {"x": X},
        lambda x: mb.add(x=x, y=mb.fill(shape=mb.shape(x=x), value=1.5)),
        lambda x: x + torch.full((2, 3, 4), 1.5),
    ),
    "gather": (
        {"x": X},
        lambda x: mb.gather(x=x, indices=np.array([[2, 0], [1, 1]], np.int32), axis=1),
        lambda x: x[:, [[2, 0], [1, 1]]],
    ),
    "gather_along_axis": (
        {"x": X},
        lambda x: mb.gather_along_axis(x=x, indices=np.full((2, 1, 4), 2, np.int32), axis=1),
        lambda x: torch.gather(x, 1, torch.full((2, 1, 4), 2)),
    ),
    "gather_nd": (
        {"x": X},
        lambda x: mb.gather_nd(x=x, indices=np.array([[1, 2], [0, 1]], np.int32)),
        lambda x: torch.stack([x[1, 2], x[0, 1]]),
    ),
    "pad": (
        {"x": PICTURE},
        lambda x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="constant", constant_val=0.5),
        lambda x: F.pad(x, (2, 1, 1, 0), value=0.5),
    ),
    "pad/reflect": (
        {"x": PICTURE},
        lambda x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="reflect"),
        lambda x: F.pad(x, (2, 1, 1, 0), mode="reflect"),
    ),
    "reshape": ({"x": X}, lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, -1)),
    "shape": (
        {"x": X},
        lambda x: mb.add(
            x=mb.reduce_sum(x=x, axes=[0, 1]), y=mb.cast(x=mb.gather(x=mb.shape(x=x), indices=2), dtype="fp32")
        ),
        lambda x: x.sum((0, 1)) + 4,
    ),
    "slice_by_index": (
        {"x": PICTURE},
        lambda x: mb.slice_by_index(x=x, begin=[0, -3, 4, 1], end=[2, 6, 0, 6], stride=[1, 1, -2, 2]),
        lambda x: x[:, 3:6, [4, 2], 1:6:2],
    ),
    "slice_by_index/masks": (
        {"x": PICTURE},
        lambda x: mb.slice_by_index(
            x=x,
            begin=[1, 2, 1, 0],
            end=[2, 3, 4, 5],
            begin_mask=[False, True, False, False],
            end_mask=[False, False, True, False],
            squeeze_mask=[True, False, False, False],
        ),
        lambda x: x[1, :3, 1:, :5],
    ),
    "slice_by_size": (
        {"x": X},
        lambda x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[1, -1, 2]),
        lambda x: x[0:1, 1:, 1:3],
    ),
    "split": (
        {"x": PICTURE},
        lambda x: mb.sub(x=(s := mb.split(x=x, num_splits=2, axis=1))[0], y=s[1]),
        lambda x: x[:, :3] - x[:, 3:],
    ),
    "split/sizes": (
        {"x": PICTURE},
        lambda x: mb.split(x=x, split_sizes=[2, 4], axis=1)[1],
        lambda x: x[:, 2:],
    ),
    "squeeze": ({"x": X[:1]}, lambda x: mb.squeeze(x=x, axes=[0]), lambda x: x[0]),
    "stack": ({"x": X, "y": Y}, lambda x, y: mb.stack(values=[x, y], axis=1), lambda x, y: torch.stack([x, y], 1)),
    "tile": ({"x": X}, lambda x: mb.tile(x=x, reps=[1, 2, 3]), lambda x: x.repeat(1, 2, 3)),
    "transpose": ({"x": X}, lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.permute(2, 0, 1)),
    "pixel_shuffle": (
        {"x": numbers(1, 8, 3, 2)},
        lambda x: mb.pixel_shuffle(x=x, upscale_factor=2),
        lambda x: F.pixel_shuffle(x, 2),
    ),
    "upsample_nearest_neighbor": (
        {"x": PICTURE},
        lambda x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
    ),
    # number formats
    "quantize": (
        {"x": numbers(2, 3, low=-9, high=9)},
        lambda x: mb.cast(x=mb.quantize(input=x, scale=SCALE, output_dtype="int8"), dtype="fp32"),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127) / 0.05,
    ),
    "quantize/zero_point": (
        {"x": numbers(2, 3, low=-4, high=9)},
        lambda x: mb.cast(
            x=mb.quantize(input=x, scale=SCALE, zero_point=np.uint8(77), output_dtype="uint8"), dtype="fp32"
        ),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 77, 0, 255) / 0.05 + 77,
    ),
    "dequantize": (
        {"x": numbers(2, 3, low=-9, high=9)},
        lambda x: mb.dequantize(input=mb.quantize(input=x, scale=SCALE, output_dtype="int8"), scale=SCALE),
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127),
    ),
}


def packaged(inputs: dict[str, np.ndarray], build: Callable[..., Any], folder: Path) -> MilProgram:
    """The expression (or a tuple of them) as a saved iOS 18 package, no optimisation in between, and read back."""
    specs = [mb.TensorSpec(shape=array.shape) for array in inputs.values()]
    names = ", ".join(inputs)  # mb.program reads the names off the function's signature
    function = eval(f"lambda {names}: build({names})", {"build": build})
    with quiet():
        program = mb.program(input_specs=specs, opset_version=coremltools.target.iOS18)(function)
        model = coremltools.convert(
            program,
            minimum_deployment_target=coremltools.target.iOS18,
            pass_pipeline=coremltools.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    save_package(model, folder / "case.mlpackage")
    return MilProgram(folder / "case.mlpackage")


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Every case's result, out of one program that holds them all."""
    inputs = {f"case{i}_{name}": array for i, case in enumerate(CASES.values()) for name, array in case[0].items()}

    def build(*values: Any) -> Any:
        left, results = list(values), []
        for given, expression, _ in CASES.values():
            results.append(expression(*(left.pop(0) for _ in given)))
        return tuple(results)

    program = packaged(inputs, build, tmp_path_factory.mktemp("operators"))
    assert {op.op_type for op in program.operations} == set(OPERATORS)
    outputs = program(inputs)
    return dict(zip(CASES, (outputs[name] for name in program.outputs), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_torch(name: str, computed: dict[str, np.ndarray]) -> None:
    inputs, _, expected = CASES[name]
    wanted = expected(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    assert computed[name].shape == wanted.shape
    np.testing.assert_allclose(computed[name], wanted, rtol=2e-5, atol=2e-6)


def test_every_operator_has_a_case() -> None:
    assert {name.split("/")[0] for name in CASES} == set(OPERATORS)


def test_results_are_rounded_to_the_declared_type(tmp_path: Path) -> None:
    # 2048 + 1 has no float16; 1/3 is 0.33325 there
    inputs = {"x": np.array([2048.0, 1 / 3], np.float32)}
    program = packaged(
        inputs,
        lambda x: mb.cast(x=mb.add(x=mb.cast(x=x, dtype="fp16"), y=np.float16(1.0)), dtype="fp32"),
        tmp_path,
    )
    got = program(inputs)[program.outputs[0]]
    assert got.tolist() == [2048.0, float(np.float16(np.float16(1 / 3) + np.float16(1)))]
    assert not math.isclose(got[1], 4 / 3, rel_tol=1e-5)


def test_compressed_weights_are_expanded_as_stored(tmp_path: Path) -> None:
    stored, scale = np.array([[3, -4], [7, 1]], np.int8), np.array([[0.5], [0.25]], np.float32)
    inputs = {"x": np.array([[1.0, 10.0]], np.float32)}

    def build(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=stored, scale=scale))

    program = packaged(inputs, build, tmp_path)
    # rows (1.5, -2.0) and (1.75, 0.25) on (1, 10)
    assert program(inputs)[program.outputs[0]].tolist() == [[-18.5, 4.25]]


def test_an_unknown_operator_is_named_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(UnknownOperatorError, match=r"atan.*whose output is") as caught:
        packaged({"x": X}, lambda x: mb.relu(x=mb.atan(x=x)), tmp_path)
    assert caught.value.operator == "atan"


def test_wrong_inputs_are_refused(tmp_path: Path) -> None:
    program = packaged({"x": X}, lambda x: mb.relu(x=x), tmp_path)
    with pytest.raises(ValueError, match=r"inputs are \['y'\], expected \['x'\]"):
        program({"y": X})
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 5\), expected \(2, 3, 4\)"):
        program({"x": numbers(2, 3, 5)})
