"""What a sweep leaves behind: sweep.json, sweep.md (the table and how it was made) and sweep.png (the plot)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrelay.tools.sweep_plot import plot

FILES = ("sweep.json", "sweep.md", "sweep.png")
COLUMNS = (
    "student",
    "k",
    "accuracy",
    "to all-cloud, points (95 %)",
    "exact",
    "Frechet",
    "x",
    "PSNR dB",
    "SSIM",
    "cloud GFLOPs",
    "saved",
    "w/o decode",
    "device GFLOPs",
    "cloud s",
    "device s",
    "bytes",
)

SHORT = ("student", "k", "accuracy", "points (worst)", "Frechet x", "PSNR", "saved", "cloud s", "device s", "bytes")


def write(document: Mapping[str, Any], folder: Path) -> None:
    """The three files, each replaced in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / FILES[0], json.dumps(document, indent=2, allow_nan=False) + "\n")
    _replace(folder / FILES[1], markdown(document))
    plot(document, folder / FILES[2])


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table."""
    low, high = (100 * end for end in row["attribute_accuracy_difference_95"])
    return [
        row["student"] or "(none)",
        str(row["split"]),
        f"{row['attribute_accuracy']:.1%}",
        f"{100 * row['attribute_accuracy_difference']:+.2f} ({low:+.2f} .. {high:+.2f})",
        f"{row['exact_scene_rate']:.1%}",
        f"{row['frechet_distance']:.1f}",
        f"{row['frechet_ratio']:.3f}",
        f"{row['psnr_db']:.1f}",
        f"{row['ssim']:.3f}",
        f"{row['cloud_flops'] / 1e9:.2f}",
        f"{row['cloud_flops_saving']:.1%}",
        f"{row['cloud_flops_saving_without_decode']:.1%}",
        f"{row['device_flops'] / 1e9:.2f}",
        f"{row['cloud_seconds']:.3f}",
        f"{row['device_seconds']:.3f}",
        f"{row['wire_bytes']:,}",
    ]


def short_cells(row: Mapping[str, Any]) -> list[str]:
    """The same for a terminal: less of it; in brackets the interval's lower end."""
    worst = 100 * row["attribute_accuracy_difference_95"][0]
    return [
        row["student"],
        str(row["split"]),
        f"{row['attribute_accuracy']:.1%}",
        f"{100 * row['attribute_accuracy_difference']:+.1f} ({worst:+.1f})",
        f"{row['frechet_ratio']:.3f}",
        f"{row['psnr_db']:.1f}",
        f"{row['cloud_flops_saving']:.1%}",
        f"{row['cloud_seconds']:.2f}",
        f"{row['device_seconds']:.2f}",
        f"{row['wire_bytes']:,}",
    ]


def notes(document: Mapping[str, Any]) -> list[str]:
    """How to read the table, a line each."""
    steps, whole = document["num_steps"], document["all_cloud"]
    flops = next(iter(document["students"].values()))["flops"]
    giga = {name: value / 1e9 for name, value in flops.items()}
    sizes = ", ".join(
        f"{name} {each['parameters']:,} ({each['parameters_ratio']:.1%} of the teacher's)"
        for name, each in document["students"].items()
    )
    return [
        f"{document['captions']} captions of the {document['data_split']} split, seed {document['seed']}; {steps} "
        f"{document['sampler']} steps, guidance {document['guidance']:g}; model {document['model']}. U-Nets: {sizes}.",
        f"k = {steps} is the all-cloud run (source decoder, in the cloud); k < {steps} decodes on the device with the "
        f"{document['device_decoder']} decoder. Differences, PSNR and SSIM are to the all-cloud picture of the same "
        "caption and seed.",
        f"Chance {whole['chance_accuracy']:.1%}, true renderings {whole['true_renderings_accuracy']:.1%} (Frechet "
        f"{whole['true_renderings_frechet_distance']:.1f}).",
        f"FLOPs: convolutions and products, 2 a multiply-add. Teacher step (batch 2) {giga['cloud_step']:.3f} G, "
        f"prompt {giga['text_encoder']:.3f} G (counted on each side that makes a step), source decode "
        f"{giga['cloud_decode']:.3f} G, device decode {giga['device_decode']:.3f} G. Saved: 1 - cloud FLOPs / those of "
        "the all-cloud run with its decode; beside it without that decode.",
        f"Seconds: medians of {document['timed_pictures']} pictures, one at a time, {document['threads']} threads on "
        "this machine, no network. Bytes: the handoff (float16), for the all-cloud run the picture as a PNG.",
    ]


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown with the notes below it."""
    rows = [*document["rows"], document["cloud_latents_decoded_on_device"]]
    lines = [
        "# Where to split",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---|{'---:|' * (len(COLUMNS) - 1)}",
        *(f"| {' | '.join(cells(row)).replace('(none)', 'cloud latents, device decode')} |" for row in rows),
        "",
        *(f"- {line}" for line in notes(document)),
    ]
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
