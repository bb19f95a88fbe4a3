"""The Pareto plot of precisions: PSNR of final latents over bytes and over milliseconds, a line a recipe family.

In: measured points by family, the first of each the plain recipe, the others with layers spared. Out: one PNG and,
beside it, the numbers as JSON. Points that another one beats on all three counts are drawn hollow; above 60 dB a point
stands at the top with its figure beside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrelay.compress.recipe_choice import ParetoPoint, pareto_front

_CEILING_DB = 60.0  # above it differences are rounding; such points stand at the top with their figure
_AXES = (("bytes", 1 / 1024, "KiB of unet/model.onnx and its weights"), ("ms", 1.0, "ms a call"))


def save_pareto(
    families: Mapping[str, Sequence[ParetoPoint]], folder: Path, name: str, about: Mapping[str, Any]
) -> None:
    """Write <name>.json (every point, whether it is on the front, and `about`: machine, versions, command) and
    <name>.png into `folder`, all or nothing each."""
    front = set(pareto_front(point for points in families.values() for point in points))
    document = {
        **about,
        "families": {
            family: [{**dataclasses.asdict(point), "on_front": point in front} for point in points]
            for family, points in families.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{name}.json.new"
    beside.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(folder / f"{name}.json")
    plot_pareto(families, front, folder / f"{name}.png")


def plot_pareto(families: Mapping[str, Sequence[ParetoPoint]], front: set[ParetoPoint], out: Path) -> None:
    """Two panels, bytes and ms, dB upwards; the front's points are filled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (name, scale, title) in zip(panels, _AXES, strict=True):
        for i, (family, points) in enumerate(families.items()):
            x, y = [getattr(point, name) * scale for point in points], [min(p.psnr_db, _CEILING_DB) for p in points]
            axis.plot(x, y, "-o", color=f"C{i}", linewidth=1.0, markersize=5.5, alpha=0.5, label=family)
            for point, at, height in zip(points, x, y, strict=True):
                fill = f"C{i}" if point in front else "white"
                axis.plot(at, height, "o", markersize=5.5, color=f"C{i}", markerfacecolor=fill)
                words = [str(point.spared)] if point.spared else []
                words += [f"{point.psnr_db:.0f} dB"] if point.psnr_db > _CEILING_DB else []
                axis.annotate(", ".join(words), (at, height), (4, 4), textcoords="offset points", fontsize=7)
        axis.set_xlabel(title, fontsize=9)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    panels[0].set_ylabel("PSNR of the final latents to the float run, dB", fontsize=9)
    panels[0].legend(fontsize=8, loc="center right")
    figure.suptitle("filled: no other recipe is smaller, faster and closer; numbers: layers spared", fontsize=9)
    beside = out.with_name(f".{out.name}.new")
    try:
        figure.savefig(beside, format="png", dpi=110)
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
