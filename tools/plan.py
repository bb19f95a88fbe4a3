"""`latentrelay plan`: which split, precision and mask meet a latency or cost goal with the least loss of quality.

In: a device profile, bundles measured here or released students, a link, a cloud and a price. Out: rows, their Pareto
frontier, and the one chosen with its reason. It builds nothing and invents no quality: what was not measured says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def run(
    device: str,
    networks: Sequence[str],
    *,
    bundles: Sequence[Path] = (),
    model: str = "reference",
    price: str | None = None,
    max_latency_s: float | None = None,
    max_cost: float | None = None,
    cloud: str | None = None,
    token: str | None = None,
    cloud_step_ms: float | None = None,
    cloud_queue_ms: float | None = None,
    sweep: Path | None = None,
    here: bool = False,
    unmeasured: bool = False,
    device_watts: float | None = None,
    profiles: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> int:
    """Plan, print, and with `output` plot; the exit status: 0, or 3 where nothing meets the goals."""
    raise NotImplementedError
