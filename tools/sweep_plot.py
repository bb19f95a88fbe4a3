"""The plot of a sweep: attribute accuracy, Frechet ratio and PSNR over the cloud FLOPs saved, a line a student.

In: the sweep's document. Out: one PNG. Dashed lines are the bars: two points below the all-cloud run, 1.125 times its
Frechet distance, 66 % of the cloud's FLOPs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

POINTS, RATIO, SAVING = 0.02, 1.125, 0.66
_ROWS = (
    ("attribute_accuracy", 100.0, "attribute accuracy, %"),
    ("frechet_ratio", 1.0, "Frechet distance / all-cloud"),
    ("psnr_db", 1.0, "PSNR to the all-cloud picture, dB"),
)


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Write the PNG, all or nothing."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(_ROWS))
    for axis, (name, scale, title) in zip(axes, _ROWS, strict=True):
        for i, student in enumerate(document["students"]):
            _line(axis, [row for row in document["rows"] if row["student"] == student], name, scale, f"C{i}", student)
        _splits(axis, document["rows"])
        axis.set_title(title, fontsize=10, pad=14)
        axis.set_xlabel("cloud FLOPs saved, %", fontsize=9)
        axis.axvline(100 * SAVING, color="0.4", linestyle="--", linewidth=0.8)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    whole = document["all_cloud"]["attribute_accuracy"]
    axes[0].axhline(100 * (whole - POINTS), color="0.4", linestyle="--", linewidth=0.8)
    axes[1].axhline(RATIO, color="0.4", linestyle="--", linewidth=0.8)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(
        f"k of {document['num_steps']} steps in the cloud (above the axes), the rest on the device; "
        f"{document['captions']} captions; dashed: the bars",
        fontsize=10,
    )
    beside = path.with_name(f".{path.name}.new")
    try:
        figure.savefig(beside, format="png", dpi=110)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _splits(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Each split's k above the axes, where it stands: all students share the cloud, so they share the place."""
    for split, saving in {row["split"]: row["cloud_flops_saving"] for row in rows}.items():
        place = (100 * saving, 1.0)
        axis.annotate(f"{split}", place, xycoords=axis.get_xaxis_transform(), ha="center", va="bottom", fontsize=7)
    axis.set_xlim(-4, 104)


def _line(axis: Any, rows: list[dict[str, Any]], name: str, scale: float, colour: str, label: str) -> None:
    drawn = [row for row in rows if not (name == "psnr_db" and row["cloud_flops_saving"] == 0)]  # to itself: no figure
    x = [100 * row["cloud_flops_saving"] for row in drawn]
    y = [scale * row[name] for row in drawn]
    axis.plot(x, y, marker="o", markersize=3.5, linewidth=1.3, color=colour, label=label)
    if name == "attribute_accuracy":  # the interval of the difference to the all-cloud run, drawn about the row
        for row, at in zip(drawn, x, strict=True):
            low, high = row["attribute_accuracy_difference_95"]
            base = row["attribute_accuracy"] - row["attribute_accuracy_difference"]
            axis.vlines(at, 100 * (base + low), 100 * (base + high), color=colour, linewidth=0.8, alpha=0.6)
