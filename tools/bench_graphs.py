"""The graphs that a benchmark's rows run, each written once from the same network: ours, Optimum's, NNCF's.

Every function takes the network's folder and an empty folder, and is called in a process of its own, so that what it
needs is not counted with what running a graph needs. Ours are the step graphs of a bundle; Optimum's is what its own
exporter writes with its defaults; NNCF's is its own post-training quantisation of that, on the steps that our ranges
come from too.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from latentrelay.tools.bench_source import Network

OPSET = 20
UNET, STEP, KERNELS = "model.onnx", "step_full.onnx", "kernels.json"


def version(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load_unet(network: Network) -> Any:
    """The network in torch, float32, evaluation mode."""
    from diffusers import UNet2DConditionModel
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    name = json.loads((network.unet / "config.json").read_text(encoding="utf-8"))["_class_name"]
    kind: Any = StudentUNet2DConditionModel if name.startswith("Student") else UNet2DConditionModel
    return kind.from_pretrained(network.unet, use_safetensors=True, local_files_only=True).eval()


def write_ours(network: Network, folder: Path, kernels: str) -> None:
    """unet and step graph in float32 for a kernel set, as a bundle has them: model.onnx, its data, step_full.onnx."""
    import torch
    from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx

    inputs = network.inputs()
    sample = torch.zeros(2, *inputs["latents"].shape[1:])
    export_onnx(
        UNetGraph(load_unet(network)),
        [sample, torch.tensor(1.0), torch.zeros(*inputs["encoder_hidden_states"].shape)],
        folder / UNET,
        inputs=["sample", "timestep", "encoder_hidden_states"],
        outputs=["out_sample"],
        opset=OPSET,
        batched=["sample", "encoder_hidden_states"],
        external=UNET_DATA,
        kernels=kernels,
    )
    _write_step(network, folder)


def write_quantised(network: Network, folder: Path, floating: Path, kernels: str) -> None:
    """Our w8a8 step graph for a kernel set from the float one, and kernels.json: the kernels that it really gets.

    Ranges come from the network's calibration steps. Raises UnfusedLayerError naming a layer that did not become an
    integer kernel.
    """
    import onnx_ir
    from latentrelay.compress.precision import recipe_for
    from latentrelay.export.activation_ranges import record_ranges
    from latentrelay.export.integer_kernels import count_integer_kernels
    from latentrelay.export.layers import layers_of
    from latentrelay.export.quantise_graph import quantise

    recipe = recipe_for(layers_of(onnx_ir.load(floating / UNET)), "w8a8", kernels)
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    ranges = record_ranges(floating / UNET, network.calibration(), threads=threads)
    quantise(floating / UNET, recipe, ranges, folder / UNET)
    _write_step(network, folder)
    if kernels != "openvino" or version("openvino") is not None:
        count = count_integer_kernels(folder / STEP, recipe)
        integer = {
            "convolutions": count.integer_convs,
            "linears": count.integer_linears,
            "activation_products": count.activation_products,
            "kernels": dict(count.kernels),
        }
        floats = {"names": list(count.float_list), "mac_share": count.float_mac_share}
        document = json.dumps({"integer_kernels": integer, "float_list": floats})
        (folder / KERNELS).write_text(document, encoding="utf-8")


def _write_step(network: Network, folder: Path) -> None:
    """step_full.onnx from the folder's model.onnx and the network's plan."""
    import torch
    from latentrelay.compress.plan import Plan
    from latentrelay.export.step_writer import write_step

    write_step(Plan.load(network.folder), folder / STEP, torch.from_numpy(network.inputs()["latents"]), OPSET)


def write_optimum(network: Network, folder: Path) -> None:
    """The U-Net by Optimum's exporter with its defaults: model.onnx (and its data)."""
    with warnings.catch_warnings(action="ignore"):  # the tracer's, about sizes that it takes as constants
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.model_configs import UNetOnnxConfig

        unet = load_unet(network)
        # Optimum's wrapper for U-Nets passes keyword arguments on, so the network itself is what is traced.
        config = UNetOnnxConfig(unet.config, task="semantic-segmentation")
        export(unet, config, folder / UNET, input_shapes=None)


def write_nncf(network: Network, folder: Path, optimum: Path) -> None:
    """NNCF's int8 of Optimum's graph as OpenVINO reads it, static shapes, default settings: model.xml and model.bin."""
    from latentrelay.runtime.openvino_backend import import_openvino

    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # NNCF reports its use too
    with warnings.catch_warnings(action="ignore"):
        openvino = import_openvino()
        import nncf

        model = static_model(openvino.Core(), network, optimum / UNET)
        feeds = [feeds for _, feeds in network.calibration()]
        quantised = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds))
        openvino.save_model(quantised, str(folder / "model.xml"), compress_to_fp16=False)


def static_model(core: Any, network: Network, graph: Path) -> Any:
    """A U-Net's graph as OpenVINO reads it, with the shapes of one guided step."""
    inputs = network.inputs()
    model = core.read_model(str(graph))
    shapes = {"sample": [2, *inputs["latents"].shape[1:]], "timestep": []}
    shapes["encoder_hidden_states"] = list(inputs["encoder_hidden_states"].shape)
    model.reshape(shapes)
    return model
