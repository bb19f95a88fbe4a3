"""Milliseconds through ONNX Runtime on this machine: the parts of SD 1.5's U-Net, and the graphs of a bundle.

Out: `Timing`, the median of several runs after two warm-ups, with the fastest, the slowest and how much of its threads
the process really had: far below 1 something else ran, and the times are longer for it. One session is held at a time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.session import Session
from latentrelay.tools.unet_parts import Part, part_graph, part_inputs

CPU = "CPUExecutionProvider"
REMOTE = ("AzureExecutionProvider",)  # runs graphs on somebody else's machine
WARM_UPS, MIN_RUNS = 2, 5
QUIET = 0.8  # of the threads' time; a quiet machine gives 0.95 and more
_ERRORS_ONLY = 3
_OTHERS = "Name providers that can, for example --provider CPUExecutionProvider."


@dataclass(frozen=True)
class Timing:
    """One graph's ms: median, fastest and slowest of `runs`; `cpu_share` is CPU time / (wall time x threads)."""

    name: str
    ms: float
    fastest_ms: float
    slowest_ms: float
    runs: int
    cpu_share: float


@dataclass(frozen=True)
class PartTimings:
    """The parts of the U-Net in one precision, a timing each, and the providers that ran them."""

    precision: str
    parts: tuple[Part, ...]
    timings: tuple[Timing, ...]
    providers: tuple[str, ...]

    @property
    def cpu_share(self) -> float:
        """Of all parts together, weighted by time."""
        return sum(each.cpu_share * each.ms for each in self.timings) / self.parts_ms()

    @property
    def busy(self) -> bool:
        """Whether other work had the processor too. With a GPU the processor waits, so there it cannot be told."""
        return self.providers == (CPU,) and self.cpu_share < QUIET

    def whole_ms(self, which: str = "ms") -> float:
        """The whole U-Net, one call for one branch: every part's time by how often the U-Net has it (an estimate)."""
        return sum(float(getattr(each, which)) * part.weight for part, each in self._pairs())

    def planned_ms(self) -> float:
        """The same from processor time where other work ran, because wall time is then that work's too."""
        if not self.busy:
            return self.whole_ms()
        return sum(each.ms * each.cpu_share * part.weight for part, each in self._pairs())

    def _pairs(self) -> Iterator[tuple[Part, Timing]]:
        return zip(self.parts, self.timings, strict=True)

    def parts_ms(self, which: str = "ms") -> float:
        """What was really run: every part once."""
        return sum(float(getattr(each, which)) for each in self.timings)


def available_providers() -> tuple[str, ...]:
    """ONNX Runtime's execution providers on this machine in its own order of preference, without remote ones."""
    import onnxruntime

    return tuple(name for name in onnxruntime.get_available_providers() if name not in REMOTE)


def chosen_providers(asked: Sequence[str]) -> tuple[str, ...]:
    """The providers asked for, or all that there are; the CPU stands last. Raises RequestError."""
    available = available_providers()
    for name in asked:
        if name not in available:
            raise RequestError("an execution provider is not available here", got=name, expected=" | ".join(available))
    chosen = list(asked or available)
    return tuple([name for name in chosen if name != CPU] + [CPU])


def time_parts(
    parts: tuple[Part, ...],
    *,
    int8: bool,
    providers: Sequence[str],
    threads: int,
    runs: int,
    progress: Callable[[str], None],
) -> PartTimings:
    """Time every part; needs about 1.4 GiB for the largest of PARTS. Raises SessionError."""
    timings: list[Timing] = []
    used: list[tuple[str, ...]] = []
    precision = "w8a8" if int8 else "fp32"
    for part in parts:
        progress(f"timing {part.name}, {precision}")
        timing, set_up = _time_part(part, int8=int8, providers=providers, threads=threads, runs=runs)
        timings.append(timing)
        used.append(set_up)
    return PartTimings(precision, parts, tuple(timings), max(used, key=len))


def _time_part(
    part: Part, *, int8: bool, providers: Sequence[str], threads: int, runs: int
) -> tuple[Timing, tuple[str, ...]]:
    session = _session(part, int8=int8, providers=providers, threads=threads)
    inputs = part_inputs(part)
    timing = time_runs(part.name, lambda: _run(part, session, inputs), runs, threads)
    return timing, tuple(session.get_providers())


def time_runs(name: str, run: Callable[[], object], runs: int, threads: int) -> Timing:
    """Call `run` a few times unmeasured and `runs` times measured."""
    for _ in range(WARM_UPS):
        run()
    wall_ms, cpu_started, started = [], time.process_time(), time.perf_counter()
    for _ in range(runs):
        before = time.perf_counter()
        run()
        wall_ms.append((time.perf_counter() - before) * 1e3)
    share = (time.process_time() - cpu_started) / ((time.perf_counter() - started) * threads)
    return Timing(name, statistics.median(wall_ms), min(wall_ms), max(wall_ms), runs, min(1.0, share))


def time_bundle(folder: Path, *, providers: Sequence[str], threads: int, runs: int) -> tuple[Bundle, list[Timing]]:
    """Time a bundle's text encoder, guided step and decoder. Raises BundleError, SessionError."""
    bundle = Bundle.open(folder)
    with Session(bundle, providers=providers, threads=threads) as session:
        embeddings = session.encode("a red circle on sand", "")
        latents, guidance = session.initial_latents(0), bundle.manifest.guidance.default

        def step() -> Any:
            return next(iter(session.run_steps(latents, None, 0, embeddings, guidance)))

        text = time_runs("text_encoder", lambda: session.encode("a red circle on sand", ""), runs, threads)
        session.release("text_encoder")
        unet = time_runs("unet", step, runs, threads)
        session.release("step_full")
        decoder = time_runs("vae_decoder", lambda: session.decode(latents), runs, threads)
    return bundle, [unet, decoder, text]


def _session(part: Part, *, int8: bool, providers: Sequence[str], threads: int) -> Any:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, _ERRORS_ONLY
    with tempfile.TemporaryDirectory(prefix="latentrelay-measure-") as folder:
        path = Path(folder) / "part.onnx"
        path.write_bytes(part_graph(part, int8=int8))
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # the binding's own classes share no narrower root
            raise SessionError(
                f"ONNX Runtime cannot load {part.name} with {', '.join(providers)}: {error}",
                do=_OTHERS,
            ) from error


def _run(part: Part, session: Any, inputs: dict[str, Any]) -> None:
    try:
        (output,) = session.run(None, inputs)
    except Exception as error:  # as above; out of memory comes here too
        raise SessionError(f"ONNX Runtime failed in {part.name}: {error}", do=_OTHERS) from error
    if not np.isfinite(output).all():
        raise SessionError(f"{part.name} gave values that are not finite", do=_OTHERS)
