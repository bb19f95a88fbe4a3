"""`latentrelay demo`: the whole chain on this machine, offline: bundle, server, three ways to a picture, a report.

Builds a bundle of the reference pipeline, starts `latentrelay serve` as a process of its own on a free loopback port,
makes the pictures of held-out captions three ways (all steps in the cloud, split, all on the device), has the judge
read them, and writes report.html, report.json and grid.png. All three use the same seeds, so they differ in nothing
but where the steps ran.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.device_profiles import load_profile
from latentrelay.runtime import Bundle, CloudClient, Result, Session, generate
from latentrelay.runtime.errors import LatentRelayError, RequestError
from latentrelay.tools.console import counting, emit, err, extra, printable, table
from latentrelay.tools.models import REFERENCE, default_guidance, resolve

WAYS = ("cloud", "hybrid", "device")
_SEED = 7
_START_S = 120


class ServerDidNotStartError(LatentRelayError):
    """The demo's own server process ended, or did not answer in time."""


@dataclass(frozen=True)
class Picture:
    """One caption's picture made one way."""

    caption: str
    image: str
    result: Result
    right: int
    named: int


def machine_profile() -> str:
    """The shipped profile nearest to the machine this runs on."""
    if platform.system() == "Darwin":
        return "mac-m1"
    known = {"x86_64": "x86-laptop-vnni", "AMD64": "x86-laptop-vnni", "aarch64": "raspberry-pi-5"}
    return known.get(platform.machine(), "generic-android")


def run(output: Path, *, captions: int, num_steps: int, split: int, device: str | None, as_json: bool) -> None:
    """Make everything below `output` and print where it is."""
    if split > num_steps:
        raise RequestError("split is beyond the run", got=split, expected=f"0 .. {num_steps}")
    with extra("export", "the demo"):
        from latentrelay.export import export, load_source
        from latentrelay.reference.captions import sample_captions
        from latentrelay.reference.pipeline import reference_path
        from latentrelay.reference.students import student_path
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    profile = load_profile(device or machine_profile())
    with counting(f"building a bundle for {profile.name}", None) as advance:
        built = export(
            load_source(resolve(REFERENCE), name=REFERENCE),
            profile,
            output / "bundle",
            num_steps=num_steps,
            guidance=default_guidance(REFERENCE),
            overwrite=True,
            progress=lambda words: advance(words, 1),
            student=student_path(profile.student_class),
            light_vae=reference_path() / "light_vae",
        )
    build_s = time.perf_counter() - started
    pairs = sample_captions("gate", captions, _SEED)  # held out too; only `evaluate` reads report
    splits = {"cloud": num_steps, "hybrid": split, "device": 0}
    err.print(f"built {printable(built.bundle)} in {build_s:.0f} s; starting the server")
    bundle = Bundle.open(built.bundle)
    with serving(REFERENCE) as url, Session(bundle) as session, CloudClient(url) as client:
        runs = {way: _pictures(session, client, way, splits[way], pairs, output) for way in WAYS}
    document = {
        "bundle": str(built.bundle),
        "bundle_digest": built.digest,
        "device": profile.name,
        "precision": bundle.manifest.precision,
        "num_steps": num_steps,
        "split": split,
        "handoff_bytes": runs["hybrid"][0].result.handoff_bytes,
        "runs": {way: _summary(rows) for way, rows in runs.items()},
        "parity_db": dict(built.parity_db),
        "fidelity_to_cloud_psnr_db": {way: _fidelity(runs[way], runs["cloud"]) for way in ("hybrid", "device")},
        "seconds": {"build": round(build_s, 1), "total": round(time.perf_counter() - started, 1)},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
    }
    _write(output, document, runs, pairs)
    rows = [
        [way, f"{item['attribute_accuracy']:.1%}", f"{item['seconds']:.2f}", f"{item['handoff_bytes']:,}"]
        for way, item in document["runs"].items()  # type: ignore[attr-defined]
    ]

    def show(console: Any) -> None:
        console.print(table(["run", "attribute accuracy", "s a picture", "bytes"], rows))
        console.print(f"report: [bold]{printable(output / 'report.html')}[/]")

    emit({"report": str(output / "report.html"), **document}, as_json, show)


