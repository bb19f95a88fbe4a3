"""Milliseconds of a guided step on a device, as an estimate: measured blocks, scaled by the device's own figure.

In: a geometry, a profile, optionally a latency table of this machine. Out: ms and, in words, how they were come by.
Where no block of the shape was timed, FLOPs stand for time. Nothing is measured here.
"""

from __future__ import annotations

from latentrelay.compress.flops import unet_step_flops
from latentrelay.compress.geometry import Geometry, sd14
from latentrelay.compress.latency_table import (
    LatencyTable,
    LatencyTableError,
    device_step_ms,
    load_table,
    step_latency,
)
from latentrelay.device_profiles import DeviceProfile


def estimated_step_ms(
    shape: Geometry, profile: DeviceProfile, own: LatencyTable | None = None
) -> tuple[float | None, str]:
    """A guided step's milliseconds, or None where neither timings nor a figure of the device are known; and why so.

    `own`: timings of this shape's blocks where they were measured; by default the shipped table of SD 1.4's.
    """
    unet, full = shape.build_unet(), sd14()
    anchor = profile.latency_ms("unet")
    precision = next((each.precision for each in profile.latency if each.component == "unet"), "")
    figure = f"the device's figure for SD 1.x, which is in {precision}"
    try:
        shipped = load_table()
        whole = step_latency(full.build_unet(), full.rows, full.columns, full.tokens, shipped).ms
        table = shipped if own is None else own
        here = step_latency(unet, shape.rows, shape.columns, shape.tokens, table).ms
    except LatencyTableError:
        if anchor is None:
            return None, "no timings of this shape and no figure of this device"
        flops = unet_step_flops(unet, shape.rows, shape.columns, shape.tokens)
        ratio = flops / unet_step_flops(full.build_unet(), full.rows, full.columns, full.tokens)
        return round(2 * anchor * ratio, 3), f"estimate: FLOPs against {figure}"
    if anchor is None:
        return round(here, 3), f"this table's machine, one thread: {table.machine.get('processor', 'unknown')}"
    estimate = device_step_ms(profile, here / whole)
    return round(estimate or 0.0, 3), f"estimate: measured blocks, scaled by {figure}"
