"""What a handoff costs beside compute on loopback, and how many bytes it is. docs/measured/service_overhead.json.

Two ways to see the cost, both one client on a kept-alive connection: requests for no step at all, which go the whole
way without the network; and the same requests through HTTP and straight through the engine, in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.tools.bench_service import capabilities, overhead_ms, server
from latentrelay.tools.service_load import Requests, run_load

pytestmark = pytest.mark.slow

MOST_MS = 5.0
MOST_BYTES, MOST_BYTES_WITH_MEMORY = 33_792, 67_584
PAIRS = 30
SMALL = {"num_steps": 25, "guidance": 4.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose steps take milliseconds: 2 pixels a latent row, so 128 pixels are a 4x64x64 latent."""
    folder: Path = tiny.save_pipeline(
        tiny.make_pipeline(tmp_path_factory.mktemp("work")), tmp_path_factory.mktemp("served") / "model"
    )
    return folder


@pytest.fixture(scope="module")
def overhead(model: Path, measured: Callable[[str, dict[str, Any]], Path]) -> Iterator[dict[str, Any]]:
    large = {**SMALL, "height": 128, "width": 128}
    figures: dict[str, Any] = {}
    for name, served, asked in (("tiny", str(model), SMALL), ("reference", "reference", large)):
        with server("ours", ["--model", served, "--threads", "1"], 1) as service:
            run_load(service.url, Requests("warm", **asked, split=2), 2, each=2)
            figures[name] = overhead_ms(service, asked, 100)
            if name == "tiny":
                figures["bytes"] = {
                    "latents": _blob_bytes(service.url, large, 25),
                    "latents_and_memory": _blob_bytes(service.url, large, 2),
                }
                figures["beside_engine_ms"] = _beside_engine(service.url, model, asked)
                figures["capabilities_wire_versions"] = capabilities(service.url)["wire_versions"]
    measured("service_overhead", figures)
    return figures


def _blob_bytes(url: str, asked: dict[str, Any], split: int) -> int:
    """Bytes of a real answer that a client which reads everything gets: with memory, but for a run that is done."""
    from latentrelay.tools.bench_service import posted

    request = HandoffRequest("a red circle", split=split, seed=2**31 - 1, wire_versions=("1.1", "1.0"), **asked)
    data = posted(url, request.to_dict())
    handoff = Handoff.from_bytes(data)
    assert handoff.latents.shape == (1, 4, 64, 64)
    assert (handoff.x0_prev is not None) == (split < 25)
    return len(data)


def _beside_engine(url: str, model: Path, asked: dict[str, Any]) -> dict[str, float]:
    """Median over pairs of a request through HTTP less the same steps by an engine of our own, of 4 steps."""
    engine = Engine.load(str(model))
    requests, differences = Requests("pairs", **asked, split=4), []
    for number in range(PAIRS):
        load = run_load(url, requests, 1, each=1)
        own = RunRequest(prompt=f"a star {number}", negative_prompt="", seed=number, split=4, dtype="float16", **asked)
        started = time.perf_counter()
        engine.run(own).to_bytes()
        differences.append(load.answers[0].latency_ms - 1e3 * (time.perf_counter() - started))
    return {"median": round(statistics.median(differences), 3), "pairs": PAIRS}


def test_a_handoff_costs_at_most_five_milliseconds_beside_compute(overhead: dict[str, Any]) -> None:
    assert overhead["tiny"]["overhead_p50_ms"] <= MOST_MS, overhead
    assert overhead["reference"]["overhead_p50_ms"] <= MOST_MS, overhead


def test_the_blob_of_a_512_pixel_picture_is_small(overhead: dict[str, Any]) -> None:
    assert overhead["bytes"]["latents"] <= MOST_BYTES
    assert overhead["bytes"]["latents_and_memory"] <= MOST_BYTES_WITH_MEMORY
