"""The seam between the step loop and what runs graphs: two small protocols, and the check of inputs by signature.

ONNX Runtime implements them in onnxruntime_backend.py; OpenVINO or Core ML would be one more file and one line in
`open_backend`. A graph is called by port names with NumPy arrays and returns fresh arrays that nothing else holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]


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


def open_backend(spec: BackendSpec, *, providers: Sequence[str] | None, threads: int | None) -> Backend:
    """The backend that a manifest asks for, with the caller's providers and intra-op threads where given."""
    if spec.name == "onnxruntime":
        from latentrelay.runtime.onnxruntime_backend import OnnxRuntimeBackend

        return OnnxRuntimeBackend(spec, providers=providers, threads=threads)
    raise SessionError("the bundle wants an unknown backend", got=spec.name, expected="onnxruntime")


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
