"""Two plots of what a step schedule is made from: error matrices as heat maps, and the probes' rank correlations.

In: `ErrorMatrix`es with the mask that was chosen on each, and `Fidelity` rows. Out: PNG files, all or nothing each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.compress.error_matrix import ErrorMatrix
from latentrelay.compress.probe_fidelity import Estimate, Fidelity

_RANKS = {
    "across_tokens": "over tokens: where is prediction hard?",
    "across_candidates": "over candidates: which one is good?",
    "preferences": "over tokens, of a candidate beside the others: who differs?",
}


@dataclass(frozen=True, eq=False)
class MatrixPanel:
    """One heat map: a matrix, the first step of the segment shown and the mask that was chosen on it."""

    title: str
    matrix: ErrorMatrix
    first: int
    mask: Sequence[str]


def plot_error_matrices(panels: Sequence[MatrixPanel], out: Path) -> None:
    """A panel each, one colour scale for all: the computed step down, the step that reuses it across, white lines at
    the chosen mask's computed steps and a dot on each reuse that it makes. Raises OSError."""
    figure = _figure(4.3 * len(panels), 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    parts = [panel.matrix.values[s, s] for panel in panels for s in [_segment(panel)]]
    highest = max(float(np.nanmax(part)) for part in parts)
    for axis, panel, part in zip(axes, panels, parts, strict=True):
        upper = np.where(np.triu(np.ones(part.shape, dtype=bool), 1), part, np.nan)
        low, high = panel.first - 0.5, panel.first + len(part) - 0.5
        image = axis.imshow(upper, vmin=0.0, vmax=highest, extent=(low, high, high, low), cmap="viridis")
        computed = panel.first
        for step, kind in enumerate(panel.mask, start=panel.first):
            if kind == "full":
                computed = step
                axis.plot([step - 0.5, high], [step, step], color="0.6", linewidth=0.5, zorder=0)
            else:
                axis.plot(
                    step, computed, "o", color="white", markeredgecolor="black", markersize=4.5, markeredgewidth=0.6
                )
        kept = [step for step, kind in enumerate(panel.mask, start=panel.first) if kind == "full"]
        axis.plot(kept, kept, "s", color="C3", markersize=5)
        axis.set_title(panel.title, fontsize=9)
        axis.set_xlabel("step i", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("computed step c", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.85, pad=0.01)
    bar.set_label("E[c, i]: relative L1 of reusing step c at step i", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        "squares: computed steps of the chosen mask; dots: where each predicted step's feature is from", fontsize=9
    )
    _save(figure, out)


def plot_probe_fidelity(groups: Mapping[str, Sequence[Fidelity]], out: Path) -> None:
    """Four panels over probes, a bar a group and metric with its interval over runs: the three rank correlations, and
    what choosing by the probe leaves of the best fixed candidate's error. Raises OSError."""
    figure = _figure(11.0, 7.0)
    panels = figure.subplots(2, 2)
    series = {
        f"{group}, {metric}": {row.probe: row for row in rows if row.metric == metric}
        for group, rows in groups.items()
        for metric in dict.fromkeys(row.metric for row in rows)
    }
    for axis, (field, title) in zip(panels.flat, _RANKS.items(), strict=False):
        _bars(axis, {name: {p: getattr(row, field) for p, row in rows.items()} for name, rows in series.items()})
        axis.set_title(f"Spearman, {title}", fontsize=9)
        axis.axhline(0.0, color="black", linewidth=0.7)
    last = panels.flat[-1]
    ratios = {
        name: {p: Estimate.of([row.chosen.mean / row.best_fixed.mean]) for p, row in rows.items()}
        for name, rows in series.items()
    }
    _bars(last, ratios)
    for i, rows in enumerate(series.values()):
        best = min(row.oracle.mean / row.best_fixed.mean for row in rows.values())
        last.axhline(best, color=f"C{i}", linewidth=1.0, linestyle=":")
    last.axhline(1.0, color="black", linewidth=0.7)
    last.set_ylim(0.0, 1.15)
    last.set_title("squared error, tokens' choice over the best fixed row; dotted: the best choice", fontsize=9)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, out)


def _bars(axis: Any, series: Mapping[str, Mapping[str, Estimate]]) -> None:
    names = list(dict.fromkeys(name for found in series.values() for name in found))
    width = 0.8 / len(series)
    for i, (label, found) in enumerate(series.items()):
        at = [names.index(name) + (i + 0.5) * width - 0.4 for name in found]
        means = np.array([each.mean for each in found.values()])
        ends = np.array([[each.low, each.high] for each in found.values()]).T
        known = bool(np.isfinite(ends).all())
        spread = [(means - ends[0]).tolist(), (ends[1] - means).tolist()] if known else None
        axis.bar(at, means, width * 0.92, yerr=spread, color=f"C{i}", label=label, error_kw={"linewidth": 0.9})
    axis.set_xticks(range(len(names)), names)
    axis.grid(axis="y", alpha=0.3)
    axis.tick_params(labelsize=8)


def _segment(panel: MatrixPanel) -> slice:
    return slice(panel.first, panel.first + len(panel.mask))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.new")
    try:
        figure.savefig(beside, format="png", dpi=110)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
