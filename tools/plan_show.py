"""A plan for people: the frontier of every network as a table, what was chosen and why, and where the figures are from.

In: the plan's document and a console. Out: nothing; every figure stands in the document too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrelay.tools.console import printable, table
from rich.console import Console

_COLUMNS = ["what", "split", "steps here", "s", "cloud", "wire", "device", "KiB", "cost", "accuracy, 95 %", "dB"]
_MARKS = {"measured": "", "measured in parts": "(parts)"}


def show(console: Console, document: Mapping[str, Any]) -> None:
    """Print the plan."""
    for link in document["networks"]:
        rtt = "no link" if link["rtt_ms"] is None else f"{link['rtt_ms']:g} ms, {link['down_mbit']:g} Mbit/s down"
        mine = [row for row in document["frontier"] if row["network"] == link["name"]]
        title = f"{document['device']} on {link['name']} ({rtt}, {link['label']}): the frontier"
        chosen = document["by_network"][link["name"]]["chosen"]
        console.print(table(_COLUMNS, [_cells(row, row == chosen) for row in mine], title))
        _verdict(console, document["by_network"][link["name"]])
    for line in document["chosen"]["commands"] if document["chosen"] else ():
        console.print(f"  [bold]{printable(line)}[/]")
    if document["alike"]:
        console.print("Not told apart from it by accuracy (95 % intervals overlap), and faster or cheaper:")
        console.print(table(_COLUMNS, [_cells(row, False) for row in document["alike"]]))
    _sources(console, document)


def _verdict(console: Console, choice: Mapping[str, Any]) -> None:
    if choice["chosen"] is None:
        console.print(f"[bold red]Nothing chosen:[/] {printable(choice['reason'])}.")
        if choice["nearest_miss"] is not None:
            console.print(table(_COLUMNS, [_cells(choice["nearest_miss"], False)], "the nearest miss"))
        return
    row = choice["chosen"]
    console.print(
        f"[bold]Chosen:[/] {printable(row['name'])}, {row['precision']}, split {row['split']} of {row['num_steps']}, "
        f"{printable(row['mask'])}: {printable(choice['reason'])}."
    )


def _sources(console: Console, document: Mapping[str, Any]) -> None:
    console.print(
        "Seconds: all, cloud (queue and steps), wire, device (prompt, steps, decode). Accuracy: points less than all "
        "steps in the cloud, the 95 % interval; (parts): differences measured apart on the same captions, added up."
    )
    hidden = sum(1 for row in document["rows"] if row["quality"]["accuracy_difference"] is None)
    if hidden:
        console.print(f"{hidden} of {len(document['rows'])} rows have no measured accuracy; --json lists them.")
    cloud = document["cloud"]
    console.print(f"Cloud: {cloud['step_ms']:.4g} ms a step, {cloud['label']}: {printable(cloud['source'])}.")
    told = dict.fromkeys((row["device_label"], row["device_source"]) for row in document["frontier"])
    for label, source in told:
        console.print(f"Device: {label}: {printable(source)}.")
    for link in document["networks"]:
        console.print(f"Network {link['name']}: {link['label']}: {printable(link['source'])}.")
    console.print("Parts follow one after another; encoding the prompt while the cloud works would save its time.")


def _cells(row: Mapping[str, Any], chosen: bool) -> list[str]:
    parts, quality = row["latency_parts_ms"], row["quality"]
    here = parts["text_encoder"] + parts["device_steps"] + parts["decode"]
    interval = quality["accuracy_difference_95"]
    accuracy = "?" if interval is None else f"{100 * interval[0]:+.1f} {100 * interval[1]:+.1f}"
    return [
        f"{'> ' if chosen else ''}{row['name']} {row['precision']}",
        str(row["split"]),
        row["mask"].removesuffix(" computed") if row["predicted_steps"] else "all",
        f"{row['latency_ms'] / 1e3:.3f}",
        _seconds(parts["cloud_queue"] + parts["cloud_steps"]),
        _seconds(parts["transfer"]),
        _seconds(here),
        f"{row['down_bytes'] / 1024:.1f}" if row["down_bytes"] else "-",
        "-" if row["cost"] is None else f"{row['cost']:.3g}",
        f"{accuracy} {_MARKS.get(quality['label'], '')}".strip(),
        "?" if quality["psnr_db"] is None else f"{quality['psnr_db']:.1f}",
    ]


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.3f}" if ms else "-"
