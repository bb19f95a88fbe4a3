"""Plot what `training.fit` logged: `python -m latentrelay.reference.curve runs/reference curve.png`.

In: a training folder with `<stage>/log.jsonl` files. Out: one PNG, a panel a network, loss over samples seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Folder, the logged value worth seeing, and what it is called.
PANELS = {
    "text": ("loss", "text encoder: cross-entropy"),
    "vae": ("mse", "VAE: squared error, range 0..1"),
    "unet-64": ("v_mse", "U-Net at 8x8 latents: squared error of v"),
    "unet-128": ("v_mse", "U-Net at 16x16 latents: squared error of v"),
    "judge": ("accuracy", "judge: read right on degraded renderings"),
    "light_vae/decoder": ("mse", "light decoder: squared error to the VAE's, range 0..1"),
    "light_vae/encoder": ("latent_mse", "light encoder: squared error of latents"),
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The log's rows, a step once: where a killed run was resumed, what it did again replaces what it had done."""
    rows = {int(row["step"]): row for row in map(json.loads, path.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]


def plot(folder: Path, out: Path) -> None:
    """One panel for each log that exists. Raises FileNotFoundError when there is none."""
    logs = {name: folder / f"{name}.jsonl" for name in PANELS}
    logs = {name: path if path.exists() else folder / name / "log.jsonl" for name, path in logs.items()}
    found = {name: path for name, path in logs.items() if path.exists()}
    if not found:
        raise FileNotFoundError(f"no logs of {', '.join(PANELS)} in {folder}")
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3), squeeze=False)
    for axis, (name, path) in zip(axes[0], found.items(), strict=True):
        value, title = PANELS[name]
        rows = rows_of(path)
        axis.plot([row["step"] for row in rows], [row[value] for row in rows], linewidth=1)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if value != "accuracy":
            axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(
    folder: Annotated[Path, typer.Argument(help="A training folder, or one of <stage>.jsonl files.")],
    out: Annotated[Path, typer.Argument(help="The PNG to write.")],
) -> None:
    """Plot the learning curves of a training folder."""
    plot(folder, out)


if __name__ == "__main__":
    typer.run(main)
