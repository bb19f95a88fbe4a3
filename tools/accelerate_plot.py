"""The frontier of accelerated runs as a PNG: device time against PSNR to the uncached run and against attributes.

In: the evaluation's document. Out: bytes. A point a method, a line a family (its best points from left to right), ours
thick; dashed lines stand where the frontier is judged. The ablation stands beside it, gains with their intervals.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MARKERS = "osv^D<>pXP*hd"
_COLOURS = matplotlib.colormaps["tab20"]
_PANELS = (
    ("psnr_db", 1.0, "PSNR of the final latents to the uncached run, dB"),
    ("attribute_accuracy", 100.0, "attribute accuracy, %"),
    ("frechet_distance", 1.0, "Frechet distance on the judge's features"),
)
_LEAST_DB, _MOST_SHARE = 12.0, 1.05


def plot(document: Mapping[str, Any]) -> bytes:
    """A PNG."""
    ablation = document["ablation"]
    below = 0.16 * len(ablation) + 0.8 if ablation else 0.0
    figure = Figure(figsize=(16, 5.6 + below), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=(5.6, below)) if ablation else [figure]
    above = halves[0]
    families, axes = _families(document["rows"]), above.subplots(1, 3)
    whole = document["rows"][0]
    for axis, (name, scale, title) in zip(axes, _PANELS, strict=True):
        _frontier(axis, families, name, scale, title)
        if name != "psnr_db":
            axis.axhline(scale * whole[name], color="0.4", linestyle="--", linewidth=0.8)
        for entry in document["frontier"]:
            axis.axvline(100 * entry["share"], color="0.4", linestyle=":", linewidth=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    above.legend(handles, labels, fontsize=7, ncols=9, loc="outside lower center")
    if ablation:
        _ablation(halves[1].subplots(), ablation)
    figure.suptitle(
        f"{document['student']} {document['precision']}, steps {document['split']}..{document['num_steps'] - 1} of "
        f"{document['num_steps']} ({document['sampler']}) on {document['threads']} thread(s); "
        f"{document['captions']} captions of the {document['data_split']} split",
        fontsize=10,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=100)
    return stream.getvalue()


def _families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the name of a line, the uncached run left out: ours first."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows[1:], key=lambda each: not each["ours"]):
        found.setdefault(_family(row), []).append(row)
    return found


def _family(row: Mapping[str, Any]) -> str:
    settings, name = row["settings"], row["method"]
    if name == "fewer steps":
        return f"{name}, {settings['grid']} grid"
    if name == "TaylorSeer":
        return f"{name}, {str(settings['target']).replace('_', ' ')}"
    if row["ours"] and "orders" in settings:
        return f"{name}, rectified" if settings.get("rectifier") else name
    return str(name)


def _frontier(
    axis: Any, families: Mapping[str, Sequence[Mapping[str, Any]]], name: str, scale: float, title: str
) -> None:
    for i, (family, rows) in enumerate(families.items()):
        shown = [row for row in rows if row["time_share"] <= _MOST_SHARE]
        x, y = [100 * row["time_share"] for row in shown], [scale * row[name] for row in shown]
        ours = bool(rows[0]["ours"])
        colour, marker = _COLOURS(i % 20), _MARKERS[i % len(_MARKERS)]
        axis.scatter(x, y, color=colour, marker=marker, s=26 if ours else 15, alpha=1.0 if ours else 0.8)
        best = _upper(list(zip(x, y, strict=True)), lower=name == "frechet_distance")
        style = "-" if ours else "--"
        axis.plot(*zip(*best, strict=True), color=colour, linewidth=1.8 if ours else 0.9, linestyle=style)
        axis.plot([], [], color=colour, marker=marker, linewidth=1.8 if ours else 0.9, linestyle=style, label=family)
    if name == "psnr_db":
        axis.set_ylim(bottom=_LEAST_DB)
    axis.set_xlim(0, 100 * _MOST_SHARE)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("device time of the segment, % of every step computed", fontsize=9)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)


def _upper(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """From left to right the points that no cheaper one beats."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (each[0], each[1] if lower else -each[1])):
        if not best or (point[1] < best[-1][1] if lower else point[1] > best[-1][1]):
            best.append(point)
    return best or [(0.0, float("nan"))]


def _ablation(axis: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    colours = {"kept": "C2", "dropped": "C3"}
    for i, entry in enumerate(reversed(entries)):
        low, high = entry["gain_db_95"]
        colour = colours.get(entry["verdict"], "0.5")
        axis.plot([low, high], [i, i], color=colour, linewidth=1.6)
        axis.plot(entry["gain_db"], i, "o", color=colour, markersize=3.5)
    labels = [f"{entry['part']} at {entry['share']:.0%}" for entry in reversed(entries)]
    axis.set_yticks(range(len(labels)), labels, fontsize=6.5)
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set_title("gain of each part, dB (green: kept, red: dropped)", fontsize=10)
    axis.grid(axis="x", alpha=0.25)
