"""A plan as a PNG: latency against the loss of accuracy, and below it where each frontier row's time goes.

In: the plan's document. Out: bytes. A column a network; every measured row is a point with its 95 % interval, the
frontier a line, the chosen row a star; rows that nobody measured are ticks on the axis. Bars name the rows.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

PARTS = {
    "cloud_queue": ("cloud: queue", "#9ecae1"),
    "cloud_steps": ("cloud: steps", "#3182bd"),
    "transfer": ("network", "#fdae6b"),
    "text_encoder": ("device: prompt", "#c7e9c0"),
    "device_steps": ("device: steps", "#31a354"),
    "decode": ("device: decode", "#006d2c"),
}
_COLOURS = matplotlib.colormaps["tab20"]
_WIDE = 12.0  # times the fastest row: from there on the axis is logarithmic
_MARKERS = "osv^D<>pXPh"


def plot(document: Mapping[str, Any]) -> bytes:
    """A PNG."""
    links = [link["name"] for link in document["networks"]]
    most = max((sum(row["network"] == name for row in document["frontier"]) for name in links), default=1)
    bars = 0.3 * max(most, 3) + 1.0
    figure = Figure(figsize=(max(10.0, 6.4 * len(links)), 5.2 + bars), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, len(links), squeeze=False, height_ratios=(5.0, bars))
    groups = sorted({_group(row) for row in document["rows"] if _known(row)})
    for column, name in enumerate(links):
        above, below = axes[0][column], axes[1][column]
        rows = [row for row in document["rows"] if row["network"] == name]
        front = [row for row in document["frontier"] if row["network"] == name]
        chosen = document["by_network"][name]["chosen"]
        _points(above, rows, front, chosen, groups)
        _goal(above, document["goals"]["max_latency_s"])
        above.set_title(f"{document['device']} on {name}", fontsize=10)
        _bars(below, front, chosen)
        _goal(below, document["goals"]["max_latency_s"])
    known = [axis.get_legend_handles_labels() for row in axes for axis in row]
    named = {label: handle for handles, labels in known for handle, label in zip(handles, labels, strict=True)}
    figure.legend(named.values(), named, fontsize=7.5, ncols=6, loc="outside lower center")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _points(
    axis: Any,
    rows: Sequence[Mapping[str, Any]],
    front: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Any] | None,
    groups: Sequence[str],
) -> None:
    for i, group in enumerate(groups):
        mine = [row for row in rows if _known(row) and _group(row) == group]
        if not mine:
            continue
        x, y = [row["latency_ms"] / 1e3 for row in mine], [_points_of(row) for row in mine]
        ends = [[100 * end for end in row["quality"]["accuracy_difference_95"]] for row in mine]
        spread = [
            [max(0.0, value - low) for value, (low, _) in zip(y, ends, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(y, ends, strict=True)],
        ]
        colour, marker = _COLOURS(i % 20), _MARKERS[i % len(_MARKERS)]
        axis.errorbar(x, y, yerr=spread, fmt="none", ecolor=colour, alpha=0.35, linewidth=1)
        axis.scatter(x, y, color=colour, marker=marker, s=28, label=group, zorder=3)
    if front:
        ringed = [row["latency_ms"] / 1e3 for row in front], [_points_of(row) for row in front]
        axis.scatter(*ringed, s=95, facecolors="none", edgecolors="black", linewidths=1.1, label="frontier", zorder=4)
    if chosen is not None and _known(chosen):
        axis.scatter(
            [chosen["latency_ms"] / 1e3], [_points_of(chosen)], marker="*", s=230, color="gold",
            edgecolors="black", label="chosen", zorder=5,
        )  # fmt: skip
    guessed = [row["latency_ms"] / 1e3 for row in rows if not _known(row)]
    if guessed:
        axis.plot(
            guessed, [0.012] * len(guessed), "|", color="0.45", transform=axis.get_xaxis_transform(), markersize=9,
            label="accuracy not measured",
        )  # fmt: skip
    axis.axhline(0.0, color="0.4", linestyle="--", linewidth=0.8)
    seconds = [row["latency_ms"] / 1e3 for row in rows]
    if seconds and max(seconds) > _WIDE * min(seconds):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _first(value) in (2, 5) else ""))
    axis.set_xlabel("latency of a picture, s")
    axis.set_ylabel("attribute accuracy less all-cloud, points (95 %)")


def _bars(axis: Any, front: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> None:
    """Where the time goes, fastest on top."""
    shown = list(reversed(front))
    left = [0.0] * len(shown)
    for part, (label, colour) in PARTS.items():
        widths = [row["latency_parts_ms"][part] / 1e3 for row in shown]
        axis.barh(range(len(shown)), widths, left=left, color=colour, label=label, height=0.75)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(shown)), [("> " if row == chosen else "") + _name(row) for row in shown], fontsize=7)
    axis.set_xlabel("latency of a picture by its parts, s")


def _first(value: float) -> int:
    return int(f"{value:e}"[0])


def _goal(axis: Any, seconds: float | None) -> None:
    if seconds is not None:
        axis.axvline(seconds, color="crimson", linestyle=":", linewidth=1.2, label="latency goal")


def _name(row: Mapping[str, Any]) -> str:
    here = "" if row["mask"] == "all computed" else f", {row['mask']}"
    return f"{row['name']} {row['precision']}, split {row['split']}{here}"


def _group(row: Mapping[str, Any]) -> str:
    predicted = " predicted" if row["predicted_steps"] else ""
    return f"{row['name']} {row['precision']}{predicted}"


def _known(row: Mapping[str, Any]) -> bool:
    return row["quality"]["accuracy_difference"] is not None


def _points_of(row: Mapping[str, Any]) -> float:
    return 100 * float(row["quality"]["accuracy_difference"])
