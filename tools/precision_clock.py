"""Milliseconds of a step and peak memory of a picture, a bundle each: steps interleaved in one process, pictures in
processes of their own. In: bundles by name. Out: `median_ms`, `spread_ms`, `cpu_share`, `peak_memory_mib` by name."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from latentrelay.runtime import Bundle, Session, generate
from latentrelay.tools.bench_worker import peak_mib
from safetensors.numpy import load_file

ROUNDS, WARM_UPS, STEPS = 15, 2, 3


def step_times(bundles: Mapping[str, Bundle], threads: int) -> dict[str, dict[str, Any]]:
    """Each round runs every bundle's step graph STEPS times, in an order that moves on; medians over rounds."""
    laps: dict[str, list[float]] = {name: [] for name in bundles}
    shares: dict[str, list[float]] = {name: [] for name in bundles}
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(Session(bundle, threads=threads)) for name, bundle in bundles.items()}
        feeds = {name: _sample(bundle) for name, bundle in bundles.items()}
        names = list(bundles)
        for turn in range(-WARM_UPS, ROUNDS):
            for i in range(len(names)):
                name = names[(i + turn) % len(names)]
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(STEPS):
                    sessions[name].run_component("step_full", feeds[name])
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if turn >= 0:
                    laps[name].append(wall * 1e3 / STEPS)
                    shares[name].append(min(1.0, cpu / (wall * threads)))
    return {
        name: {
            "median_ms": round(statistics.median(each), 3),
            "spread_ms": round(max(each) - min(each), 3),
            "cpu_share": round(statistics.median(shares[name]), 3),
        }
        for name, each in laps.items()
    }


def peak_memory_mib(bundle: Path, threads: int) -> int | None:
    """The largest resident set of a fresh process that makes one picture; None where the system does not say."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_picture_peak, (bundle, threads)) or None


def _picture_peak(bundle: Path, threads: int) -> int:
    with Session(Bundle.open(bundle), threads=threads) as session:
        generate(session, "a picture", seed=0)
    return peak_mib()


def _sample(bundle: Bundle) -> dict[str, Any]:
    if bundle.manifest.selftest is None:
        raise ValueError("the bundle has no sample inputs")
    tensors = load_file(bundle.file(bundle.manifest.selftest.path))
    start = "step_full.in."
    return {name.removeprefix(start): array for name, array in tensors.items() if name.startswith(start)}
