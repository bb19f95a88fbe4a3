"""The cloud's step cache: files, skipped calls, what stands in for them, and that only those who allow it get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.segment_cache import SegmentCache, read_segment_cache
from latentrelay.runtime.errors import RequestError

EVERY_OTHER = SegmentCache("1.0", "dpmsolver++", 6, (0, 1, 3), order=1)


@pytest.fixture
def cached(tiny: Any, tmp_path: Path) -> tuple[Engine, list[int]]:
    """An engine with EVERY_OTHER, and the timesteps its network was called with."""
    pipeline = tiny.make_pipeline(tmp_path)
    called: list[int] = []

    def note(module: Any, given: Any) -> None:
        if type(given[0]).__name__ != "FakeTensor":
            called.append(len(given[0]))

    pipeline.unet.register_forward_pre_hook(note)
    return Engine(pipeline, name="cached", step_cache=EVERY_OTHER), called


def by_hand(engine: Engine, request: Any) -> np.ndarray[Any, Any]:
    """The same run with the straight line written out."""
    state = engine.begin(request.model_copy(update={"step_cache": False}))
    state.embeds = torch.cat([engine.encode([text]) for text in engine.texts(request)])
    said: dict[int, torch.Tensor] = {}
    with torch.inference_mode():
        for step in range(request.split):
            if step in (0, 1, 3):
                said[step] = engine.predict([state])
            elif step == 2:
                said[step] = said[1] + (said[1] - said[0])
            else:
                said[step] = said[3] + (step - 3) / 2 * (said[3] - said[1])
            state.advance(said[step])
    return state.latents.numpy()


def test_skipped_steps_take_no_call_and_extend_a_straight_line(cached: Any, wanted: Any) -> None:
    engine, called = cached
    request = wanted(split=6, step_cache=True)
    handoff = engine.run(request)
    assert len(called) == 3
    np.testing.assert_allclose(handoff.latents, by_hand(engine, request), rtol=1e-5, atol=1e-5)
    assert handoff.latents.tobytes() != engine.run(wanted(split=6)).latents.tobytes()


def test_order_zero_uses_the_last_again(tiny: Any, tmp_path: Path, wanted: Any) -> None:
    cache = SegmentCache("1.0", "dpmsolver++", 6, (0, 1, 3))
    first, second = torch.zeros(1), torch.ones(1)
    assert cache.predicted(2, [(0, first), (1, second)]) is second
    assert EVERY_OTHER.predicted(2, [(0, first), (1, second)]).item() == 2.0
    assert EVERY_OTHER.predicted(1, [(0, first)]) is first


def test_only_those_who_allow_it_and_fit_it_get_it(cached: Any, wanted: Any) -> None:
    engine, called = cached
    for change, calls in (
        ({}, 4),
        ({"step_cache": True}, 3),
        ({"step_cache": True, "sampler": "ddim"}, 4),
        ({"step_cache": True, "num_steps": 7}, 4),
    ):
        called.clear()
        engine.run(wanted(split=4, **change))
        assert len(called) == calls


def test_a_schedule_of_another_model_is_not_used(tiny: Any, tmp_path: Path, wanted: Any) -> None:
    foreign = SegmentCache("1.0", "dpmsolver++", 6, (0,), model_digest="sha256:" + "0" * 64)
    engine = Engine(tiny.make_pipeline(tmp_path), name="tiny", step_cache=foreign)
    plain = engine.run(wanted(split=4)).latents.tobytes()
    assert engine.run(wanted(split=4, step_cache=True)).latents.tobytes() == plain


def test_in_a_batch_skipped_steps_cost_the_others_nothing(cached: Any, batching: Any, wanted: Any) -> None:
    engine, called = cached
    batcher = batching(engine, started=False, cache=False)
    requests = [wanted(seed=seed, split=6, step_cache=seed < 2) for seed in range(3)]
    seen: list[int] = []
    tickets = [batcher.submit(each, on_step=lambda report: seen.append(report.step)) for each in requests]
    batcher.start()
    handoffs = [ticket.future.result(60) for ticket in tickets]
    assert called == [6, 6, 6, 2, 2, 2]
    assert sorted(seen) == sorted([1, 2, 3, 4, 5, 6] * 3)
    for request, handoff in zip(requests, handoffs, strict=True):
        alone = engine.run(request)
        assert handoff.meta == alone.meta
        assert abs(handoff.latents - alone.latents).max() < 1e-3 * abs(alone.latents).max()


def test_a_schedule_beside_the_model_is_taken(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "folder")
    assert Engine.load(str(folder)).step_cache is None
    schedule = {"schema_version": "1.0", "sampler": "dpmsolver++", "num_steps": 6, "computed": [0, 2]}
    (folder / "step_cache.json").write_text(json.dumps(schedule))
    cache = Engine.load(str(folder)).step_cache
    assert cache is not None
    assert cache.computed == (0, 2)
    assert Engine.load(str(folder), step_cache=EVERY_OTHER).step_cache == EVERY_OTHER


def test_a_schedule_is_read_strictly(tmp_path: Path) -> None:
    good = {"schema_version": "1.0", "sampler": "dpmsolver++", "num_steps": 6, "computed": [0, 2], "order": 1}
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(good | {"evidence": {"snr_db": 30.0}}))
    assert read_segment_cache(path).computed == (0, 2)
    for change, what in (
        ({"computed": [1, 2]}, "computed"),
        ({"computed": []}, "computed"),
        ({"computed": [0, 2, 2]}, "computed"),
        ({"computed": [0, 6]}, "computed"),
        ({"order": 2}, "order"),
        ({"schema_version": "2.0"}, "schema_version"),
        ({"other": 1}, "unknown key other"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(RequestError, match=what):
            read_segment_cache(path)
    with pytest.raises(RequestError, match=r"missing\.json"):
        read_segment_cache(tmp_path / "missing.json")
