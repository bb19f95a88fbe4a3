"""`latentrelay bench`: one guided step of one network in every library, interleaved in one run, with sizes and memory.

Graphs are made first, each in a process of its own. Then every row loads in its own process, is warmed, and waits; the
rounds go from row to row. A row that cannot run says why. What is measured is kept nowhere but in the answer (and in
`--output`); `--work` keeps the graphs, not the figures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import util
from pathlib import Path
from typing import Any

from latentrelay.export.stages import StageStore, stage_digest
from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import LatentRelayError, RequestError
from latentrelay.runtime.selftest import snr_db
from latentrelay.tools import bench_graphs, bench_source
from latentrelay.tools.bench_clock import QUIET, Timed, interleave, times_faster
from latentrelay.tools.bench_graphs import version
from latentrelay.tools.bench_rows import BASELINE, BUNDLE_ROWS, NNCF_ROW, ROWS, Row, own_kernels, why_not
from latentrelay.tools.bench_source import Network
from latentrelay.tools.bench_worker import WARM_UPS, Loaded, Worker, in_child
from latentrelay.tools.console import counting, emit, extra, printable, table
from latentrelay.tools.machine import read_machine
from rich.console import Console

MIN_ROUNDS = 5
_SPARE_MIB = 512  # what stays free beside a row's weights, held twice while they are loaded
PACKAGES = (
    "latentrelay", "torch", "diffusers", "transformers", "onnx", "onnxruntime", "optimum", "optimum-onnx", "openvino",
    "nncf", "numpy",
)  # fmt: skip


def run(
    *,
    geometry: str | None,
    model: str | None,
    student: Path | None,
    bundle: Path | None,
    rows: Sequence[str],
    threads: int | None,
    rounds: int,
    work: Path | None,
    output: Path | None,
    as_json: bool,
) -> int:
    """Measure and print; exit status 1 where one of our own rows failed."""
    sources = [each for each in (geometry, model, bundle) if each is not None]
    if len(sources) > 1 or (student is not None and model is None):
        raise RequestError("give one of --geometry, --model and --bundle", expected="one; --student goes with --model")
    if rounds < MIN_ROUNDS:
        raise RequestError("too few rounds for a median", got=rounds, expected=f"{MIN_ROUNDS} or more")
    chosen = choose(BUNDLE_ROWS if bundle is not None else ROWS, rows)
    machine = read_machine()
    threads = threads or machine.cores
    with counting("preparing", None) as advance, work_folder(work) as folder:

        def say(words: str) -> None:
            advance(words, 0)

        if bundle is not None:
            network = Network(bundle.absolute(), bundle.absolute().name, 0, 0, 0, 0, (1.0, 0.0), False)
            folders: dict[str, Path | str] = {each.graph: bundle.absolute() for each in chosen}
            kernels = elsewhere = None
        else:
            prepared = Prepared(StageStore(folder, say), threads)
            network = prepared.network(geometry or "hybrid-sd-224m", model, student)
            folders = {each.graph: prepared.graph(each) for each in chosen if why_not(each) is None}
            kernels, elsewhere = prepared.kernels("onnxruntime"), prepared.kernels("openvino")
        answers = _measure(chosen, network, folders, threads, rounds, say)
    facts = ("name", "parameters", "rows", "columns", "tokens") if bundle is None else ("name",)
    document: dict[str, Any] = {
        "network": {name: getattr(network, name) for name in facts},
        "step": "one guided step: batch 2, the same inputs for every row",
        "threads": threads,
        "rounds": rounds,
        "warm_ups": WARM_UPS,
        "rows": answers,
        "integer_kernels": None if kernels is None else kernels["integer_kernels"],
        "float_list": None if kernels is None else kernels["float_list"],
        "integer_kernels_openvino": None if elsewhere is None else elsewhere["integer_kernels"],
        "machine": asdict(machine),
        "versions": {name: version(name) for name in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if output is not None:
        output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    emit(document, as_json, lambda console: _show(console, document))
    failed = any(each["failed"] and each["name"].startswith(("latentrelay", "bundle")) for each in answers)
    return 1 if failed else 0


def choose(known: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows asked for, in the table's order; without names all but those that want asking. Raises RequestError."""
    there = [row.name for row in known]
    for name in names:
        if name not in there:
            raise RequestError("no such row", got=name, expected=" | ".join(there))
    return [row for row in known if (row.name in names if names else not row.asked_only)]


