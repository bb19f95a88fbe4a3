"""`latentrelay evaluate --prediction-profile BUNDLE`: what can be predicted of a device's steps, before anything is.

In: built bundles of one student, the float one first, and captions. Records float runs from the first step and from the
split, asks every bundle's deployed U-Net for its deep feature, its output and its probes along them, and the source's
full model for the cloud's part. Out: prediction_profile.json (error matrices, schedules at several budgets, rank
correlations of the probes) and two plots. No sampler is built on any of it here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.machine import read_machine
from latentrelay.tools.models import REFERENCE, resolve

if TYPE_CHECKING:
    from latentrelay.compress.prediction_plot import MatrixPanel
    from latentrelay.compress.probe_fidelity import Fidelity

FILES = ("prediction_profile.json", "error_matrix.png", "probe_fidelity.png")
BUDGETS = (4, 5, 6, 8, 11)  # computed steps of the device's segment
CLOUD_BUDGETS = (4, 5, 6)
PLOTTED, CLOUD_PLOTTED = 6, 5
HORIZONS = (0, 4)
_PACKAGES = ("latentrelay", "torch", "diffusers", "onnx", "onnxruntime", "numpy")
_SHOWN = ("across_tokens", "across_candidates", "preferences", "chosen", "best_fixed", "oracle")
Say = Callable[[str], None]


def run(
    bundles: Sequence[Path], captions: int, seed: int, *, split: int, threads: int | None, output: Path, as_json: bool
) -> None:
    """Profile, write and print. `captions` of the calibrate split, as many runs. Raises RequestError, CutError."""
    if not bundles or captions < 2:
        got = f"{len(bundles)} bundles, {captions} captions"
        raise RequestError("too little to profile", got=got, expected="1 bundle and 2 captions, or more")
    with extra("compress", "profiling predicted steps"), counting("profiling", None) as advance:
        from latentrelay.compress.prediction_plot import plot_error_matrices, plot_probe_fidelity
        from latentrelay.reference import pipeline as reference
        from latentrelay.reference.captions import sample_captions

        opened, pipeline = [Bundle.open(path) for path in bundles], reference.load(Path(resolve(REFERENCE)))
        prompts = [caption.text for _, caption in sample_captions("calibrate", captions, seed)]
        seeds = [seed * 1_000_003 + i for i in range(captions)]
        found, panels, bars = profile(
            opened, pipeline, prompts, seeds, split, threads or 1, output, lambda words: advance(words, 0)
        )
        asked = " ".join(f"--prediction-profile {bundle.manifest.precision}" for bundle in opened)
        document = {
            "command": f"latentrelay evaluate {asked} --captions {captions} --seed {seed} --splits {split}",
            "captions": captions,
            "seed": seed,
            "data_split": "calibrate",
            **found,
        }
        beside = output / f".{FILES[0]}.new"
        beside.write_text(_compact(json.dumps(document, allow_nan=False, indent=1)) + "\n", encoding="utf-8")
        beside.replace(output / FILES[0])
        plot_error_matrices(panels, output / FILES[1])
        plot_probe_fidelity(bars, output / FILES[2])
    emit(document, as_json, lambda console: _show(console, document, output))


def profile(
    bundles: Sequence[Bundle],
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    split: int,
    threads: int,
    output: Path,
    say: Say,
) -> tuple[dict[str, Any], list[MatrixPanel], dict[str, list[Fidelity]]]:
    """(the document, panels of the error matrices, the probes' rows by network) of a run a prompt and seed; `pipeline`
    is the bundles' source, for the cloud's steps. Recorded runs and cut graphs stay in `output`."""
    from latentrelay.compress.error_propagation import fit_jacobian
    from latentrelay.compress.plan import Plan
    from latentrelay.tools.bench_graphs import version
    from latentrelay.tools.profiled_network import (
        FEATURE,
        TARGETS,
        ProfiledNetwork,
        Reusing,
        along_cloud,
        along_runs,
        record_runs,
    )
    from latentrelay.tools.profiled_segment import ProfiledSegment

    plain = bundles[0]
    recipe, guidance = Plan.load(plain.path).recipe, float(plain.manifest.guidance.default)
    if not 0 < split < recipe.num_steps - 1:
        raise RequestError("split is out of range", got=split, expected=f"1 .. {recipe.num_steps - 2}")
    solver, kind = recipe.solver_table, plain.manifest.prediction_type
    names = [str(bundle.manifest.precision) for bundle in bundles]
    networks = [
        ProfiledNetwork.of(each, solver, output / "cut" / name, threads)
        for each, name in zip(bundles, names, strict=True)
    ]

    def recording(done: int, asked: int) -> None:
        say(f"recording runs: {done} of {asked}")

    runs = record_runs(plain, networks[0], pipeline, prompts, seeds, split, output / "runs", recording)
    say("measuring how the network answers a displacement")
    jacobian = fit_jacobian(runs, networks[0], Reusing(networks[0]), solver)
    rows: list[dict[str, Any]] = []
    panels: list[MatrixPanel] = []
    bars: dict[str, list[Fidelity]] = {}
    for name, network in zip(names, networks, strict=True):
        say(f"{name}: along {len(prompts)} runs")
        streams = along_runs(network, runs, solver, kind)
        segment = ProfiledSegment.of(name, "edge", streams, guidance, solver, jacobian, (split, recipe.num_steps))
        say(f"{name}: the probes")
        rated = {horizon: segment.fidelity(streams, network.probes, PLOTTED, horizon) for horizon in HORIZONS}
        bars[name] = rated[HORIZONS[0]][FEATURE]
        rows.append(segment.document(BUDGETS, rated))
        panels += [segment.panel(target, PLOTTED) for target in (TARGETS if network is networks[0] else (FEATURE,))]
    say("the cloud's segment")
    streams = along_cloud(plain, pipeline, solver, prompts, seeds, split)
    segment = ProfiledSegment.of("teacher", "cloud", streams, guidance, solver, jacobian, (0, split))
    rows.append(segment.document(CLOUD_BUDGETS, {}))
    panels.append(segment.panel(FEATURE, CLOUD_PLOTTED))
    document = {
        "split": split,
        "num_steps": recipe.num_steps,
        "sampler": recipe.sampler,
        "prediction_type": kind,
        "guidance": guidance,
        "networks": rows,
        "jacobian": [float(f"{each:.4g}") for each in jacobian],
        "machine": asdict(read_machine()),
        "versions": {name: version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    return document, panels, bars


def _show(console: Any, document: Mapping[str, Any], output: Path) -> None:
    for network in document["networks"]:
        lines = [
            [row["target"], row["kind"], " ".join(map(str, row["steps"])), f"{row['cost']:.4f}"]
            for row in network["schedules"]
        ]
        title = f"{network['name']}, {network['segment']} segment"
        console.print(table(["target", "schedule", "computed steps", "propagated error"], lines, title))
        lines = [
            [row["target"], row["probe"], row["metric"], *(f"{row[name]['mean']:.4f}" for name in _SHOWN)]
            for row in network["fidelity"]
            if row["horizon"] == HORIZONS[0]
        ]
        if lines:
            console.print(table(["target", "probe", "metric", *(name.replace("_", " ") for name in _SHOWN)], lines))
    console.print(f"written: [bold]{printable(output)}[/]: {', '.join(FILES)}")


def _compact(text: str) -> str:
    """JSON whose lists of numbers stand on one line each."""
    return re.sub(r"\[\s+([-0-9.e+,\snul]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
