"""Caches by content: texts encoded once, equal requests share a run, and a switch turns all of it off."""

from __future__ import annotations

import time
from typing import Any

import pytest
from latentrelay.cloud.content_cache import ContentCache, content_key
from latentrelay.cloud.errors import RunCancelled


class Counts:
    """A BatchObserver that counts."""

    def __init__(self) -> None:
        self.hits: list[tuple[str, bool]] = []
        self.ends: list[str] = []
        self.waits: list[float] = []
        self.calls: list[tuple[int, int]] = []

    def step(self, rows: int, capacity: int, seconds: float) -> None:
        self.calls.append((rows, capacity))

    def joined(self, wait_s: float) -> None:
        self.waits.append(wait_s)

    def left(self, reason: str) -> None:
        self.ends.append(reason)

    def cache(self, kind: str, hit: bool) -> None:
        self.hits.append((kind, hit))


def test_equal_requests_in_flight_share_a_run(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    counts = Counts()
    batcher = batching(engine, observer=counts)
    gate.hold()
    first = batcher.submit(wanted())
    gate.let(1)
    seen: list[int] = []
    second = batcher.submit(
        wanted(deadline_ms=400_000, wire_versions=("1.1",), preview=True),
        on_step=lambda report: seen.append(report.step),
    )
    other = batcher.submit(wanted(guidance=6.0))
    gate.release()
    handoffs = [each.future.result(60) for each in (first, second, other)]
    assert handoffs[0].latents.tobytes() == handoffs[1].latents.tobytes() != handoffs[2].latents.tobytes()
    assert seen == [2, 3]
    assert gate.rows == [2, 2, 4, 2, 2] or gate.rows == [2, 2, 4, 4, 2]
    assert [hit for kind, hit in counts.hits if kind == "result"] == [False, True, False]
    assert counts.ends == ["done"] * 3


def test_a_shared_run_ends_when_all_have_cancelled(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine)
    gate.hold()
    first, second = batcher.submit(wanted(split=6)), batcher.submit(wanted(split=6))
    gate.let(1)
    first.cancel()
    with pytest.raises(RunCancelled):
        first.future.result(60)
    assert batcher.load().running == 1
    third = batcher.submit(wanted(split=6))
    second.cancel()
    third.cancel()
    assert batcher.load().running == 0
    again = batcher.submit(wanted(split=6))  # not the run that was given up
    gate.release()
    assert again.future.result(60).to_bytes() == engine.run(wanted(split=6)).to_bytes()


def test_a_finished_result_is_given_again(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    counts = Counts()
    batcher = batching(engine, observer=counts)
    first = batcher.submit(wanted()).future.result(60)
    calls = len(gate.rows)
    assert batcher.submit(wanted(deadline_ms=1000)).future.result(0).to_bytes() == first.to_bytes()
    assert len(gate.rows) == calls
    assert counts.ends == ["done", "cached"]
    for change in ({"dtype": "float16"}, {"seed": 12}, {"prompt": "red"}, {"deterministic": True}, {"split": 2}):
        batcher.submit(wanted(**change)).future.result(60)
    assert len(gate.rows) > calls + 4


def test_owners_share_neither_runs_nor_results(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    counts = Counts()
    batcher = batching(engine, observer=counts)
    gate.hold()
    held = [batcher.submit(wanted(), owner=each) for each in ("ann", "bob", "ann")]
    assert batcher.load().waiting + batcher.load().running == 2
    gate.release()
    for ticket in held:
        ticket.future.result(60)
    for owner in ("ann", "bob", "cem"):
        batcher.submit(wanted(), owner=owner).future.result(60)
    assert [hit for kind, hit in counts.hits if kind == "result"] == [False, False, True, True, True, False]


def test_what_is_forgotten_is_made_again(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    counts = Counts()
    batcher = batching(engine, observer=counts)
    for owner in ("ann", "bob"):
        batcher.submit(wanted(), owner=owner).future.result(60)
    batcher.forget("ann")
    calls = len(gate.rows)
    for owner in ("ann", "bob"):
        batcher.submit(wanted(), owner=owner).future.result(60)
    assert [hit for kind, hit in counts.hits if kind == "result"] == [False, False, False, True]
    assert len(gate.rows) > calls


def test_a_run_that_all_gave_up_leaves_no_result(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine)
    gate.hold()
    ticket = batcher.submit(wanted(split=1), owner="ann")
    gate.await_call()  # its last step is being made
    ticket.cancel()
    batcher.forget("ann")
    gate.release()
    batcher.submit(wanted(seed=5), owner="bob").future.result(60)  # the round is over
    assert len(batcher._results) == 1


def test_a_result_leaves_the_memory_when_its_time_is_over(engine: Any, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, result_ttl_s=0.2)
    batcher.submit(wanted()).future.result(60)
    until = time.monotonic() + 60
    while len(batcher._results):  # though nobody asks
        assert time.monotonic() < until
        time.sleep(0.01)
    assert batcher._results.held_bytes == 0


def test_the_switch_turns_all_caches_off(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    counts = Counts()
    batcher = batching(engine, cache=False, observer=counts)
    encoded: list[int] = []
    encode = engine.encode
    engine.encode = lambda texts: (encoded.append(len(texts)), encode(texts))[1]
    for _ in range(2):
        batcher.submit(wanted()).future.result(60)
    assert len(gate.rows) == 6
    assert encoded == [2, 2]
    assert counts.hits == []


def test_texts_are_encoded_once_and_together(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated
    encoded: list[list[str]] = []
    encode = engine.encode
    engine.encode = lambda texts: (encoded.append(list(texts)), encode(texts))[1]
    counts = Counts()
    batcher = batching(engine, started=False, observer=counts)
    tickets = [batcher.submit(wanted(prompt=f"cat {i}", negative_prompt="", seed=i)) for i in range(3)]
    batcher.start()
    for ticket in tickets:
        ticket.future.result(60)
    batcher.submit(wanted(prompt="cat 1", negative_prompt="", seed=9)).future.result(60)
    assert encoded == [["", "cat 0", "cat 1", "cat 2"]]
    alone = batcher.submit(wanted(prompt="cat 1", negative_prompt="", seed=9, deterministic=True)).future.result(60)
    assert encoded[1:] == [[""], ["cat 1"]]  # not from a batch: that would round otherwise
    assert alone == engine.run(wanted(prompt="cat 1", negative_prompt="", seed=9, deterministic=True))
    assert counts.hits.count(("text", True)) == 2


def test_a_deterministic_run_takes_no_text_of_a_batch_it_joins_with(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated
    encoded: list[list[str]] = []
    encode = engine.encode
    engine.encode = lambda texts: (encoded.append(list(texts)), encode(texts))[1]
    batcher = batching(engine, started=False)
    tickets = [batcher.submit(wanted(deterministic=each)) for each in (False, True)]
    batcher.start()
    for ticket in tickets:
        ticket.future.result(60)
    assert encoded == [["on", "the red cat"], ["on"], ["the red cat"]]


def test_an_early_handoff_is_not_kept_as_the_result(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine)
    request = wanted(split=6, accept_splits=(1,))
    gate.hold()
    ticket = batcher.submit(request)
    gate.let(2)
    with batcher._lock:
        ticket.deadline = 0.0
        batcher._due.notify_all()
    assert ticket.future.result(60).meta.next_step == 1
    gate.release()
    assert batcher.submit(request).future.result(60).meta.next_step == 6


def test_the_least_recently_used_makes_room() -> None:
    cache: ContentCache[str] = ContentCache(100)
    keys = [content_key([number]) for number in range(4)]
    for key, name in zip(keys[:3], "abc", strict=True):
        cache.put(key, name, 30)
    assert cache.get(keys[0]) == "a"
    cache.put(keys[3], "d", 30)
    assert [cache.get(key) for key in keys] == ["a", None, "c", "d"]
    cache.put(keys[0], "A", 50)
    assert (cache.held_bytes, len(cache)) == (80, 2)
    cache.put(keys[1], "too large", 101)
    assert cache.get(keys[1]) is None
    assert cache.get(keys[0]) == "A"


def test_what_is_too_old_is_not_given() -> None:
    cache: ContentCache[str] = ContentCache(100, max_age_s=0.0)
    cache.put(b"a", "a", 30)
    assert (cache.get(b"a"), cache.held_bytes) == (None, 0)
    cache.put(b"a", "a", 30)
    assert (cache.drop_old(), len(cache)) == (None, 0)
    kept: ContentCache[str] = ContentCache(100, max_age_s=1e6)
    for key in (b"ab", b"ac", b"b"):
        kept.put(key, "kept", 30)
    assert 0 < (kept.drop_old() or 0) <= 1e6
    kept.drop(b"a")
    assert (kept.get(b"ab"), kept.get(b"b"), kept.held_bytes) == (None, "kept", 30)


def test_a_key_says_nothing_of_the_text() -> None:
    assert len(content_key(["the red cat"])) == 32
    assert b"cat" not in content_key(["the red cat"])
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
