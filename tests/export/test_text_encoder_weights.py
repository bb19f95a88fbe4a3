"""The compressed text encoder against the float one in ONNX Runtime, on the tiny pipeline's and the reference's."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from latentrelay.export.errors import ExportError
from latentrelay.export.onnx_graphs import TextEncoderGraph, export_onnx
from latentrelay.export.parity import snr_db
from latentrelay.export.text_encoder_weights import compress_text_encoder


def exported(encoder: Any, tokens: int, folder: Path) -> Path:
    path = folder / "float" / "model.onnx"
    path.parent.mkdir()
    arguments = [torch.zeros(2, tokens, dtype=torch.int64)]
    outputs = ["last_hidden_state", "pooler_output"]
    export_onnx(
        TextEncoderGraph(encoder),
        arguments,
        path,
        inputs=["input_ids"],
        outputs=outputs,
        opset=20,
        batched=["input_ids"],
    )
    return path


def lowest_db(graphs: tuple[Path, Path], ids: np.ndarray) -> float:
    found = []
    for path in graphs:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(session.run(["last_hidden_state", "pooler_output"], {"input_ids": ids}))
    return min(snr_db(reference, got) for reference, got in zip(*found, strict=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The reference's float graph, and the ids of sixteen captions of the calibrate split."""
    from latentrelay.reference.captions import sample_captions
    from latentrelay.reference.pipeline import load

    pipeline = load()
    prompts = ["", *(caption.text for _, caption in sample_captions("calibrate", 16, 5))]
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=32, return_tensors="np").input_ids
    return exported(pipeline.text_encoder, 32, tmp_path_factory.mktemp("text")), ids.astype(np.int64)


@pytest.mark.parametrize(("weights", "most", "least_db"), [("int8", 0.30, 40.0), ("float16", 0.53, 65.0)])
def test_reference_text_encoder(weights, most, least_db, reference, tmp_path):
    graph, ids = reference
    out = tmp_path / "model.onnx"
    sizes = compress_text_encoder(graph, out, "onnxruntime-x64", weights)
    assert sizes == {"float32": graph.stat().st_size, "compressed": out.stat().st_size}
    assert sizes["compressed"] <= most * sizes["float32"]
    found = lowest_db((graph, out), ids)
    print(f"{sizes['compressed'] / sizes['float32']:.3f} of the bytes, {found:.1f} dB")
    assert found >= least_db


def test_the_table_is_gathered_before_it_is_widened(tiny_pipeline, tmp_path):
    graph = exported(tiny_pipeline.text_encoder, 16, tmp_path)
    compress_text_encoder(graph, tmp_path / "model.onnx", "openvino")
    model = onnx_ir.load(tmp_path / "model.onnx")
    table = next(value for name, value in model.graph.initializers.items() if name.endswith("token_embedding.weight_q"))
    assert table.dtype == onnx_ir.DataType.INT8
    assert [use.node.op_type for use in table.uses()] == ["Gather"]
    assert not [node.op_type for node in model.graph if node.domain]  # standard operators only
    ids = np.random.default_rng(0).integers(0, 500, (2, 16))
    assert lowest_db((graph, tmp_path / "model.onnx"), ids) >= 38.0


def test_a_graph_without_a_token_table_is_refused(tmp_path):
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="r")
    graph = onnx.helper.make_graph([node], "g", [info("x", 1, [1])], [info("y", 1, [1])])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="has no token table: got 0 gathers"):
        compress_text_encoder(tmp_path / "model.onnx", tmp_path / "out.onnx", "onnxruntime-x64")


@pytest.mark.full_size
def test_clip_vit_l_geometry(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    graph = exported(CLIPTextModel(config), 77, tmp_path)
    sizes = compress_text_encoder(graph, tmp_path / "model.onnx", "onnxruntime-x64")
    assert sizes["float32"] > 490e6
    assert sizes["compressed"] <= 0.3 * sizes["float32"]
    ids = np.random.default_rng(0).integers(0, 49_000, (2, 77))
    ids[:, -1] = 49_407
    found = lowest_db((graph, tmp_path / "model.onnx"), ids)
    print(f"{sizes['compressed'] / sizes['float32']:.4f} of the bytes, {found:.1f} dB")
    assert found >= 30.0  # random weights: the hardest case, trained ones are ten dB better (above)