class Prepared:
    """The stages that write networks and graphs, each run at most once; a failure is kept as words."""

    def __init__(self, store: StageStore, threads: int) -> None:
        self._store, self._threads = store, threads
        self._network: Network | None = None
        self._made: dict[str, Path | str] = {}

    def network(self, geometry: str, model: str | None, student: Path | None) -> Network:
        """The network on disk. Raises what reading a model raises."""
        key = {"model": model, "student": str(student) if student else None, "geometry": None if model else geometry}
        kept = str(student) if student is not None else None

        def write(folder: Path) -> None:
            if model is None:
                in_child(bench_source.write_geometry, folder, geometry, threads=self._threads)
            else:
                in_child(bench_source.write_model, folder, model, kept, threads=self._threads)

        inputs = {**key, "steps": bench_source.NUM_STEPS, "seed": bench_source.SEED, **_versions("torch", "diffusers")}
        inputs["code"] = sha256_file(Path(bench_source.__file__))
        self._network = Network.read(self._store.made("network", "making the network", inputs, write))
        return self._network

    def graph(self, row: Row) -> Path | str:
        """The folder of what a row runs, or why there is none."""
        return self._stage(row.graph)

    def kernels(self, library: str) -> Mapping[str, Any] | None:
        """Which kernels our quantised step graph gets in a library, and its float list; None where it was not made."""
        made = self._made.get(f"ours-w8a8-{library}")
        if not isinstance(made, Path) or not (made / bench_graphs.KERNELS).is_file():
            return None
        counted: Mapping[str, Any] = json.loads((made / bench_graphs.KERNELS).read_text(encoding="utf-8"))
        return counted

    def _stage(self, name: str) -> Path | str:
        if name not in self._made:
            try:
                self._made[name] = self._write(name)
            except LatentRelayError as error:
                self._made[name] = str(error)
            except Exception as error:  # a rival's exporter has no root of its own; the row says what it was
                self._made[name] = f"{type(error).__name__}: {error}"[:300]
        return self._made[name]

    def _write(self, name: str) -> Path | str:
        if self._network is None:
            raise RequestError("the network has not been made")
        network = self._network
        if name == "network":
            return network.folder
        function, needs, kernels = _STAGES[name]
        sources = [self._stage(each) for each in needs]
        missing = next((each for each in sources if isinstance(each, str)), None)
        if missing is not None:
            return missing
        folders = [Path(each) for each in sources]
        inputs = {
            "network": stage_digest(network.folder),
            "from": [stage_digest(each) for each in folders],
            **(_versions("onnx", "optimum-onnx", "nncf", "openvino") if name in ("optimum", "nncf") else own_code()),
        }

        def write(folder: Path) -> None:
            in_child(function, network, folder, *folders, *kernels, threads=self._threads)

        return self._store.made(name, f"writing {name}", inputs, write)


# stage -> the function that writes it, the stages whose folders it takes, and the kernel set where it has one
_STAGES: Mapping[str, tuple[Callable[..., None], tuple[str, ...], tuple[str, ...]]] = {
    "ours-fp32-onnxruntime": (bench_graphs.write_ours, (), (own_kernels(),)),
    "ours-fp32-openvino": (bench_graphs.write_ours, (), ("openvino",)),
    "ours-w8a8-onnxruntime": (bench_graphs.write_quantised, ("ours-fp32-onnxruntime",), (own_kernels(),)),
    "ours-w8a8-openvino": (bench_graphs.write_quantised, ("ours-fp32-openvino",), ("openvino",)),
    "optimum": (bench_graphs.write_optimum, (), ()),
    "nncf": (bench_graphs.write_nncf, ("optimum",), ()),
}


def _versions(*packages: str) -> dict[str, str | None]:
    return {name: version(name) for name in packages}


def own_code() -> dict[str, Any]:
    """What our graphs depend on beside the network: the code that writes them."""
    digest = hashlib.sha256()
    for package in ("latentrelay.compress", "latentrelay.export"):
        spec = util.find_spec(package)
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return {"code": digest.hexdigest(), "kernels": own_kernels(), **_versions("torch", "onnx", "onnxscript")}


