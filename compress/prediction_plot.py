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
    """Two panels over probes, a bar a group and metric with its interval: Spearman over tokens, and over candidates.
    Raises OSError."""
    figure = _figure(10.0, 4.0)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys(row.probe for rows in groups.values() for row in rows))
    series = {
        f"{group}, {metric}": {row.probe: row for row in rows if row.metric == metric}
        for group, rows in groups.items()
        for metric in dict.fromkeys(row.metric for row in rows)
    }
    width = 0.8 / len(series)
    for axis, field in zip(panels, ("across_tokens", "across_candidates"), strict=True):
        for i, (label, found) in enumerate(series.items()):
            at = [names.index(name) + (i + 0.5) * width - 0.4 for name in found]
            estimates: list[Estimate] = [getattr(row, field) for row in found.values()]
            means = np.array([each.mean for each in estimates])
            spread = [means - [each.low for each in estimates], [each.high for each in estimates] - means]
            axis.bar(at, means, width * 0.92, yerr=spread, color=f"C{i}", label=label, error_kw={"linewidth": 0.9})
        axis.set_xticks(range(len(names)), names)
        axis.set_title(f"{field.replace('_', ' ')}", fontsize=9)
        axis.grid(axis="y", alpha=0.3)
        axis.axhline(0.0, color="black", linewidth=0.7)
        axis.tick_params(labelsize=8)
    panels[0].set_ylabel("Spearman, error on the probe and on the feature", fontsize=8)
    panels[1].legend(fontsize=7)
    _save(figure, out)


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
