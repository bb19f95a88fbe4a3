"""OpenVINO behind the backend protocol: it reads a bundle's ONNX graphs as they are, external data included.

One call at a time with the whole machine (performance hint LATENCY), on the CPU. The arithmetic is the manifest's
`inference_precision`: "f32" unless it says "bf16" or "auto" (OpenVINO's own choice). Where the processor cannot,
OpenVINO falls back, and `providers` says what really runs. Quantised layers run in integers either way. It needs the
extra `openvino`, imported here without its usage reports.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Arrays, check_signature, fitted, writable
from latentrelay.runtime.errors import MissingExtraError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component
from numpy.typing import NDArray

DEVICE = "CPU"
_TELEMETRY = "openvino_telemetry"
_DTYPES = {"f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32"}
_PRECISIONS = ("f32", "bf16", "auto")


def import_openvino() -> Any:
    """The module `openvino`; raises MissingExtraError.

    On import it reports its use to its maker where `openvino_telemetry` is installed; here that module is hidden while
    it is imported, because nothing of a run is anyone else's business.
    """
    hidden = _TELEMETRY not in sys.modules
    if hidden:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # what import takes for "not installed"
    try:
        import openvino
    except ImportError as error:
        purpose = "The OpenVINO backend (the backend onnxruntime runs the same graphs)"
        raise MissingExtraError("openvino", "openvino", purpose=purpose) from error
    finally:
        if hidden:
            del sys.modules[_TELEMETRY]
    return openvino


class OpenVinoBackend:
    """Loads graphs with OpenVINO. `threads` overrides the manifest's intra-op threads (0: OpenVINO's own choice)."""

    def __init__(self, spec: BackendSpec, *, threads: int | None = None) -> None:
        self._core: Any = import_openvino().Core()
        self._settings = _settings(spec, threads)

    def load(self, path: Path, component: Component) -> OpenVinoGraph:
        """Load one graph; raises SessionError naming it."""
        try:
            model = self._core.read_model(str(path))
            compiled = self._core.compile_model(model, DEVICE, self._settings)
        except RuntimeError as error:
            raise SessionError(
                f"OpenVINO cannot load {component.path}: {_last_line(error)}",
                do="Verify the bundle; if it is intact, choose the backend onnxruntime.",
            ) from error
        inputs = {port.get_any_name(): (_dtype(port), _sizes(port)) for port in compiled.inputs}
        outputs = {name: (_dtype(port), _sizes(port)) for port in compiled.outputs for name in port.get_names()}
        check_signature(component.path, component, inputs, outputs)
        return OpenVinoGraph(compiled, component, import_openvino().Tensor)


class OpenVinoGraph:
    """One loaded graph; see `Graph`."""

    def __init__(self, compiled: Any, component: Component, tensor: Any) -> None:
        self._compiled, self._component, self._tensor = compiled, component, tensor
        self._lent: set[str] = set()  # outputs whose tensor is a caller's array
        self._request = compiled.create_infer_request()
        self._providers = (provider_name(compiled),)

    @property
    def providers(self) -> tuple[str, ...]:
        """The device and the precision that were really set up, as in "OpenVINO CPU f32"."""
        return self._providers

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, NDArray[Any]]:
        """Run once; see `Graph`. Arrays for outputs become the request's output tensors."""
        feeds = fitted(self._component, inputs)
        given = writable(self._component, feeds, outputs)
        try:
            self._bind(given)
            # Inputs are always shared, never copied: a copy would go into the arrays of the call before.
            self._request.infer(feeds, share_inputs=True)
            return {
                name: given[name] if name in given else np.array(self._request.get_tensor(name).data, copy=True)
                for name in (port.name for port in self._component.outputs)
            }
        except RuntimeError as error:
            raise SessionError(f"OpenVINO failed in {self._component.path}: {_last_line(error)}") from error

    def _bind(self, given: Arrays) -> None:
        """The given arrays as output tensors; a port whose array was the call's before gets a tensor of its own."""
        for name in self._lent - set(given):
            array = np.empty_like(self._request.get_tensor(name).data)
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        for name, array in given.items():
            self._request.set_tensor(name, self._tensor(array, shared_memory=True))
        self._lent = set(given)


def provider_name(compiled: Any) -> str:
    """What a compiled model runs on and in: "OpenVINO CPU f32" or "OpenVINO CPU bf16"."""
    devices = "+".join(compiled.get_property("EXECUTION_DEVICES"))
    return f"OpenVINO {devices} {compiled.get_property('INFERENCE_PRECISION_HINT').get_type_name()}"


def _settings(spec: BackendSpec, threads: int | None) -> dict[str, Any]:
    """The manifest's session options as OpenVINO's properties; raises SessionError on an unknown one.

    `dynamic_quantization_group`: activations in front of compressed weights are rounded to 8 bits in groups of so many;
    0, unlike OpenVINO's own default, leaves them float.
    """
    defaults: dict[str, Any] = {"intra_op_threads": 0, "inference_precision": "f32", "dynamic_quantization_group": 0}
    options = {**defaults, **spec.session_options}
    if threads is not None:
        options["intra_op_threads"] = threads
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    for key, value in options.items():
        if key == "intra_op_threads":
            settings |= {"INFERENCE_NUM_THREADS": int(value)} if value else {}
        elif key == "inference_precision" and value in _PRECISIONS:
            settings |= {"INFERENCE_PRECISION_HINT": value} if value != "auto" else {}
        elif key == "dynamic_quantization_group":
            settings |= {"DYNAMIC_QUANTIZATION_GROUP_SIZE": int(value)}
        else:
            known = f"intra_op_threads, inference_precision={'|'.join(_PRECISIONS)}, dynamic_quantization_group"
            raise SessionError("unknown session option in the manifest", got=f"{key}={value}", expected=known)
    return settings


def _dtype(port: Any) -> str:
    name = str(port.get_element_type().get_type_name())
    return _DTYPES.get(name, name)


def _sizes(port: Any) -> list[int | None]:
    shape = port.get_partial_shape()
    return [] if shape.rank.is_dynamic else [None if size.is_dynamic else size.get_length() for size in shape]


def _last_line(error: BaseException) -> str:
    """The message without the source lines that OpenVINO puts before it."""
    lines: list[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from ", "Check '"))]
    return [*said, *lines, type(error).__name__][0]
