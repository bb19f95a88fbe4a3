"""The seam between the step loop and what runs graphs: two small protocols, and the check of inputs by signature.

ONNX Runtime, OpenVINO and Core ML implement them, one file each and one line in `open_backend`; the library is imported
when its backend is opened. A graph is called by port names with NumPy arrays and returns fresh arrays that nothing else
holds, but for outputs that the caller brought arrays for: those are written in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component, CoreMLPackage, Port
from latentrelay.runtime.prediction_check import LADDER_ROLES
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
BACKENDS = ("onnxruntime", "openvino", "coreml")
_COMMON_OPTIONS = ("intra_op_threads",)  # what means the same to every backend


class Graph(Protocol):
    """One loaded graph."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that the backend really set up, first choice first."""

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, NDArray[Any]]:
        """Run once: arrays by input name in, by output name out.

        `outputs`: arrays by output name that the results are written into; they are what is returned under those names.
        Raises RequestError on arrays that do not fit, SessionError.
        """


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


Signature = Mapping[str, tuple[str, Sequence[Any]]]  # dtype and sizes by name; a size that is no number is not known


def check_signature(path: str, component: Component, inputs: Signature, outputs: Signature) -> None:
    """A graph's own inputs and outputs must be the manifest's: dtypes, and of the inputs and the ladders the sizes too;
    undeclared outputs are fine. Raises SessionError."""
    declared_in = {port.name: port.dtype for port in component.inputs}
    declared_out = {port.name: port.dtype for port in component.outputs}
    got_in, got_out = ({name: dtype for name, (dtype, _) in side.items()} for side in (inputs, outputs))
    if got_in != declared_in:
        raise SessionError(f"{path} has other inputs than the manifest", got=got_in, expected=declared_in)
    if any(got_out.get(name) != dtype for name, dtype in declared_out.items()):
        raise SessionError(f"{path} has other outputs than the manifest", got=got_out, expected=declared_out)
    for port in (*component.inputs, *(port for port in component.outputs if port.role in LADDER_ROLES)):
        sizes = (inputs if port in component.inputs else outputs)[port.name][1]
        if not _sizes_agree(port.shape, sizes):
            raise SessionError(
                f"{path}: {port.name} is of another shape than in the manifest",
                got=list(sizes),
                expected=list(port.shape),
            )


def _sizes_agree(declared: Sequence[int | str], own: Sequence[Any]) -> bool:
    """Known sizes are equal. A graph without any may have left its rank open."""
    pairs = zip(declared, own, strict=False)
    known = [(want, got) for want, got in pairs if isinstance(want, int) and isinstance(got, int)]
    return not own or (len(own) == len(declared) and all(want == got for want, got in known))


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


def writable(component: Component, feeds: Arrays, outputs: Arrays | None) -> dict[str, NDArray[Any]]:
    """The caller's arrays for outputs, checked: declared, of their dtype and shape, in C order, and apart from each
    other and from every input. Raises RequestError."""
    ports = {port.name: port for port in component.outputs}
    taken = list(feeds.values())
    for name, array in (outputs or {}).items():
        if name not in ports:
            raise RequestError(f"{component.role} has no such output", got=name, expected=list(ports))
        port, flags = ports[name], array.flags
        if array.dtype != port.dtype or not _shape_fits(port, array.shape):
            got, expected = f"{array.dtype} {array.shape}", f"{port.dtype} {port.shape}"
            raise RequestError(f"{component.role}: the array for {name} does not fit", got=got, expected=expected)
        if not (flags.c_contiguous and flags.writeable) or any(np.may_share_memory(array, other) for other in taken):
            raise RequestError(
                f"{component.role}: the array for {name} cannot be written",
                expected="a writable array in C order that shares no memory with another one of the call",
            )
        taken.append(array)
    return dict(outputs or {})


def _shape_fits(port: Port, shape: tuple[int, ...]) -> bool:
    pairs = zip(port.shape, shape, strict=False)
    return len(port.shape) == len(shape) and all(isinstance(want, str) or want == got for want, got in pairs)