@contextlib.contextmanager
def serving(model: str) -> Iterator[str]:
    """`latentrelay serve` in a process of its own, on a free loopback port; its address. Ended on leaving.

    Raises ServerDidNotStartError with the server's own words.
    """
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        command = [sys.executable, "-m", "latentrelay.tools.cli", "serve", "--model", model, "--port", "0"]
        with log.open("wb") as words:
            process = subprocess.Popen([*command, "--port-file", str(port_file)], stdout=words, stderr=words)
        try:
            deadline = time.monotonic() + _START_S
            while not port_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerDidNotStartError(
                        "the server did not start",
                        got=log.read_text(errors="replace")[-1500:],
                        do="Run it by hand: latentrelay serve",
                    )
                time.sleep(0.1)
            yield f"http://127.0.0.1:{int(port_file.read_text())}"
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()


def _pictures(
    session: Session, client: CloudClient, way: str, split: int, pairs: Sequence[tuple[Any, Any]], output: Path
) -> list[Picture]:
    import torch
    from latentrelay.reference import judge as judging
    from latentrelay.reference.pipeline import reference_path

    judge = judging.load_judge(reference_path())
    (output / "images").mkdir(exist_ok=True)
    rows = []
    with counting(f"{way}: {len(pairs)} pictures", len(pairs)) as advance:
        for i, (_, caption) in enumerate(pairs):
            result = generate(
                session, caption.text, seed=_SEED + i, split=split, cloud=client if split else None, fallback=False
            )
            image = f"images/{way}-{i}.png"
            result.save_png(output / image)
            pixels = torch.from_numpy(np.ascontiguousarray(result.pixels)).permute(2, 0, 1)[None] * 2 - 1
            verdict = judging.score(judging.read(judge, pixels)[0][0], caption)
            flat = [value for values in verdict.right.values() for value in values]
            rows.append(Picture(caption.text, image, result, sum(flat), len(flat)))
            advance(f"{way}: {len(pairs)} pictures", 1)
    return rows


def _summary(rows: Sequence[Picture]) -> dict[str, Any]:
    stages = rows[0].result.ms
    return {
        "attribute_accuracy": statistics.mean(row.right / row.named for row in rows),
        "seconds": round(statistics.median(row.result.ms["total"] for row in rows) / 1e3, 4),
        "ms": {name: round(statistics.median(row.result.ms[name] for row in rows), 2) for name in stages},
        "steps": dict(rows[0].result.steps),
        "handoff_bytes": rows[0].result.handoff_bytes,
        "path_taken": rows[0].result.path_taken,
        "providers": list(rows[0].result.providers),
        "images": [row.image for row in rows],
    }


def _fidelity(rows: Sequence[Picture], reference: Sequence[Picture]) -> float:
    """Mean PSNR in dB (peak 1) to the all-cloud pictures of the same seeds; equal pictures count as 100 dB."""
    squared = [float(np.mean((a.result.pixels - b.result.pixels) ** 2)) for a, b in zip(rows, reference, strict=True)]
    return round(statistics.mean(min(100.0, -10 * float(np.log10(max(value, 1e-12)))) for value in squared), 1)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _write(output: Path, document: dict[str, Any], runs: dict[str, list[Picture]], pairs: Sequence[Any]) -> None:
    from jinja2 import Environment, PackageLoader, select_autoescape
    from latentrelay.tools.sheet import Cell, save_sheet

    save_sheet(
        [[Cell(row.result.pixels, f"{way}: {row.caption}") for row in rows] for way, rows in runs.items()],
        output / "grid.png",
    )
    _replace(output / "report.json", json.dumps(document, indent=2))
    loader = PackageLoader("latentrelay.tools", "templates")
    page = Environment(loader=loader, autoescape=select_autoescape(["html", "j2"])).get_template("report.html.j2")
    captions = [caption.text for _, caption in pairs]
    _replace(output / "report.html", page.render(report=document, runs=runs, ways=WAYS, captions=captions))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
