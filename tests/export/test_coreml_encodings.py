"""How Core ML stores compressed weights: one linear layer through every encoding, against the arithmetic by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.compress.precision import PRECISIONS, LayerRule
from latentrelay.export.coreml_bundle import GATES_DB
from latentrelay.export.coreml_compress import (
    ENCODINGS,
    WEIGHTS_OF,
    Encoding,
    compress,
    input_ranges,
    quantise_inputs,
)
from latentrelay.export.coreml_convert import convert, load_program, package_bytes, save_package
from latentrelay.export.coreml_graphs import PackageInput
from latentrelay.export.errors import ConversionError
from latentrelay.export.mil_interpreter import MilProgram

OUT, IN = 32, 128


class OneLinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT)
        generator = torch.Generator().manual_seed(0)
        self.layer.weight.data = torch.randn(OUT, IN, generator=generator).half().float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture(scope="module")
def converted() -> tuple[torch.nn.Module, dict[str, Any]]:
    module = OneLinear().eval()
    inputs = [PackageInput("x", (3, IN))]
    return module, {t: convert(module, inputs, ["y"], target=t, compute_units="ALL") for t in ("iOS16", "iOS18")}


def stored_weight(model: Any, package: Path) -> tuple[str, np.ndarray]:
    """The operator that expands the saved weight, and its values (OUT, IN)."""
    save_package(model, package)
    operations = load_program(package).functions["main"].operations
    (op,) = [op for op in operations if op.op_type.startswith("constexpr_")]
    return op.op_type, np.asarray(op.materialized_val_inference(), dtype=np.float64).reshape(OUT, IN)


def rounded(weight: np.ndarray, levels: int, block: int) -> np.ndarray:
    """Symmetric rounding: the largest of each block of `block` inputs becomes `levels`, scales in float16."""
    blocks = weight.reshape(OUT, -1, block)
    scale = (np.abs(blocks).max(-1, keepdims=True) / levels).astype(np.float16).astype(np.float64)
    return (np.clip(np.round(blocks / scale), -levels - 1, levels) * scale).reshape(OUT, IN)


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_encoding_is_what_it_says(converted: Any, name: str, tmp_path: Path) -> None:
    module, models = converted
    encoding = ENCODINGS[name]
    operator, stored = stored_weight(compress(models[encoding.needs], name), tmp_path / "layer.mlpackage")
    assert operator == encoding.operator or encoding.needs == "iOS16"
    weight = module.layer.weight.detach().numpy().astype(np.float64)
    if encoding.kind == "linear":
        wanted = rounded(weight, 2 ** (encoding.bits - 1) - 1, encoding.block or IN)
        step = np.abs(weight).max() / (2 ** (encoding.bits - 1) - 1)
        assert np.mean(np.abs(stored - wanted) > 0.12 * step) < 0.02  # ties; float16 rounds the product
        assert np.abs(stored - wanted).max() <= 1.12 * step
    else:
        rows = stored.reshape(-1, encoding.block or OUT, IN)
        assert all(len(np.unique(group)) <= 2**encoding.bits for group in rows)
        error = np.sum((stored - weight) ** 2) / np.sum(weight**2)
        # the best 2^b levels for normal numbers (Max 1960) leave 0.0095 at 4 bits and a quarter of it with every bit
        assert error < 0.0125 * 4.0 ** (4 - encoding.bits)


def test_bytes_follow_the_bits(converted: Any, tmp_path: Path) -> None:
    model, sizes = converted[1]["iOS18"], {}
    for name in ("linear8", "palette6", "linear4_block32"):
        sizes[name] = save_package(compress(model, name), tmp_path / f"{name}.mlpackage")
        weights = package_bytes(tmp_path / f"{name}.mlpackage" / "Data/com.apple.CoreML/weights")
        assert ENCODINGS[name].bits * OUT * IN / 8 <= weights <= ENCODINGS[name].bits * OUT * IN / 8 + 1500
    assert sizes["linear4_block32"] < sizes["palette6"] < sizes["linear8"]


def test_int8_needs_no_more_than_ios16(converted: Any, tmp_path: Path) -> None:
    operator, stored = stored_weight(compress(converted[1]["iOS16"], "linear8"), tmp_path / "layer.mlpackage")
    assert operator == "constexpr_affine_dequantize"
    weight = converted[0].layer.weight.detach().numpy()
    assert np.abs(stored - weight).max() <= np.abs(weight).max() / 127 * 0.65  # half a step, and float16


def test_rules_choose_by_layer(converted: Any, tmp_path: Path) -> None:
    model = converted[1]["iOS18"]
    kept = compress(model, "linear8", {"layer": LayerRule("float16", "float16")}, prefix="")
    save_package(kept, tmp_path / "kept.mlpackage")
    operations = load_program(tmp_path / "kept.mlpackage").functions["main"].operations
    assert not any(op.op_type.startswith("constexpr_") for op in operations)
    four = compress(model, None, {"layer": LayerRule("int4", "float16", group=64)}, prefix="")
    operator, stored = stored_weight(four, tmp_path / "four.mlpackage")
    assert operator == "constexpr_blockwise_shift_scale"
    weight = converted[0].layer.weight.detach().numpy().astype(np.float64)
    assert np.mean(np.abs(stored - rounded(weight, 7, 64)) > 1e-3) < 0.02


def test_a_low_rank_branch_is_refused(converted: Any) -> None:
    with pytest.raises(ConversionError, match="layer: a low-rank branch of rank 4 has no Core ML form"):
        compress(converted[1]["iOS18"], None, {"layer": LayerRule("int4", "float16", rank=4)}, prefix="")


def test_activations_are_rounded_as_in_torch(tmp_path: Path) -> None:
    module = OneLinear().eval()
    x = np.random.default_rng(0).uniform(-1.5, 3.0, (3, IN)).astype(np.float32)
    ranges = input_ranges(module, lambda: module(torch.from_numpy(x)))
    assert ranges == {"layer": (float(x.min()), float(x.max()))}
    with quantise_inputs(module, ranges):
        model = convert(module, [PackageInput("x", x.shape)], ["y"], target="iOS17", compute_units="ALL")
    assert not module.layer._forward_pre_hooks
    save_package(model, tmp_path / "layer.mlpackage")
    program = MilProgram(tmp_path / "layer.mlpackage")
    assert [op.op_type for op in program.operations if "quantize" in op.op_type] == ["quantize", "dequantize"]
    scale, half = float(np.float16(np.abs(x).max() / 127)), x.astype(np.float16).astype(np.float64)
    weight, bias = module.layer.weight.detach().numpy(), module.layer.bias.detach().numpy()
    wanted = np.clip(np.round(half / scale), -128, 127) * scale @ weight.T + bias
    got = program({"x": x})["y"]
    plain = x @ weight.T + bias
    assert np.sqrt(np.mean((got - wanted) ** 2)) < 0.25 * np.sqrt(np.mean((plain - wanted) ** 2))


def test_every_precision_has_an_encoding_and_a_gate() -> None:
    assert set(WEIGHTS_OF) == set(GATES_DB) == set(PRECISIONS)
    assert all(name is None or name in ENCODINGS for name in WEIGHTS_OF.values())
    assert [Encoding("linear", 8).needs, Encoding("linear", 4, 32).needs, Encoding("palette", 4).needs] == [
        "iOS16",
        "iOS18",
        "iOS16",
    ]
