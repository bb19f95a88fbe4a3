"""The seam between the step loop and what runs graphs: two small protocols, and the check of inputs by signature.

ONNX Runtime, OpenVINO and Core ML implement them, one file each and one line in `open_backend`; the library is imported
when its backend is opened. A graph is called by port names with NumPy arrays and returns fresh arrays that nothing else
holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component, CoreMLPackage, Port
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
BACKENDS = ("onnxruntime", "openvino", "coreml")
_COMMON_OPTIONS = ("intra_op_threads",)  # what means the same to every backend


class Graph(Protocol):
    """One loaded graph."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the backend really set up, first choice first."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Run once: arrays by input name in, by output name out. Raises SessionError."""


class Backend(Protocol):
    """Loads graphs."""

    def load(self, path: Path, component: Component) -> Graph:
        """Load a verified graph; raises SessionError when it does not match `component` or cannot be run."""


def open_backend(
    spec: BackendSpec,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    name: str | None = None,
    packages: Sequence[CoreMLPackage] = (),
    root: Path | None = None,
) -> Backend:
    """The backend that a manifest asks for, with the caller's providers and intra-op threads where given.

    `name` is another one of BACKENDS in its place: the manifest's session options, which are its own backend's, are
    left out then, but for the threads. `packages` are the bundle's Core ML packages and `root` its folder. Raises
    RequestError on an unknown name, SessionError on unknown options, MissingExtraError, BackendUnavailableError.
    """
    if name is not None and name not in BACKENDS:
        raise RequestError("unknown backend", got=name, expected=" | ".join(BACKENDS))
    if name is not None and name != spec.name:
        kept = {key: value for key, value in spec.session_options.items() if key in _COMMON_OPTIONS}
        spec = replace(spec, name=name, session_options=kept)
    if threads is not None and threads < 0:
        raise RequestError("threads is out of range", got=threads, expected="0 (automatic) or more")
    if spec.name == "onnxruntime":
        from latentrelay.runtime.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(spec, providers=providers, threads=threads)
    if providers:
        raise RequestError(
            f"execution providers are ONNX Runtime's; the backend here is {spec.name}",
            got=", ".join(providers),
            do="Leave them out, or choose the backend onnxruntime.",
        )
    if spec.name == "openvino":
        from latentrelay.runtime.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(spec, threads=threads)
    if spec.name == "coreml":
        from latentrelay.runtime.coreml_backend import CoreMLBackend

        return CoreMLBackend(spec, packages, root)
    raise SessionError("the bundle wants an unknown backend", got=spec.name, expected=" | ".join(BACKENDS))


def check_signature(path: str, component: Component, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """A graph's own inputs and outputs (dtype by name) must be the manifest's; undeclared outputs are fine.

    Raises SessionError.
    """
    declared_in = {port.name: port.dtype for port in component.inputs}
    declared_out = {port.name: port.dtype for port in component.outputs}
    if dict(inputs) != declared_in:
        raise SessionError(f"{path} has other inputs than the manifest", got=inputs, expected=declared_in)
    if any(outputs.get(name) != dtype for name, dtype in declared_out.items()):
        raise SessionError(f"{path} has other outputs than the manifest", got=outputs, expected=declared_out)


def fitted(component: Component, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """The declared inputs, cast to their declared dtypes; raises RequestError on a missing one or a wrong shape."""
    feeds = {}
    for port in component.inputs:
        if port.name not in inputs:
            raise RequestError(f"{component.role}: input {port.name} is missing", got=", ".join(inputs))
        array = np.asarray(inputs[port.name], dtype=port.dtype)
        if not _shape_fits(port, array.shape):
            raise RequestError(f"{component.role}: {port.name} has a wrong shape", got=array.shape, expected=port.shape)
        feeds[port.name] = array
    return feeds


def _shape_fits(port: Port, shape: tuple[int, ...]) -> bool:
    pairs = zip(port.shape, shape, strict=False)
    return len(port.shape) == len(shape) and all(isinstance(want, str) or want == got for want, got in pairs)
