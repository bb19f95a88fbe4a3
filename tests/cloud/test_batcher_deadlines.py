"""Deadlines: what cannot be met is refused, what will be missed is handed over early, and the rest ends on time."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import DeadlinePassedError, DeadlineRefusedError
from latentrelay.cloud.run_state import RunState

SIZE = (8, 8)
FOREVER_S = 1e6


def slow(batcher: Any, seconds: float) -> None:
    """Let the batcher have measured calls of so many seconds, for one request and for many."""
    for requests in (1, 2, 16):
        for _ in range(9):
            batcher.admission.times.record(SIZE, requests, seconds, 16)


def rest_of(engine: Engine, handoff: Any, request: Any) -> np.ndarray[Any, Any]:
    """The latents after all steps, from an early handoff: its solver memory put back as a device would."""
    state: RunState = engine.begin(request.model_copy(update={"split": request.num_steps}))
    state.embeds = torch.cat([engine.encode([text]) for text in engine.texts(request)])
    state.step = handoff.meta.next_step
    state.latents = torch.from_numpy(np.array(handoff.latents))
    state.scheduler.model_outputs = [None, torch.from_numpy(np.array(handoff.x0_prev))]
    state.scheduler.lower_order_nums = min(state.step, 2)
    with torch.inference_mode():
        while not state.done:
            state.advance(engine.predict([state]))
    return state.latents.numpy()


def test_what_leaves_no_time_is_refused_with_when_to_ask_again(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    batcher.submit(wanted(seed=1), deadline_s=0.001)  # nothing was measured yet, so nothing is known
    slow(batcher, 10.0)
    with pytest.raises(DeadlineRefusedError, match="cannot be met: got 20000 ms, expected about 30000 ms") as caught:
        batcher.submit(wanted(seed=2), deadline_s=20)
    assert (caught.value.kind, caught.value.retry_after_s) == ("deadline-unreachable", 10)  # by then it fits
    batcher.submit(wanted(seed=2), deadline_s=31)
    batcher.submit(wanted(seed=3, accept_splits=(1,)), deadline_s=11)  # its smallest split counts
    with pytest.raises(DeadlineRefusedError, match="20000 ms"):
        batcher.submit(wanted(seed=4, deadline_ms=20_000))
    with pytest.raises(DeadlineRefusedError):
        batcher.submit(wanted(seed=5), deadline_s=0)


def test_another_sizes_times_refuse_only_who_names_a_deadline(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    slow(batcher, 10.0)  # of 16x16 pixels; 16 times as many would take 160 s a step, if it were in proportion
    large: dict[str, Any] = {"height": 64, "width": 64, "num_steps": 200, "split": 190}
    batcher.submit(wanted(seed=1, **large))
    with pytest.raises(DeadlineRefusedError, match="got 500000 ms, expected about 30400000 ms"):
        batcher.submit(wanted(seed=2, deadline_ms=500_000, **large))
    with pytest.raises(DeadlineRefusedError):  # the run is held already, this wish to share it comes too late
        batcher.submit(wanted(seed=1, deadline_ms=500_000, **large))
    for requests in (1, 2, 16):
        batcher.admission.times.record((32, 32), requests, 4.0, 16)
    with pytest.raises(DeadlineRefusedError, match="the service's limit of 600 s, expected about 760000 ms") as caught:
        batcher.submit(wanted(seed=3, **large))
    assert 160 <= caught.value.retry_after_s <= 161


def test_another_sizes_times_hand_nothing_over_early(gated: Any, batching: Any, wanted: Any) -> None:
    batcher = batching(gated[0], started=False, cache=False)
    batcher.admission.times.record((4, 4), 1, 1e5, 16)
    ticket = batcher.submit(wanted(split=3, accept_splits=(1, 2)))
    batcher.start()
    assert ticket.future.result(60).meta.next_step == 3


def test_what_is_queued_counts(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False, max_batch=1)
    slow(batcher, 10.0)
    batcher.submit(wanted(seed=1), deadline_s=70)
    batcher.submit(wanted(seed=2), deadline_s=75)
    with pytest.raises(DeadlineRefusedError, match="about 90000 ms"):
        batcher.submit(wanted(seed=3), deadline_s=80)
    batcher.submit(wanted(seed=3), deadline_s=65)  # goes before the others


def test_another_sizes_turns_count(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    slow(batcher, 10.0)
    batcher.submit(wanted(seed=1, height=8, width=8))
    with pytest.raises(DeadlineRefusedError, match="about 60000 ms"):
        batcher.submit(wanted(seed=2), deadline_s=40)


def test_a_late_run_hands_over_at_the_largest_split_it_reaches(
    gated: Any, batching: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = gated
    request = wanted(split=6, num_steps=8, accept_splits=(4, 2, 1, 5))
    batcher = batching(engine, cache=False)
    gate.hold()
    ticket = batcher.submit(request, deadline_s=300)
    gate.await_call()
    slow(batcher, 200.0)  # from split 1 to 2 there is time, from 2 to 4 it would take 400 s
    gate.release()
    handoff = ticket.future.result(60)
    assert handoff.meta.next_step == 2
    whole = engine.run(request.model_copy(update={"split": 8, "accept_splits": ()})).latents
    np.testing.assert_array_equal(rest_of(engine, handoff, request), whole)
    np.testing.assert_array_equal(handoff.latents, engine.run(wanted(split=2, num_steps=8)).latents)
    assert batcher.load().running == 0


def test_a_run_in_time_is_not_cut_short(engine: Engine, batching: Any, wanted: Any) -> None:
    ticket = batching(engine).submit(wanted(split=6, accept_splits=(1, 2, 3)), deadline_s=500)
    assert ticket.future.result(60).meta.next_step == 6


def test_at_the_deadline_the_last_split_reached_counts(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, cache=False)
    gate.hold()
    ticket = batcher.submit(wanted(split=6, accept_splits=(1, 5)))
    gate.let(3)  # three steps are done, the fourth hangs; split 1 was passed
    with batcher._lock:
        ticket.deadline = time.monotonic() + 0.1
        batcher._due.notify_all()
    handoff = ticket.future.result(60)
    assert handoff.meta.next_step == 1
    np.testing.assert_array_equal(handoff.latents, engine_alone(engine, gate, wanted(split=1)).latents)


def engine_alone(engine: Engine, gate: Any, request: Any) -> Any:
    gate.release()
    return engine.run(request)


def test_a_run_fails_at_its_deadline_also_while_a_call_hangs(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=1)
    gate.hold()
    running = batcher.submit(wanted(seed=1, split=6, accept_splits=(3,)), deadline_s=0.3)
    waiting = batcher.submit(wanted(seed=2, split=6), deadline_s=0.3)
    for ticket in (running, waiting):
        with pytest.raises(DeadlinePassedError, match="before its deadline"):
            ticket.future.result(60)
    assert (batcher.load().waiting, batcher.load().running) == (0, 0)
    gate.release()
    assert batcher.submit(wanted(seed=3)).future.result(60).meta.next_step == 3


def test_the_services_own_limit_stands_where_no_deadline_is_named(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    now = time.monotonic()
    assert batcher.submit(wanted()).deadline - now == pytest.approx(engine.limits.deadline_s, abs=30)
    assert batcher.submit(wanted(deadline_ms=90_000)).deadline - now == pytest.approx(90, abs=30)
    assert batcher.submit(wanted(deadline_ms=90_000), deadline_s=300).deadline - now == pytest.approx(300, abs=30)
