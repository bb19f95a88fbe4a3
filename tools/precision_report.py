"""What `evaluate --precision` leaves behind: precision.json, precision.html and precision.png, each in one move."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FILES = ("precision.json", "precision.html", "precision.png")
SHORT = ("precision", "MiB", "ms", "peak MiB", "PSNR dB", "without", "PTQD", "gain", "attributes", "Frechet", "verdict")
_NEARLY_EQUAL_DB = 100.0
_TEMPLATE = "precision.html.j2"


def write(document: Mapping[str, Any], folder: Path) -> None:
    """The three files."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = plot(document)
    _replace(folder / FILES[0], (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    _replace(folder / FILES[1], html(document, picture).encode())
    _replace(folder / FILES[2], picture)


def short(row: Mapping[str, Any]) -> list[str]:
    """One row for a terminal."""
    return [
        row["precision"] + (" (simulated)" if row["simulated"] else ""),
        _number(row["bytes"] / 2**20, 2),
        _number(row["median_ms"], 2),
        _number(row["peak_memory_mib"], 0),
        _number(row["psnr_db"], 2),
        _number(row["psnr_db_uncompensated"], 2),
        _number(row["psnr_db_ptqd"], 2),
        _number(row["psnr_db_gain_only"], 2),
        f"{row['attribute_accuracy']:.1%}",
        _number(row["frechet_distance"], 1),
        row["verdict"],
    ]


def plot(document: Mapping[str, Any]) -> bytes:
    """A PNG: PSNR with and without compensation by precision, and each precision's error by step."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.3))
    _bars(bars, [row for row in document["rows"] if row["precision"] != "fp32"])
    _curves(curves, document["curves"])
    figure.suptitle(
        f"{document['student']}, {document['num_steps']} {document['sampler']} steps, {document['split']} in the "
        f"cloud; {document['captions']} captions, {document['kernels']}",
        fontsize=10,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _bars(axis: Any, rows: list[Mapping[str, Any]]) -> None:
    top = max([row["psnr_db"] for row in rows if row["psnr_db"] < _NEARLY_EQUAL_DB], default=_NEARLY_EQUAL_DB)
    for i, row in enumerate(rows):
        shipped, without = row["psnr_db"], row["psnr_db_uncompensated"]
        if without is not None:
            axis.bar(i - 0.2, without, 0.38, color="0.7", label="without compensation" if i == 0 else None)
        axis.bar(i + (0.2 if without is not None else 0.0), shipped, 0.38, color="C3" if row["simulated"] else "C0")
        label = "equal" if shipped >= _NEARLY_EQUAL_DB else f"{shipped:.1f}"
        axis.annotate(label, (i + 0.2, min(shipped, 1.02 * top)), ha="center", va="bottom", fontsize=8)
    axis.set_ylim(0, 1.12 * top)
    labels = [row["precision"] + ("\n(simulated)" if row["simulated"] else "") for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set_title("final latents: PSNR to the float run, dB", fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    axis.legend(fontsize=8)


def _curves(axis: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        axis.plot(curve["steps"], curve["before"], color=f"C{i}", linewidth=1.2, label=name)
        if curve["after"] is not None:
            axis.plot(curve["steps"], curve["after"], color=f"C{i}", linewidth=1.2, linestyle="--")
    axis.set_yscale("log")
    axis.set_title("error of a step's guided prediction / its power (dashed: compensated)", fontsize=10)
    axis.set_xlabel("step of the whole run", fontsize=9)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def html(document: Mapping[str, Any], picture: bytes) -> str:
    """The report as one file, its plot inside."""
    import jinja2

    text = resources.files("latentrelay.tools").joinpath("templates", _TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    rows = [short(row) for row in document["rows"]]
    image = base64.b64encode(picture).decode()
    page: str = environment.from_string(text).render(document=document, heads=SHORT, rows=rows, picture=image)
    return page


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)
