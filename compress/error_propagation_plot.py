"""Predicted against measured final error, a point a run and a colour a precision; and which steps the error is from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from latentrelay.compress.error_propagation import Prediction


def plot_predictions(predictions: Mapping[str, Prediction], out: Path) -> None:
    """Write a PNG of two panels: the left one's diagonal is a perfect prediction; raises OSError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (scatter, steps) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, found in predictions.items():
        points = (-10.0 * np.log10(each) for each in (found.measured, found.predicted))
        scatter.plot(*points, ".", markersize=5, label=f"{name} (predicted error {found.bias_db:+.1f} dB)")
        steps.semilogy(np.maximum(found.step_shares, 1e-6), ".-", linewidth=1, label=name)
    values = np.concatenate([np.concatenate([each.measured, each.predicted]) for each in predictions.values()])
    ends = -10.0 * np.log10([values.min() / 1.2, values.max() * 1.2])
    scatter.plot(ends, ends, "k-", linewidth=0.7)
    scatter.set_xlabel("measured error of the final latents, -10 log10 of its mean square; a point a run", fontsize=8)
    scatter.set_ylabel("predicted from the steps' errors", fontsize=8)
    steps.set_xlabel("step in the whole run", fontsize=8)
    steps.set_ylabel("share of the final error's power", fontsize=8)
    for axis in (scatter, steps):
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.stem}.tmp.png")
    figure.savefig(beside, dpi=110)
    pyplot.close(figure)
    beside.replace(out)
