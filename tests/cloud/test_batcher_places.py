"""Places in the batch: who gets one first, who frees one, how sizes share, what is refused."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import (
    DrainingError,
    MemoryRefusedError,
    ProblemError,
    QueueFullError,
    RefusedError,
    RunCancelled,
)
from latentrelay.cloud.limits import Limits


def test_cancelling_frees_the_place_between_steps(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=1)
    gate.hold()
    first = batcher.submit(wanted(seed=1, split=6))
    second = batcher.submit(wanted(seed=2, split=1))
    gate.let(1)
    assert (first.queue_position(), second.queue_position()) == (None, 0)
    first.cancel()
    with pytest.raises(RunCancelled):
        first.future.result(60)
    assert batcher.load().running == 0  # at once, though the call still runs
    gate.release()
    assert second.future.result(60).meta.next_step == 1
    assert len(gate.rows) == 3  # two calls of the cancelled run, one of the other
    assert second.queue_position() is None


def test_cancelling_what_waits(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=1)
    gate.hold()
    first, *others = [batcher.submit(wanted(seed=seed, split=1)) for seed in range(4)]
    gate.await_call()
    assert [each.queue_position() for each in others] == [0, 1, 2]
    others[1].cancel()
    others[1].cancel()
    with pytest.raises(RunCancelled):
        others[1].future.result(60)
    assert [each.queue_position() for each in others] == [0, None, 1]
    gate.release()
    assert [each.future.result(60).meta.seed for each in (first, others[0], others[2])] == [0, 1, 3]
    first.cancel()  # too late: nothing
    assert first.future.result(0).meta.seed == 0


def test_places_go_to_the_earliest_deadline_then_in_order(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=1)
    order: list[int] = []
    gate.hold()
    tickets = [batcher.submit(wanted(seed=0, split=1))]
    gate.await_call()
    for seed, deadline_s in enumerate((None, None, 500.0, 400.0), start=1):
        ticket = batcher.submit(wanted(seed=seed, split=1), deadline_s=deadline_s)
        ticket.future.add_done_callback(lambda future: order.append(future.result().meta.seed))
        tickets.append(ticket)
    assert [each.queue_position() for each in tickets] == [None, 2, 3, 1, 0]
    gate.release()
    for ticket in tickets:
        ticket.future.result(60)
    assert order == [4, 3, 1, 2]


def test_sizes_take_turns(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, started=False, cache=False)
    last: dict[tuple[int, int], int] = {}

    def note(size: tuple[int, int]) -> Any:
        return lambda report: last.__setitem__(size, len(gate.rows))

    tickets = []
    for seed in range(4):
        for size in ((16, 16), (16, 24), (8, 8)):
            request = wanted(seed=seed, height=size[0], width=size[1], split=6)
            tickets.append(batcher.submit(request, on_step=note(size)))
    batcher.start()
    for ticket in tickets:
        assert ticket.future.result(60).meta.next_step == 6
    assert gate.rows == [8] * 18  # four requests of one size in every call, never two sizes
    assert min(last.values()) > 7  # no size was run to its end before the others began


def test_a_place_of_another_size_is_not_waited_for(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=1)
    gate.hold()
    long = batcher.submit(wanted(seed=0, split=6))
    gate.await_call()
    waiting = batcher.submit(wanted(seed=1, split=6))
    other = batcher.submit(wanted(seed=2, split=1, height=8, width=8))
    gate.release()
    assert other.future.result(60).meta.height == 8
    assert long.future.result(60).meta.seed == 0
    assert waiting.future.result(60).meta.seed == 1


def test_a_full_queue_refuses(tiny: Any, tmp_path: Any, batching: Any, wanted: Any) -> None:
    engine = Engine(tiny.make_pipeline(tmp_path), name="small", limits=Limits(queue=2))
    batcher = batching(engine, started=False)
    for seed in range(2):
        batcher.submit(wanted(seed=seed))
    assert batcher.submit(wanted(seed=1)).queue_position() == 1  # an equal run takes no room
    with pytest.raises(QueueFullError, match="queue is full: got 2 runs") as caught:
        batcher.submit(wanted(seed=2))
    assert (caught.value.kind, caught.value.retry_after_s >= 1) == ("queue-full", True)


def test_what_the_engine_cannot_run_is_refused_at_once(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine)
    for change, status in (({"height": 17}, 422), ({"sampler": "euler"}, 409), ({"wire_versions": ("2.0",)}, 406)):
        with pytest.raises(ProblemError) as caught:
            batcher.submit(wanted(**change))
        assert caught.value.status == status


def test_memory_limits_the_batch_and_refuses_what_never_fits(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    one_mib = batching(engine, started=False).admission.memory.bytes(1, 8, 8) / 2**20
    batcher = batching(engine, started=False, memory_mib=3.5 * one_mib)
    tickets = [batcher.submit(wanted(seed=seed)) for seed in range(7)]
    with pytest.raises(MemoryRefusedError, match="64x64 pixels does not fit the memory") as caught:
        batcher.submit(wanted(height=64, width=64))
    assert (caught.value.kind, caught.value.retry_after_s >= 1) == ("memory", True)
    batcher.start()
    for ticket in tickets:
        ticket.future.result(60)
    assert max(gate.rows) == 6


def test_no_request_looks_into_its_own_size(tiny: Any, tmp_path: Any, batching: Any, wanted: Any) -> None:
    """A look takes seconds: those that `warm_up` made are enough for every size; without steps none is needed."""
    pipeline, looks = tiny.make_pipeline(tmp_path), []

    def looked(module: Any, given: tuple[Any, ...]) -> None:
        if type(given[0]).__name__ == "FakeTensor":
            looks.append(tuple(given[0].shape[2:]))

    pipeline.unet.register_forward_pre_hook(looked)
    engine = Engine(pipeline, name="looked into")
    batcher = batching(engine, cache=False)
    ended = [batcher.submit(wanted(split=0, height=16 * each, width=16)).future for each in range(1, 9)]
    assert [each.result(60).meta.next_step for each in ended] == [0] * 8
    batcher.load()
    assert looks == []
    batcher.warm_up()
    held, few = len(looks), set(looks)
    assert held == len(few) <= 3
    tickets = [batcher.submit(wanted(split=1, height=16 * each, width=16 * (9 - each))) for each in range(1, 9)]
    assert all(each.future.result(60).meta.next_step == 1 for each in tickets)
    assert len(looks) == held


def test_draining_takes_nothing_new_and_ends_what_is_held(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine)
    gate.hold()
    ticket = batcher.submit(wanted())
    gate.await_call()
    batcher.drain()
    with pytest.raises(DrainingError):
        batcher.submit(wanted(seed=2))
    gate.release()
    assert ticket.future.result(60).meta.next_step == 3


def test_closing_cancels_everything_even_before_the_start(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    ticket = batcher.submit(wanted())
    batcher.close()
    with pytest.raises(RunCancelled):
        ticket.future.result(0)
    with pytest.raises(RefusedError):
        batcher.submit(wanted())


def test_a_hung_call_does_not_hold_up_the_end(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine)
    gate.hold()
    ticket = batcher.submit(wanted())
    gate.await_call()
    started = time.monotonic()
    batcher.close(timeout_s=0.2)
    assert time.monotonic() - started < 30
    with pytest.raises(RunCancelled):
        ticket.future.result(0)
    gate.release()
    for thread in threading.enumerate():
        if thread.name == "latentrelay-batcher":
            thread.join(60)
