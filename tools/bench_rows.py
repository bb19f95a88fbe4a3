"""What a benchmark compares, one row each: which graph, which library runs it, what must be installed.

`open_row` loads one row's network in the process it is called in and returns something to call: one guided step at
batch 2. The rivals' calls are the U-Net alone; ours are whole sampler steps (guidance, solver and tables included), run
through the runtime's backends as a bundle is. `guided` turns either answer into the same array for comparison.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.backend import open_backend
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from latentrelay.tools.bench_graphs import STEP, UNET, load_unet, static_model, version
from latentrelay.tools.bench_source import GUIDANCE, Feeds, Network
from numpy.typing import NDArray

Outputs = dict[str, NDArray[Any]]
CPU = "CPUExecutionProvider"
# Between two rows nothing may burn the cores: ONNX Runtime's pool spins during a run and not after it.
CALM = {"session.force_spinning_stop": "1"}


@dataclass(frozen=True)
class Row:
    """`graph`: the stage that writes what is run ("network": the torch weights); `library` opens it; `packages` must be
    installed; `ours`: a step graph; `precision`: OpenVINO's for what is not quantised; `settings`: session options;
    `asked_only`: left out unless it is named."""

    name: str
    graph: str
    library: str
    packages: tuple[str, ...] = ()
    ours: bool = False
    precision: str = "f32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    asked_only: bool = False


@dataclass(frozen=True)
class Opened:
    """One loaded row: `run()` does the step, `ran` says on and in what, `files` is what it was loaded from."""

    run: Callable[[], Outputs]
    ran: str
    files: tuple[Path, ...]


BASELINE, NNCF_ROW = "optimum-onnxruntime-fp32", "nncf-openvino-int8"
OPTIMUM = ("optimum-onnx",)
BUNDLE = "bundle"
ROWS = (
    Row("torch-eager-fp32", "network", "torch"),
    Row("torch-compile-fp32", "network", "torch-compile"),
    Row(BASELINE, "optimum", "onnxruntime", OPTIMUM),
    Row("latentrelay-onnxruntime-fp32", "ours-fp32-onnxruntime", "onnxruntime", ours=True),
    Row("latentrelay-onnxruntime-w8a8", "ours-w8a8-onnxruntime", "onnxruntime", ours=True),
    Row("openvino-f32", "optimum", "openvino", ("openvino", *OPTIMUM)),
    Row("openvino-bf16", "optimum", "openvino", ("openvino", *OPTIMUM), precision="bf16"),
    Row("latentrelay-openvino-fp32", "ours-fp32-openvino", "openvino", ("openvino",), ours=True, asked_only=True),
    Row("latentrelay-openvino-w8a8", "ours-w8a8-openvino", "openvino", ("openvino",), ours=True),
    Row("latentrelay-openvino-w8a8-bf16", "ours-w8a8-openvino", "openvino", ("openvino",), True, "bf16"),
    Row(NNCF_ROW, "nncf", "openvino", ("nncf", "openvino", *OPTIMUM)),
    Row("nncf-openvino-int8-bf16", "nncf", "openvino", ("nncf", "openvino", *OPTIMUM), precision="bf16"),
)

BUNDLE_ROWS = (
    Row("bundle-onnxruntime", BUNDLE, "onnxruntime", ours=True),
    Row("bundle-openvino", BUNDLE, "openvino", ("openvino",), ours=True),
    Row("bundle-openvino-bf16", BUNDLE, "openvino", ("openvino",), True, "bf16"),
)


def own_kernels() -> str:
    """The kernel set of ONNX Runtime that this processor has."""
    return "onnxruntime-x64" if platform.machine().lower() in ("x86_64", "amd64") else "onnxruntime-arm"


def why_not(row: Row) -> str | None:
    """Why a row cannot run here, as it is written into the record; None where it can."""
    for package in row.packages:
        if version(package) is None:
            return f"not installed: {package}"
    if row.library == "torch-compile" and not any(shutil.which(each) for each in ("c++", "g++", "clang++", "cl")):
        return "no C++ compiler, which torch.compile needs"
    if row.library == "openvino" and row.precision == "bf16" and not _has_bf16():
        return "the processor has no bf16"
    return None


def _has_bf16() -> bool:
    from latentrelay.runtime.openvino_backend import DEVICE, import_openvino

    return "BF16" in import_openvino().Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def open_row(row: Row, network: Network, folder: Path, threads: int) -> Opened:
    """Load the row's graph from `folder` with `threads`. Raises SessionError and what the rivals raise."""
    if row.graph == BUNDLE:
        return _bundle(row, folder, threads)
    inputs = network.inputs()
    if row.library.startswith("torch"):
        return _torch(network, inputs, threads, compiled=row.library == "torch-compile")
    if row.ours:
        return _ours(row, network, inputs, folder, threads)
    return (_onnxruntime if row.library == "onnxruntime" else _openvino)(
        row, network, _unet_feeds(inputs), folder, threads
    )


def guided(row: Row, network: Network, outputs: Outputs) -> NDArray[np.float64]:
    """The guided noise prediction (1,C,h,w) that a step was made with, float64: what every row must agree on.

    Ours is solved for it from the first step's `x' = a x + b e`, which has no memory term. Rows of a bundle have no
    torch network to agree with, so it is the next latents there.
    """
    if row.graph == BUNDLE:
        return outputs["next_latents"].astype(np.float64)
    if not row.ours:
        pred = next(iter(outputs.values())).astype(np.float64)
        return pred[0:1] + GUIDANCE * (pred[1:2] - pred[0:1])
    a, b = network.first_row
    latents = network.inputs()["latents"].astype(np.float64)
    return np.asarray((outputs["next_latents"].astype(np.float64) - a * latents) / b)


