"""What `evaluate --accelerate` leaves behind: accelerate.json, accelerate.html and accelerate.png, each in one move."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from latentrelay.tools.accelerate_plot import plot

FILES = ("accelerate.json", "accelerate.html", "accelerate.png")
SHORT = ("method", "computed", "ms", "time", "PSNR dB", "95 %", "picture dB", "SSIM", "attributes", "Frechet")
_TEMPLATE = "accelerate.html.j2"


def write(document: Mapping[str, Any], folder: Path) -> None:
    """The three files."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = plot(document)
    _replace(folder / FILES[0], (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    _replace(folder / FILES[1], html(document, picture).encode())
    _replace(folder / FILES[2], picture)


def short(row: Mapping[str, Any]) -> list[str]:
    """One row for a terminal."""
    low, high = row["psnr_db_95"]
    return [
        row["label"] + (" *" if row["ours"] else ""),
        f"{row['computed_steps']:.1f}",
        f"{row['device_ms']:.1f}",
        f"{row['time_share']:.0%}",
        f"{row['psnr_db']:.2f}",
        f"{low:.1f}..{high:.1f}",
        f"{row['picture_psnr_db']:.2f}",
        f"{row['ssim']:.4f}",
        f"{row['attribute_accuracy']:.1%}",
        f"{row['frechet_distance']:.1f}",
    ]


def sentence(entry: Mapping[str, Any]) -> str:
    """One point of the frontier in words."""
    if entry["gain_db"] is None:
        return f"{entry['share']:.0%} of the segment's time: {entry['verdict']}"
    low, high = entry["gain_db_95"]
    return (
        f"{entry['share']:.0%} of the segment's time: {entry['verdict']}; {entry['ours']} {entry['ours_psnr_db']:.2f} "
        f"dB, {entry['rival']} {entry['rival_psnr_db']:.2f} dB, {entry['gain_db']:+.2f} ({low:+.2f}..{high:+.2f}) dB"
    )


def html(document: Mapping[str, Any], picture: bytes) -> str:
    """The report as one file, its plot inside."""
    import jinja2

    text = resources.files("latentrelay.tools").joinpath("templates", _TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows = [(row["ours"], short(row)) for row in sorted(document["rows"], key=lambda row: -row["device_ms"])]
    page: str = environment.from_string(text).render(
        document=document,
        heads=SHORT,
        rows=rows,
        frontier=[sentence(entry) for entry in document["frontier"]],
        picture=base64.b64encode(picture).decode(),
    )
    return page


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)
