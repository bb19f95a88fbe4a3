"""`latentrelay bench --predicted`: what a predicted step costs against a computed one, in w8a8 graphs of one network.

Computed steps (with ladders and without) and predicted ones, of both targets, with a choice by token and without, take
turns in this process, each in a session of its own set up as a bundle's is. Beside the ratios of times stand those of
FLOPs, counted in torch, and what choosing predictors and updating ladders takes, timed as graphs of their own. Nothing
is kept but the answer (and `--output`); `--work` keeps graphs.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.export.stages import StageStore, stage_digest
from latentrelay.runtime.backend import Graph, open_backend
from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from latentrelay.tools import predicted_graphs
from latentrelay.tools.bench import MIN_ROUNDS, Prepared, own_code, work_folder
from latentrelay.tools.bench_clock import PAUSE_S, QUIET, Timed
from latentrelay.tools.bench_graphs import version
from latentrelay.tools.bench_rows import CALM, CPU, ROWS, Row
from latentrelay.tools.bench_source import GUIDANCE, NUM_STEPS, Feeds, Network
from latentrelay.tools.bench_worker import WARM_UPS, Lap, in_child
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.machine import read_machine
from latentrelay.tools.predicted_graphs import (
    COMPUTED,
    FULL,
    PREDICTED,
    ROW,
    SELECTION,
    SHARES,
    UPDATES,
    VARIANTS,
    Variant,
)
from numpy.typing import NDArray
from rich.console import Console

HEADLINES = {"deep_feature": "predicted-deep-feature", "whole_output": "predicted-whole-output"}
_LAP_S = 0.1  # a lap repeats a short step until it is about this long
_PACKAGES = ("latentrelay", "torch", "diffusers", "onnx", "onnxruntime", "numpy")
_ORIGINAL: Row = next(row for row in ROWS if row.name == "latentrelay-onnxruntime-w8a8")


@dataclass(frozen=True)
class Opened:
    """One loaded graph, its inputs and the arrays that its ladders are written into."""

    graph: Graph
    feeds: Feeds
    ladders: Feeds

    def run(self) -> None:
        """One step."""
        self.graph.run(self.feeds, self.ladders)


def run(
    *,
    geometry: str | None,
    model: str | None = None,
    student: Path | None = None,
    threads: int | None,
    rounds: int,
    work: Path | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure and print; 0. One thread unless `threads` says otherwise. Raises RequestError and what exporting does."""
    if (geometry is not None and model is not None) or (student is not None and model is None):
        raise RequestError("give one of --geometry and --model", expected="one; --student goes with --model")
    if rounds < MIN_ROUNDS:
        raise RequestError("too few rounds for a median", got=rounds, expected=f"{MIN_ROUNDS} or more")
    threads = threads or 1
    with counting("preparing", None) as advance, work_folder(work) as folder:

        def say(words: str) -> None:
            advance(words, 0)

        store = StageStore(folder, say)
        prepared = Prepared(store, threads)
        network = prepared.network(geometry or "hybrid-sd-224m", model, student)
        unet = prepared.graph(_ORIGINAL)
        if isinstance(unet, str):
            raise RequestError(f"the w8a8 graph was not made: {unet}", do="Install the extra that it names.")
        inputs = {"network": stage_digest(network.folder), "unet": stage_digest(unet), **own_code()}
        inputs["writer"] = sha256_file(Path(predicted_graphs.__file__))

        def write(place: Path) -> None:
            in_child(predicted_graphs.write_variants, network, place, unet, threads=threads)
            in_child(predicted_graphs.write_shares, network, place, threads=threads)

        graphs = store.made("predicted", "writing the step graphs of predicted steps", inputs, write)
        timed = measure(network, graphs, threads, rounds, say)
    report = document(network, graphs, timed, threads, rounds)
    if output is not None:
        output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    emit(report, as_json, lambda console: show(console, report))
    return 0


def measure(
    network: Network,
    folder: Path,
    threads: int,
    rounds: int,
    say: Callable[[str], None],
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Timed]:
    """Every variant's rounds, interleaved: each round runs each variant once, in an order that moves on by one."""
    opened: dict[str, Opened] = {}
    repeats: dict[str, int] = {}
    for each in variants:
        say(f"loading {each.name}")
        opened[each.name] = open_variant(network, folder, each, threads)
        for _ in range(WARM_UPS):
            started = time.perf_counter()
            opened[each.name].run()
            took = time.perf_counter() - started
        repeats[each.name] = max(1, math.ceil(_LAP_S / max(took, 1e-6)))
    laps: dict[str, list[Lap]] = {name: [] for name in opened}
    names = list(opened)
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            say(f"round {turn + 1} of {rounds}: {name}")
            time.sleep(PAUSE_S)
            laps[name].append(_lap(opened[name], repeats[name], threads))
    return {name: Timed(tuple(each)) for name, each in laps.items()}


def _lap(opened: Opened, repeats: int, threads: int) -> Lap:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        opened.run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Lap(wall * 1e3 / repeats, min(1.0, cpu / (wall * threads)))


