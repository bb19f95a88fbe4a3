"""The bundle's self-test: its sample inputs through this machine's graphs, against its expected outputs.

selftest.safetensors holds `<component>.in.<input>` and `<component>.out.<output>`. The measure is the graph error,
SNR dB = 10 log10(sum ref^2 / sum err^2), worst output of each component. Ladders are large, so a file may leave them
out: then step_full gets zeros, and step_predicted what step_full's sample returned here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.runtime.errors import BundleTamperedError, MissingExtraError, RequestError
from latentrelay.runtime.manifest import Component
from latentrelay.runtime.prediction_check import LADDER_ROLES, STEP_PREDICTED
from numpy.typing import NDArray

if TYPE_CHECKING:
    from latentrelay.runtime.session import Session


@dataclass(frozen=True)
class SelftestReport:
    """SNR in dB per component (inf: equal), the tolerances, and whether every component reaches its own.

    `tolerance_db` is for components that `tolerances` does not name.
    """

    snr_db: dict[str, float]
    tolerance_db: float
    tolerances: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when at least one component was run and all reach their tolerance."""
        return bool(self.snr_db) and all(self._margin(name) >= 0 for name in self.snr_db)

    @property
    def worst(self) -> tuple[str, float]:
        """The component nearest to its tolerance, or furthest below it, and its SNR."""
        name = min(self.snr_db, key=self._margin)
        return name, self.snr_db[name]

    def tolerance(self, component: str) -> float:
        """What a component must reach, in dB."""
        return self.tolerances.get(component, self.tolerance_db)

    def _margin(self, component: str) -> float:
        return self.snr_db[component] - self.tolerance(component)


def run_selftest(session: Session) -> SelftestReport:
    """Run the self-test; components that were not open are released again, so only one is held at a time.

    Raises RequestError if the bundle has none, BundleTamperedError if the file and the manifest contradict each other.
    """
    spec = session.manifest.selftest
    if spec is None:
        raise RequestError("the bundle has no self-test", do="Build it again with this version of latentrelay.")
    inputs, expected = _read(session, spec.path)
    values = {}
    ladders: dict[str, NDArray[Any]] = {}  # by role
    for component in sorted(expected, key=lambda name: name == STEP_PREDICTED):
        outputs = expected[component]
        if not session.can_run(component):
            continue  # Core ML has packages for what a run needs, and the plain U-Net is not among them
        was_open = session.is_open(component)
        ports = session.manifest.components[component]
        got = session.run_component(component, _with_ladders(ports, inputs.get(component, {}), ladders))
        ladders |= {port.role: got[port.name] for port in ports.outputs if port.role in LADDER_ROLES}
        values[component] = min(snr_db(array, got[name]) for name, array in outputs.items())
        if not was_open:
            session.release(component)
    return SelftestReport(values, spec.tolerance_db, spec.tolerances)


def _with_ladders(
    component: Component, inputs: dict[str, NDArray[Any]], ladders: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The sample's inputs, and ladders where it has none."""
    missing = [port for port in component.inputs if port.role in LADDER_ROLES and port.name not in inputs]
    zeros = {port.role: np.zeros([int(size) for size in port.shape], port.dtype) for port in missing}
    return {**inputs, **{port.name: ladders.get(port.role, zeros[port.role]) for port in missing}}


def snr_db(reference: NDArray[Any], measured: NDArray[Any]) -> float:
    """10 log10(sum ref^2 / sum err^2): inf when equal, -inf when shapes differ or something is not finite."""
    if reference.shape != measured.shape or not np.isfinite(measured).all():
        return -math.inf
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    error = float(np.sum(np.square(reference.astype(np.float64) - measured)))
    if error == 0.0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def _read(session: Session, path: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise MissingExtraError("safetensors", None, purpose="The self-test") from error
    sides: dict[str, dict[str, dict[str, Any]]] = {"in": {}, "out": {}}
    try:
        tensors = load_file(session.bundle.file(path))
    except Exception as error:  # SafetensorError derives from Exception alone
        raise BundleTamperedError(f"{path} is not a safetensors file: {error}", path=path) from error
    for key, array in tensors.items():
        component, side, port = [*key.split(".", 2), "", ""][:3]
        spec = session.manifest.components.get(component)
        ports = () if spec is None else spec.outputs if side == "out" else spec.inputs
        if side not in sides or port not in {item.name for item in ports}:
            raise BundleTamperedError(f"{path} names a tensor that the manifest does not know", path=path, got=key)
        sides[side].setdefault(component, {})[port] = array
    return sides["in"], sides["out"]