@contextlib.contextmanager
def work_folder(work: Path | None) -> Iterator[Path]:
    """The folder that keeps graphs, or one that goes with the command."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="latentrelay-bench-") as folder:
        yield Path(folder)


def _measure(
    rows: Sequence[Row],
    network: Network,
    folders: Mapping[str, Path | str],
    threads: int,
    rounds: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    with extra("bench", "The benchmark"):
        from latentrelay.export.bundle_manifest import MEMORY_OPTIONS  # brings torch, which the children need not have

    loaded: dict[str, Loaded] = {}
    reasons: dict[str, tuple[str, bool]] = {}  # why not, and whether that is a failure
    with contextlib.ExitStack() as stack:
        workers = []
        for row in rows:
            reason = why_not(row)
            folder = folders.get(row.graph, "")
            if reason is not None or isinstance(folder, str):
                reasons[row.name] = (reason or str(folder), reason is None)
                continue
            short = _short_of_memory(network)
            if short is not None:
                reasons[row.name] = (short, True)
                continue
            say(f"loading {row.name}")
            if row.ours and row.library == "onnxruntime":
                row = replace(row, settings=MEMORY_OPTIONS)  # as a bundle has them
            worker = stack.enter_context(Worker(row, network, folder, threads))
            answer = worker.loaded()
            if isinstance(answer, str):
                reasons[row.name] = (answer, True)
                continue
            loaded[row.name] = answer
            workers.append(worker)
        timed, gone = interleave(workers, rounds, lambda turn, name: say(f"round {turn + 1} of {rounds}: {name}"))
    reasons |= {name: (words, True) for name, words in gone.items()}
    reference = _reference(network, loaded)
    return [_record(row, loaded.get(row.name), timed, reasons.get(row.name), reference, threads) for row in rows]


def _short_of_memory(network: Network, meminfo: Path = Path("/proc/meminfo")) -> str | None:
    """Why another row should not be loaded beside those that are: better to say so than to be ended by the system."""
    if not meminfo.is_file():
        return None
    free = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    need = _SPARE_MIB + 2 * network.parameters * 4 // 2**20
    return None if free // 1024 >= need else f"not enough free memory: {free // 1024} MiB, expected {need} or more"


def _reference(network: Network, loaded: Mapping[str, Loaded]) -> Any:
    """torch's guided prediction, float64; for a bundle, the first row's."""
    if (network.folder / bench_source.INPUTS).is_file():
        pred = network.inputs()["noise_pred"].astype("float64")
        return pred[0:1] + bench_source.GUIDANCE * (pred[1:2] - pred[0:1])
    return next((each.guided for each in loaded.values()), None)


def _record(
    row: Row,
    loaded: Loaded | None,
    timed: Mapping[str, Timed],
    reason: tuple[str, bool] | None,
    reference: Any,
    threads: int,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "name": row.name,
        "median_ms": None,
        "spread_ms": None,
        "bytes": loaded.bytes if loaded else None,
        "peak_memory_mib": loaded.peak_memory_mib if loaded else None,
        "failed": reason is not None and reason[1],
        "reason": reason[0] if reason else None,
    }
    mine = timed.get(row.name)
    if mine is None or loaded is None:
        return record
    agreement = snr_db(reference, loaded.guided)
    record |= {
        "median_ms": round(mine.median_ms, 3),
        "spread_ms": round(mine.spread_ms, 3),
        "rounds_ms": [round(each, 3) for each in mine.rounds_ms],
        "cpu_share": round(mine.cpu_share, 3),
        "quiet": mine.cpu_share >= QUIET,
        "threads": threads,
        "load_s": round(loaded.load_s, 3),
        "ran": loaded.ran,
        "snr_db": round(agreement, 1) if abs(agreement) < 1e6 else None,
        "times_faster_than": {
            name: round(factor, 4)
            for name in (BASELINE, NNCF_ROW)
            if name != row.name and (factor := times_faster(timed, row.name, name)) is not None
        },
    }
    return record


def _show(console: Console, document: Mapping[str, Any]) -> None:
    lines, notes = [], []
    for row in document["rows"]:
        if row["median_ms"] is None:
            notes.append(f"{row['name']}: {'failed, ' if row['failed'] else ''}{row['reason']}")
            continue
        if not row["quiet"]:
            notes.append(f"{row['name']}: had {row['cpu_share']:.0%} of its threads; something else ran")
        faster = row["times_faster_than"].get(BASELINE)
        lines.append(
            [
                row["name"],
                f"{row['median_ms']:.1f}",
                f"{row['spread_ms']:.1f}",
                f"{row['bytes'] / 1e6:.1f}",
                row["peak_memory_mib"],
                "-" if faster is None else f"{faster:.2f}x",
                "equal" if row["snr_db"] is None else f"{row['snr_db']:.1f}",
            ]
        )
    columns = ["row", "ms", "spread", "MB", "peak MiB", "x Optimum", "dB"]
    title = (
        f"{document['network']['name']}: {document['step']}, {document['threads']} threads, {document['rounds']} rounds"
    )
    console.print(table(columns, lines, title))
    for note in notes:
        console.print(printable(note))
    if document["integer_kernels"] is not None:
        console.print(f"integer kernels: {document['integer_kernels']}; float list: {document['float_list']}")
