"""The batcher on the reference model: how much sharing a call changes, and how much it saves. Figures:
docs/measured/batcher.json.

Bound, relative to the largest latent: 1e-5 between a run alone and one that shared its calls, and between runs that
shared calls with fewer and with more others; 0 for a deterministic run.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.cloud.batcher import Batcher
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest

NOISE = 1e-5
SPLIT, STEPS, ROUNDS = 8, 25, 3
pytestmark = pytest.mark.slow


def asked(seed: int, **changes: Any) -> RunRequest:
    from latentrelay.reference.pipeline import GUIDANCE

    fields: dict[str, Any] = {"prompt": f"a red circle left of {seed} blue squares", "seed": seed}
    fields |= {"guidance": GUIDANCE, "height": 128, "width": 128, "num_steps": STEPS, "split": SPLIT}
    return RunRequest(**{**fields, "dtype": "float32", **changes})


def together(engine: Engine, requests: list[RunRequest], **options: Any) -> tuple[list[Any], float]:
    """The handoffs of requests that come at once, and seconds until the last."""
    batcher = Batcher(engine, cache=False, **options)
    batcher.start()
    batcher.load()  # the memory forecast of this size, once in a server's life
    try:
        started = time.perf_counter()
        tickets = [batcher.submit(each) for each in requests]
        handoffs = [ticket.future.result(600) for ticket in tickets]
        return handoffs, time.perf_counter() - started
    finally:
        batcher.close()


def difference(one: Any, other: Any) -> float:
    return float(np.abs(one.latents - other.latents).max() / np.abs(other.latents).max())


@pytest.fixture(scope="module")
def engine() -> Engine:
    from latentrelay.reference import pipeline as reference

    try:
        return Engine.load(str(reference.reference_path()))
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_sharing_changes_rounding_only_and_saves_time(engine: Engine, measured: Any) -> None:
    requests = [asked(seed) for seed in range(16)]
    alone = [engine.run(each) for each in requests]
    shared = {count: together(engine, requests[:count])[0] for count in (2, 4, 8, 16)}
    noise = {
        str(count): max(difference(one, other) for one, other in zip(each, alone, strict=False))
        for count, each in shared.items()
    }
    between = max(
        difference(one, other) for each in shared.values() for one, other in zip(each, shared[16], strict=False)
    )
    exact = [each.model_copy(update={"deterministic": True}) for each in requests[:3]]
    mixed, _ = together(engine, [*exact, *requests[3:]])
    for handoff, request in zip(mixed, exact, strict=False):
        assert handoff.to_bytes() == engine.run(request).to_bytes()
    rates = {str(clients): _rates(engine, clients) for clients in (8, 32)}
    measured(
        "batcher",
        {
            "model": "reference",
            "threads": torch.get_num_threads(),
            "split": SPLIT,
            "num_steps": STEPS,
            "noise_alone_to_shared": noise,
            "noise_between_batches": between,
            "requests_at_once": rates,
        },
    )
    assert max(noise.values()) < NOISE
    assert between < NOISE


def _rates(engine: Engine, clients: int) -> dict[str, float]:
    """Requests a second one after another and together, in turns, with the median ratio of the rounds."""
    one_by_one, batched = [], []
    for turn in range(ROUNDS):
        requests = [asked(1000 * turn + seed) for seed in range(clients)]
        started = time.perf_counter()
        for each in requests:
            engine.run(each)
        one_by_one.append(clients / (time.perf_counter() - started))
        batched.append(clients / together(engine, requests)[1])
    ratios = [many / one for one, many in zip(one_by_one, batched, strict=True)]
    return {
        "one_by_one_per_s": statistics.median(one_by_one),
        "batched_per_s": statistics.median(batched),
        "ratio": statistics.median(ratios),
    }