def open_variant(network: Network, folder: Path, variant: Variant, threads: int) -> Opened:
    """A variant's session, as a bundle sets it up, with a step's inputs: random ladders, the network's own latents."""
    with extra("bench", "The benchmark"):
        from latentrelay.export.bundle_manifest import MEMORY_OPTIONS

    path = folder / variant.file
    component = component_of(path)
    options: dict[str, Any] = {"intra_op_threads": threads, **MEMORY_OPTIONS}
    options |= {f"config.{key}": value for key, value in CALM.items()}
    graph = open_backend(BackendSpec("onnxruntime", (CPU,), options)).load(path, component)
    inputs = network.inputs()
    step = COMPUTED if variant.kind == "full" or variant is UPDATES else PREDICTED
    rng = np.random.default_rng(0)
    known: Feeds = {
        "latents": inputs["latents"],
        "step": np.array(step),
        "at": np.array(ROW * NUM_STEPS + step),
        "split_row": np.array(ROW),
        "prompt_embeds": inputs["encoder_hidden_states"],
        "guidance": np.array(GUIDANCE, np.float32),
        "x0_prev": inputs["latents"][:, ::-1].copy(),
    }

    def value(port: Port) -> NDArray[Any]:
        found = known.get(port.name)
        return rng.standard_normal(_sizes(port), dtype=np.float32).astype(port.dtype) if found is None else found

    feeds = {port.name: value(port) for port in component.inputs}
    ladders = {port.name: np.zeros(_sizes(port), port.dtype) for port in component.outputs if "ladder" in port.name}
    return Opened(graph, feeds, ladders)


def _sizes(port: Port) -> tuple[int, ...]:
    return tuple(int(size) for size in port.shape)


def component_of(path: Path) -> Component:
    """A graph's ports, read off its file; every size is static."""
    import onnx
    from onnx import helper

    graph = onnx.load(str(path), load_external_data=False).graph

    def port(value: Any) -> Port:
        tensor = value.type.tensor_type
        shape = tuple(int(size.dim_value) for size in tensor.shape.dim)
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return Port(value.name, value.name.removeprefix("next_"), dtype, shape)

    sides = [tuple(port(value) for value in values) for values in (graph.input, graph.output)]
    return Component(path.stem, path.name, sides[0], sides[1])


def ratio(timed: Mapping[str, Timed], name: str, against: str = FULL.name) -> float:
    """A variant's time over another's: the median of the ratios within each round."""
    return _median_ratio(timed[name].rounds_ms, timed[against].rounds_ms)


def processor_ratio(timed: Mapping[str, Timed], name: str, against: str = FULL.name) -> float:
    """The same in processor time, which other processes' share of the cores does not enter."""
    sides = ([lap.ms * lap.cpu_share for lap in timed[each].laps] for each in (name, against))
    return _median_ratio(*sides)


def _median_ratio(mine: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(mine, theirs, strict=True))


def document(network: Network, folder: Path, timed: Mapping[str, Timed], threads: int, rounds: int) -> dict[str, Any]:
    """The JSON object."""
    counted = json.loads((folder / SHARES).read_text(encoding="utf-8"))
    shares: Mapping[str, float] = counted["shares"]
    targets = {
        target: {
            "time_ratio": round(ratio(timed, name), 6),
            "processor_ratio": round(processor_ratio(timed, name), 6),
            "flop_share": round(shares[name], 6),
            "row": name,
        }
        for target, name in HEADLINES.items()
    }
    parts = {each.name: ratio(timed, each.name) for each in (SELECTION, UPDATES)}
    facts = ("name", "parameters", "rows", "columns", "tokens")
    return {
        "network": {name: getattr(network, name) for name in facts},
        "step": "one guided step: batch 2, w8a8, ONNX Runtime",
        "threads": threads,
        "rounds": rounds,
        "warm_ups": WARM_UPS,
        "step_flops": counted["step_flops"],
        "targets": targets,
        "selection_over_full": round(sum(parts.values()), 6),
        "selection_parts": {name: round(value, 6) for name, value in parts.items()},
        "rows": [_record(name, each, timed, shares) for name, each in timed.items()],
        "machine": asdict(read_machine()),
        "versions": {name: version(name) for name in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _record(name: str, mine: Timed, timed: Mapping[str, Timed], shares: Mapping[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "median_ms": round(mine.median_ms, 3),
        "spread_ms": round(mine.spread_ms, 3),
        "rounds_ms": [round(each, 3) for each in mine.rounds_ms],
        "time_ratio": round(ratio(timed, name), 6),
        "processor_ratio": round(processor_ratio(timed, name), 6),
        "flop_share": round(shares[name], 6) if name in shares else None,
        "cpu_share": round(mine.cpu_share, 3),
        "quiet": mine.cpu_share >= QUIET,
    }


def show(console: Console, report: Mapping[str, Any]) -> None:
    """The table and figures for people."""
    lines = []
    for row in report["rows"]:
        flops = "" if row["flop_share"] is None else f"{row['flop_share']:.1%}"
        lines.append(
            [
                row["name"],
                f"{row['median_ms']:.2f}",
                f"{row['spread_ms']:.2f}",
                f"{row['time_ratio']:.2%}",
                f"{row['processor_ratio']:.2%}",
                flops,
            ]
        )
    title = f"{report['network']['name']}: {report['step']}, {report['threads']} threads, {report['rounds']} rounds"
    console.print(table(["row", "ms", "spread", "of a computed step", "processor time", "FLOPs"], lines, title))
    for target, found in report["targets"].items():
        console.print(f"{target}: {found['time_ratio']:.2%} of a computed step's time, {found['flop_share']:.2%} FLOPs")
    console.print(f"choosing and updating ladders: {report['selection_over_full']:.2%} of a computed step")
    for row in report["rows"]:
        if not row["quiet"]:
            console.print(printable(f"{row['name']}: had {row['cpu_share']:.0%} of its threads; something else ran"))
