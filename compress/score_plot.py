"""Two plots of a compression: the units' scores, and the losses of a distillation with its held-out score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrelay.compress.prunable_units import PrunableUnit

_COLOURS = {
    "resnet": "tab:blue",
    "self_attention": "tab:orange",
    "cross_attention": "tab:green",
    "feed_forward": "tab:red",
    "blocks": "tab:gray",
}


def plot_scores(scores: Mapping[str, float], units: Sequence[PrunableUnit], out: Path) -> None:
    """A bar a unit in the network's order, coloured by kind, on a logarithmic axis; block removals at the end."""
    kinds: dict[str, str] = {unit.path: unit.kind for unit in units}
    shown = {path: score for path, score in scores.items() if score != float("inf")}
    figure, axis = _figure((8, 0.17 * len(shown) + 1.2))
    floor = max(1e-4, min((score for score in shown.values() if score > 0), default=1e-4) / 2)
    colours = [_COLOURS[kinds.get(path, "blocks")] for path in shown]
    axis.barh(range(len(shown)), [max(floor, score) for score in shown.values()], color=colours)
    axis.set_yticks(range(len(shown)), [path.replace(".transformer_blocks.0", "") for path in shown], fontsize=6)
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.set_xlim(left=floor)
    axis.set_xlabel("how far the final latents' statistics move when the unit keeps half its width", fontsize=8)
    axis.grid(alpha=0.3, axis="x")
    for kind, colour in _COLOURS.items():
        axis.barh([0], [0], color=colour, label=kind.replace("_", " "))
    axis.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncol=len(_COLOURS), frameon=False)
    _save(figure, out)


def plot_losses(folder: Path, out: Path) -> None:
    """The training's losses and, where it was scored, its held-out error; both axes logarithmic in the loss."""
    rows = _rows(folder / "log.jsonl")
    figure, axis = _figure((6, 3.6))
    for name in ("task", "output", "feature"):
        if rows and name in rows[0]:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=name, linewidth=1)
    held = _rows(folder / "held_out.jsonl")
    if held:
        steps, values = [row["step"] for row in held], [row["score"] for row in held]
        axis.plot(steps, values, "k.-", label="held-out output error (relative)")
    axis.set_yscale("log")
    axis.set_xlabel("step", fontsize=8)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    _save(figure, out)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _figure(size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size)


def _save(figure: Any, out: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.stem}.tmp.png")
    figure.savefig(beside, dpi=110)
    pyplot.close(figure)
    beside.replace(out)
