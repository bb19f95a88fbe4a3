"""ONNX Runtime behind the backend protocol: providers, threads and session options from the manifest.

A bundle names providers in order of preference, each with its options; those that this machine's ONNX Runtime lacks are
skipped and the CPU provider stands last, and what was really set up is reported. Providers that the caller names must
be there. XNNPACK brings a thread pool of its own, so ONNX Runtime's is kept to one thread that does not spin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Arrays, check_signature, fitted, writable
from latentrelay.runtime.errors import MissingExtraError, SessionError
from latentrelay.runtime.manifest import BackendSpec, Component
from numpy.typing import NDArray

CPU, XNNPACK = "CPUExecutionProvider", "XnnpackExecutionProvider"
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
}
_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_ERRORS_ONLY = 3
# Entries that a bundle may set. Others name files to write or libraries to load, and a bundle comes from elsewhere.
CONFIG_ENTRIES = (
    "session.force_spinning_stop",
    "session.intra_op.allow_spinning",
    "session.inter_op.allow_spinning",
    "session.qdqisint8allowed",
    "session.qdq_matmulnbits_accuracy_level",
    "session.x64quantprecision",
    "session.disable_prepacking",
    "session.use_env_allocators",
)


class OnnxRuntimeBackend:
    """Loads graphs with ONNX Runtime. `threads` overrides the manifest's intra-op threads (0: ORT's own choice)."""

    def __init__(self, spec: BackendSpec, *, providers: Sequence[str] | None, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", None, purpose="Running a bundle") from error
        self._ort: Any = onnxruntime
        # Some builds carry a telemetry client that keeps a device id; nothing of a run is anyone else's business.
        onnxruntime.disable_telemetry_events()
        chosen = _choose(spec.providers, providers, onnxruntime.get_available_providers())
        options = dict(spec.session_options)
        if threads is not None:
            options["intra_op_threads"] = threads
        self._providers = [(name, checked_options(name, spec.provider_options.get(name, {}))) for name in chosen]
        if XNNPACK in chosen:
            share_threads(options, dict(self._providers)[XNNPACK], asked=threads)
        self._options = _session_options(onnxruntime, options)

    def load(self, path: Path, component: Component) -> OnnxRuntimeGraph:
        """Load one graph; raises SessionError naming it."""
        try:
            session = self._ort.InferenceSession(str(path), self._options, providers=self._providers)
        except Exception as error:  # the binding's own classes share no narrower root
            raise SessionError(
                f"ONNX Runtime cannot load {component.path}: {error}",
                do="Verify the bundle; if it is intact, build it for this machine's ONNX Runtime.",
            ) from error
        inputs, outputs = (
            {port.name: (_DTYPES.get(port.type, port.type), port.shape) for port in side}
            for side in (session.get_inputs(), session.get_outputs())
        )
        check_signature(component.path, component, inputs, outputs)
        return OnnxRuntimeGraph(session, component)


class OnnxRuntimeGraph:
    """One loaded graph; see `Graph`."""

    def __init__(self, session: Any, component: Component) -> None:
        self._session, self._component = session, component

    @property
    def providers(self) -> tuple[str, ...]:
        """What ONNX Runtime really set up."""
        return tuple(self._session.get_providers())

    def run(self, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, NDArray[Any]]:
        """Run once; see `Graph`. Arrays for outputs are bound, so that nothing is copied on the way."""
        names = [port.name for port in self._component.outputs]
        feeds = fitted(self._component, inputs)
        given = writable(self._component, feeds, outputs)
        try:
            made = self._bound(names, feeds, given) if given else self._session.run(names, feeds)
        except Exception as error:  # as above
            raise SessionError(f"ONNX Runtime failed in {self._component.path}: {error}") from error
        return {**dict(zip(names, made, strict=True)), **given}

    def _bound(self, names: Sequence[str], feeds: Arrays, given: Arrays) -> list[NDArray[Any]]:
        """Run with inputs and the given outputs where they lie, in host memory; the other outputs are fresh."""
        binding = self._session.io_binding()
        held = {name: np.require(array, requirements="C") for name, array in feeds.items()}
        for name, array in held.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in names:
            if name in given:
                array = given[name]
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            else:
                binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        pairs = zip(names, binding.get_outputs(), strict=True)
        return [given[name] if name in given else value.numpy() for name, value in pairs]


def _choose(wanted: Sequence[str], asked: Sequence[str] | None, available: Sequence[str]) -> tuple[str, ...]:
    for name in asked or ():
        if name not in available:
            raise SessionError(
                "an execution provider is not available here",
                got=name,
                expected=" | ".join(available),
                do="Install the ONNX Runtime build that has it, or name another.",
            )
    chosen = [name for name in asked or wanted if name in available]
    return tuple(chosen if CPU in chosen or asked else [*chosen, CPU])


def checked_options(provider: str, options: Mapping[str, str]) -> dict[str, str]:
    """A bundle's options for one provider; raises SessionError for one that names a place on this machine.

    Some options are libraries to load (QNN's `backend_path`) or folders to write: a bundle may name a library as the
    system's loader finds it, not by a path.
    """
    for key, value in options.items():
        if any(mark in value for mark in "/\\:") or value.startswith((".", "~")):
            raise SessionError(
                f"the bundle's option {key} of {provider} is a path",
                got=value,
                expected="a bare name or a number",
                do="Do not use this bundle.",
            )
    return dict(options)


def share_threads(options: dict[str, Any], xnnpack: dict[str, str], *, asked: int | None) -> None:
    """Give the threads to XNNPACK's own pool and leave ONNX Runtime's one that does not spin; changes both mappings.

    XNNPACK gets what the caller asked for, else the bundle's `intra_op_num_threads`, else the session's threads.
    """
    own = xnnpack.get("intra_op_num_threads")
    threads = int(options.get("intra_op_threads", 0)) if asked is not None or own is None else int(own)
    if threads:
        xnnpack["intra_op_num_threads"] = str(threads)
    options["intra_op_threads"] = 1
    options.setdefault("config.session.intra_op.allow_spinning", "0")


def _session_options(ort: Any, options: Mapping[str, Any]) -> Any:
    """Named options of the manifest as ORT's; keys "config.<entry>" go to `add_session_config_entry`."""
    session_options = ort.SessionOptions()
    session_options.log_severity_level = _ERRORS_ONLY
    setters: dict[str, Callable[[Any], None]] = {
        "intra_op_threads": lambda value: setattr(session_options, "intra_op_num_threads", int(value)),
        "inter_op_threads": lambda value: setattr(session_options, "inter_op_num_threads", int(value)),
        "memory_pattern": lambda value: setattr(session_options, "enable_mem_pattern", bool(value)),
        "cpu_arena": lambda value: setattr(session_options, "enable_cpu_mem_arena", bool(value)),
        "graph_optimization": lambda value: setattr(
            session_options, "graph_optimization_level", getattr(ort.GraphOptimizationLevel, _LEVELS[value])
        ),
    }
    for key, value in options.items():
        if key.removeprefix("config.") in CONFIG_ENTRIES and key.startswith("config."):
            session_options.add_session_config_entry(key.removeprefix("config."), str(value))
        elif key not in setters or (key == "graph_optimization" and value not in _LEVELS):
            allowed = ", ".join([*setters, *(f"config.{entry}" for entry in CONFIG_ENTRIES)])
            raise SessionError("unknown session option in the manifest", got=f"{key}={value}", expected=allowed)
        else:
            setters[key](value)
    return session_options
