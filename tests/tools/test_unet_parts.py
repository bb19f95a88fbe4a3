"""The graphs that `devices measure` times: read by the onnx package, counted, run, and 8 bits where they should be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.tools.onnx_writer import GraphWriter, _varint
from latentrelay.tools.unet_parts import PARTS, WHOLE_MACS, Part, part_graph, part_inputs

SMALL = [Part("resnet", 8, 64), Part("transformer", 16, 64)]
IDS = ["resnet", "transformer"]


def session(model: bytes, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def test_numbers_as_protobuf_writes_them() -> None:
    assert _varint(0) == b"\x00"
    assert _varint(300) == b"\xac\x02"
    assert _varint(-1) == b"\xff" * 9 + b"\x01"


def test_a_graph_of_every_kind_of_field_computes_what_numpy_computes() -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((2, 3), np.float32), rng.standard_normal((3, 4), np.float32)
    graph = GraphWriter("tiny")
    product = graph.add("MatMul", graph.input("x", (2, 3)), graph.constant(weight))
    low, high = graph.add_many("Split", 2, product, axis=1, num_outputs=2)
    soft = graph.add("LeakyRelu", graph.add("Transpose", low, perm=[1, 0]), alpha=0.25)
    flat = graph.add("Reshape", soft, graph.constant(np.array([1, -1], np.int64)))
    graph.output(flat, (1, 4))
    graph.output(high, (2, 2))
    model = graph.to_bytes()
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    got, rest = session(model).run(None, {"x": x})
    expected = (x @ weight)[:, :2].T
    np.testing.assert_allclose(got[0], np.where(expected > 0, expected, 0.25 * expected).ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rest, (x @ weight)[:, 2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", SMALL, ids=IDS)
def test_parts_are_valid_finite_and_8_bits_stay_near(part: Part) -> None:
    inputs = part_inputs(part)
    for int8 in (False, True):
        model = part_graph(part, int8=int8)
        onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
        (y,) = session(model).run(None, inputs)
        assert y.shape == (1, part.width, part.side, part.side)
        assert np.isfinite(y).all()
        assert 1.0 < y.std() < 3.0  # the block adds to its input of variance 1
    assert part_graph(part, int8=True) == part_graph(part, int8=True)


@pytest.mark.parametrize("part", SMALL, ids=IDS)
def test_multiply_adds_are_the_graphs_own(part: Part) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(part_graph(part, int8=False)))
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        shapes[value.name] = tuple(each.dim_value for each in value.type.tensor_type.shape.dim)
    macs = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            macs += int(np.prod(shapes[node.output[0]])) * int(np.prod(shapes[node.input[1]][1:]))
        elif node.op_type == "MatMul":
            macs += int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-1]
    assert macs == part.macs


@pytest.mark.parametrize(("part", "layers"), [(SMALL[0], 3), (SMALL[1], 12)], ids=IDS)
def test_onnx_runtime_computes_the_weighted_layers_in_8_bits(part: Part, layers: int, tmp_path: Path) -> None:
    session(part_graph(part, int8=True), tmp_path / "optimised.onnx")
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] + counts["QLinearMatMul"] + counts["MatMulIntegerToFloat"] == layers
    assert counts["Conv"] == 0
    assert counts["MatMul"] + counts["FusedMatMul"] == (4 if part.kind == "transformer" else 0)


def test_the_whole_is_sd_1_5() -> None:
    """Multiply-adds of diffusers' own U-Net, counted by hooks on the meta device, by side and kind of block."""
    counted: Counter[tuple[int, str]] = Counter()
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        inputs = torch.randn(1, 4, 64, 64), torch.tensor([1]), torch.randn(1, 77, 768)
    assert sum(each.numel() for each in unet.parameters()) == 859_520_964
    sides = {"down_blocks.0": 64, "down_blocks.1": 32, "down_blocks.2": 16, "up_blocks.1": 16, "up_blocks.2": 32}
    sides |= {"up_blocks.3": 64}

    def count(name: str, module: torch.nn.Module, output: torch.Tensor) -> None:
        kind = "transformer" if ".attentions." in name else "resnet"
        if isinstance(module, torch.nn.Conv2d):
            side, each = int(output.shape[-1]), module.in_channels * module.kernel_size[0] ** 2
        elif isinstance(module, torch.nn.Linear):
            side = next((side for block, side in sides.items() if name.startswith(block)), 8)
            each = module.in_features
        else:
            return
        counted[16 if (side, kind) == (8, "transformer") else side, kind] += output.numel() * each

    for name, module in unet.named_modules():
        module.register_forward_hook(lambda module, _, output, name=name: count(name, module, output))
    unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2])
    for side, width, blocks in ((64, 320, 5), (32, 640, 5), (16, 1280, 5), (8, 1280, 1)):
        products = 2 * side**4 * width + 2 * side**2 * 77 * width
        counted[max(side, 16), "transformer"] += blocks * products
    assert dict(counted) == WHOLE_MACS


def test_every_part_stands_for_a_handful_of_blocks() -> None:
    """5 transformers a level, and the middle's; resnets count more than once where the up path's inputs are wider."""
    weights = {(part.side, part.kind): part.weight for part in PARTS}
    assert weights[64, "transformer"] == pytest.approx(5, abs=0.01)
    assert weights[32, "transformer"] == pytest.approx(5, abs=0.01)
    assert 5 < weights[16, "transformer"] < 5.5
    assert all(5 < weights[side, "resnet"] < 10 for side in (64, 32, 16, 8))
    assert sum(part.weight * part.macs for part in PARTS) == pytest.approx(401.64e9, rel=1e-3)