def step_component(inputs: Feeds, memory: bool = True) -> Component:
    """The step graph's ports, as a bundle's manifest has them."""
    latents, states = inputs["latents"].shape, inputs["encoder_hidden_states"].shape
    ports = [
        Port("latents", "latents", "float32", latents),
        Port("step", "step", "int64", ()),
        Port("prompt_embeds", "prompt_embeds", "float32", states),
        Port("guidance", "guidance", "float32", ()),
    ]
    results = [Port("next_latents", "latents", "float32", latents)]
    if memory:
        ports.append(Port("x0_prev", "x0_prev", "float32", latents))
        results.append(Port("next_x0_prev", "x0_prev", "float32", latents))
    return Component("step_full", STEP, tuple(ports), tuple(results))


def _ours(row: Row, network: Network, inputs: Feeds, folder: Path, threads: int) -> Opened:
    options: dict[str, Any] = {"intra_op_threads": threads, **row.settings}
    if row.library == "openvino":
        options["inference_precision"] = row.precision
    else:
        options |= {f"config.{key}": value for key, value in CALM.items()}
    backend = open_backend(BackendSpec(row.library, (CPU,), options))
    graph = backend.load(folder / STEP, step_component(inputs, network.memory))
    feeds: Feeds = {
        "latents": inputs["latents"],
        "step": np.array(0),
        "prompt_embeds": inputs["encoder_hidden_states"],
        "guidance": np.array(GUIDANCE, np.float32),
        "x0_prev": np.zeros_like(inputs["latents"]),
    }
    return Opened(lambda: graph.run(feeds), ", ".join(graph.providers), _onnx_files(folder / STEP))


def _bundle(row: Row, folder: Path, threads: int) -> Opened:
    """A bundle's own step graph: with its own session options where its backend is the row's."""
    bundle = Bundle.open(folder, verify=False)
    spec, component = bundle.manifest.backend, bundle.manifest.components["step_full"]
    if row.library == "openvino":
        own = spec.session_options if spec.name == row.library else {}
        spec = BackendSpec("openvino", spec.providers, {**own, "inference_precision": row.precision})
    elif spec.name == row.library:
        calm = {f"config.{key}": value for key, value in CALM.items()}
        spec = replace(spec, session_options={**spec.session_options, **calm})
    graph = open_backend(spec, threads=threads, name=row.library).load(bundle.file(component.path), component)
    rng = np.random.default_rng(0)
    feeds: Feeds = {port.name: rng.standard_normal(_static(port)).astype(port.dtype) for port in component.inputs}
    by_role = {port.role: port.name for port in component.inputs}
    for role in {"step", "split_row"} & set(by_role):
        feeds[by_role[role]] = np.array(0)
    if "guidance" in by_role:
        feeds[by_role["guidance"]] = np.array(bundle.manifest.guidance.default, np.float32)
    return Opened(lambda: graph.run(feeds), ", ".join(graph.providers), _onnx_files(bundle.file(component.path)))


def _onnxruntime(row: Row, network: Network, feeds: Feeds, folder: Path, threads: int) -> Opened:
    """As Optimum opens it: ONNX Runtime's own session options, but for the threads."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    for key, value in CALM.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(str(folder / UNET), options, providers=[CPU])
    names = [port.name for port in session.get_outputs()]

    def run() -> Outputs:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return Opened(run, ", ".join(session.get_providers()), _onnx_files(folder / UNET))


def _openvino(row: Row, network: Network, feeds: Feeds, folder: Path, threads: int) -> Opened:
    from latentrelay.runtime.openvino_backend import DEVICE, import_openvino, provider_name

    core = import_openvino().Core()
    written = folder / "model.xml"
    model = core.read_model(str(written)) if written.is_file() else static_model(core, network, folder / UNET)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": row.precision}
    compiled = core.compile_model(model, DEVICE, {**settings, "INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()

    def run() -> Outputs:
        request.infer(feeds, share_inputs=False)
        return {"out_sample": np.array(request.get_output_tensor(0).data, copy=True)}

    files = (written, written.with_suffix(".bin")) if written.is_file() else _onnx_files(folder / UNET)
    return Opened(run, provider_name(compiled), files)


def _torch(network: Network, inputs: Feeds, threads: int, *, compiled: bool) -> Opened:
    import torch

    torch.set_num_threads(threads)
    unet = load_unet(network)
    call: Any = torch.compile(unet) if compiled else unet
    feeds = [torch.from_numpy(np.asarray(each)) for each in _unet_feeds(inputs).values()]

    def run() -> Outputs:
        with torch.no_grad():
            return {"out_sample": call(*feeds, return_dict=False)[0].numpy()}

    files = tuple(sorted(network.unet.glob("*.safetensors")))
    return Opened(run, f"torch {torch.__version__} on {'inductor' if compiled else 'eager'}, CPU", files)


def _static(port: Port) -> tuple[int, ...]:
    return tuple(2 if isinstance(size, str) else size for size in port.shape)


def _unet_feeds(inputs: Feeds) -> Feeds:
    """The U-Net's own inputs; DPM-Solver++ and DDIM feed the latents as they are."""
    return {
        "sample": np.repeat(inputs["latents"], 2, axis=0),
        "timestep": inputs["timestep"],
        "encoder_hidden_states": inputs["encoder_hidden_states"],
    }


def _onnx_files(graph: Path) -> tuple[Path, ...]:
    """A graph and the data files that it names."""
    from latentrelay.runtime.onnx_paths import external_locations

    return (graph, *(graph.parent / name for name in sorted(external_locations(graph))))
