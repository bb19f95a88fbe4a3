"""Core ML behind the backend protocol, on macOS: a bundle's .mlpackage files through coremltools' MLModel.

A component may be one package or several parts that run in order. Ports are matched by role, so a package may use
other names, and arrays are adapted to what the package declares: Core ML has no rank 0, so `step` () becomes (1,);
int64 becomes int32; text states (B, T, D) become (B, D, 1, T) where the package has that layout. It converts nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Arrays, fitted, writable
from latentrelay.runtime.errors import BackendUnavailableError, MissingExtraError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component, CoreMLPackage, Port
from numpy.typing import NDArray

COMPUTE_UNITS = ("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")
OpenModel = Callable[[Path, str], Any]  # a package's folder and its compute units -> an object with `predict`


class CoreMLBackend:
    """Loads the packages of `root`, the bundle's folder.

    The session option `compute_units` stands before the package's own. `open_model` is what loads a package:
    coremltools unless given (compiled models, tests). Raises BackendUnavailableError away from macOS,
    MissingExtraError.
    """

    def __init__(
        self,
        spec: BackendSpec,
        packages: Sequence[CoreMLPackage],
        root: Path | None,
        open_model: OpenModel | None = None,
    ) -> None:
        self._open = open_model or _coremltools()
        self._packages, self._root = tuple(packages), root or Path()
        self._units = spec.session_options.get("compute_units")
        if self._units is not None and self._units not in COMPUTE_UNITS:
            raise SessionError(
                "unknown Core ML compute units in the manifest", got=self._units, expected=" | ".join(COMPUTE_UNITS)
            )

    @property
    def roles(self) -> frozenset[str]:
        """The components that there are packages for."""
        return frozenset(each.role for each in self._packages)

    def load(self, path: Path, component: Component) -> CoreMLGraph:
        """Load the packages of a component's role; `path`, its ONNX graph, is not read. Raises SessionError."""
        packages = sorted((each for each in self._packages if each.role == component.role), key=lambda each: each.part)
        if not packages or [each.part for each in packages] != list(range(1, packages[0].parts + 1)):
            raise SessionError(
                f"the bundle has no complete Core ML package for {component.role}",
                got=[each.path for each in packages],
                do="Build the bundle for an Apple device, or choose the backend onnxruntime.",
            )
        parts = []
        for package in packages:
            units = str(self._units or package.compute_units)
            try:
                parts.append((package, self._open(self._root / package.path, units), units))
            except Exception as error:  # coremltools raises what the system's framework says, in several classes
                raise SessionError(f"Core ML cannot load {package.path}: {error}", do="Verify the bundle.") from error
        return CoreMLGraph(parts, component)


class CoreMLGraph:
    """One component's loaded packages; see `Graph`."""

    def __init__(self, parts: Sequence[tuple[CoreMLPackage, Any, str]], component: Component) -> None:
        self._parts, self._component = tuple(parts), component

    @property
    def providers(self) -> tuple[str, ...]:
        """The compute units that were asked for; which of them ran a layer is the system's choice and not told."""
        return tuple(dict.fromkeys(f"CoreML {units}" for _, _, units in self._parts))

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, NDArray[Any]]:
        """Run once; see `Graph`. Core ML makes its own outputs, and arrays for outputs get a copy."""
        feeds = fitted(self._component, inputs)
        given = writable(self._component, feeds, outputs)
        by_role = {port.role: feeds[port.name] for port in self._component.inputs}
        made: dict[str, NDArray[Any]] = {}
        for package, model, _ in self._parts:
            try:
                answer = model.predict({port.name: _input(port, made, by_role) for port in package.inputs})
            except Exception as error:  # as above
                raise SessionError(f"Core ML failed in {package.path}: {error}") from error
            missing = [port.name for port in package.outputs if port.name not in answer]
            if missing:
                raise SessionError(
                    f"{package.path} has other outputs than the manifest", got=sorted(answer), expected=missing[0]
                )
            made |= {port.name: np.array(answer[port.name], copy=True) for port in package.outputs}
        names = {port.role: port.name for package, _, _ in self._parts for port in package.outputs}
        results = {port.name: _output(port, names, made) for port in self._component.outputs}
        for name, array in given.items():
            np.copyto(array, results[name])
        return {**results, **given}


def _input(port: Port, made: Mapping[str, NDArray[Any]], by_role: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What a part before made under this name, else the component's input of this role, as the package declares it."""
    array = made.get(port.name, by_role.get(port.role))
    if array is None:
        raise SessionError("a Core ML package wants an input that nothing gives", got=port.name, expected=list(by_role))
    return _shaped(array, port)


def _output(port: Port, names: Mapping[str, str], made: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    if port.role not in names:
        raise SessionError("the Core ML package lacks an output", got=list(names), expected=port.role)
    return _shaped(made[names[port.role]], port)


def _shaped(array: NDArray[Any], port: Port) -> NDArray[Any]:
    """`array` in the shape and dtype of `port`: rank 0 and 1 apart, (B,T,D) and (B,D,1,T); else SessionError."""
    shape = port.shape
    if array.ndim == 3 and len(shape) == 4:
        array = array.transpose(0, 2, 1)[:, :, None, :]
    elif array.ndim == 4 and len(shape) == 3:
        array = array[:, :, 0, :].transpose(0, 2, 1)
    elif array.size == 1 and shape in ((), (1,)):
        array = array.reshape(tuple(int(size) for size in shape))
    matches = len(shape) == array.ndim and all(
        isinstance(want, str) or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not matches:
        raise SessionError(f"Core ML: {port.name} has a wrong shape", got=array.shape, expected=shape)
    return np.ascontiguousarray(array).reshape(array.shape).astype(port.dtype, copy=False)


def _coremltools() -> OpenModel:
    if sys.platform != "darwin":
        raise BackendUnavailableError(
            "Core ML runs on Apple's systems only",
            got=sys.platform,
            expected="macOS",
            do="Choose the backend onnxruntime, which runs the bundle's ONNX graphs.",
        )
    try:
        import coremltools
    except ImportError as error:
        raise MissingExtraError("coremltools", "export", purpose="The Core ML backend") from error

    def open_model(path: Path, units: str) -> Any:
        return coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit[units])

    return open_model
