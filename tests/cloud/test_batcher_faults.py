"""One request's misfortune is its own: NaN, errors, memory, progress functions; and nothing of them is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from latentrelay.cloud.errors import MemoryRefusedError, RunFailedError
from latentrelay.runtime.errors import HandoffFormatError, NonFiniteError

SECRET = "/srv/secret the red cat"


def together(batcher: Any, requests: list[Any]) -> list[Any]:
    """Each one's handoff or error, all submitted before the first call."""
    tickets = [batcher.submit(each) for each in requests]
    batcher.start()
    return [ticket.future.exception(60) or ticket.future.result() for ticket in tickets]


def test_not_a_number_fails_its_own_request_alone(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated
    requests = [wanted(seed=seed, split=3, guidance=5.0 + seed) for seed in range(3)]
    clean = together(batching(engine, started=False, cache=False), requests)

    def poison(module: Any, given: Any, output: Any) -> Any:
        if len(output[0]) == 6:  # the second request's row of the unconditional half
            output[0][1] = float("nan")
        return output

    engine.unet.register_forward_hook(poison)
    first, second, third = together(batching(engine, started=False, cache=False), requests)
    assert isinstance(second, NonFiniteError)
    assert second.step == 0
    for got, expected in ((first, clean[0]), (third, clean[2])):
        assert abs(got.latents - expected.latents).max() < 1e-3 * abs(expected.latents).max()


def test_an_error_in_the_shared_call_fails_only_who_causes_it(
    gated: Any, batching: Any, wanted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine, gate = gated

    def fail(module: Any, given: Any, kwargs: Any) -> None:
        if type(given[0]).__name__ != "FakeTensor" and torch.any(given[0] == 7.0):
            raise RuntimeError(SECRET)

    engine.unet.register_forward_pre_hook(fail, with_kwargs=True)
    begin = engine.begin

    def begun(request: Any) -> Any:
        state = begin(request)
        if request.seed == 1:
            state.latents[0, 0, 0, 0] = 7.0
        return state

    engine.begin = begun
    batcher = batching(engine, started=False, cache=False)
    with caplog.at_level(logging.DEBUG):
        first, second, third = together(batcher, [wanted(seed=seed) for seed in range(3)])
    assert isinstance(second, RunFailedError)
    assert "secret" not in str(second)
    assert "secret" not in caplog.text
    assert "RuntimeError at" in caplog.text
    assert (first.meta.next_step, third.meta.next_step) == (3, 3)
    assert gate.rows == [6, 2, 2, 2, 4, 4]  # together, then each alone, then the two that are left
    assert batcher.submit(wanted(seed=9)).future.result(60).meta.seed == 9


def test_a_network_that_always_fails_ends_every_run_and_the_batcher_goes_on(
    gated: Any, batching: Any, wanted: Any
) -> None:
    engine, gate = gated
    gate.fault = lambda rows: ValueError(SECRET)
    batcher = batching(engine, started=False, cache=False)
    for outcome in together(batcher, [wanted(seed=seed) for seed in range(3)]):
        assert isinstance(outcome, RunFailedError)
        assert "secret" not in f"{outcome!r} {outcome.__cause__!r}"
    gate.fault = lambda rows: None
    assert batcher.submit(wanted()).future.result(60).meta.next_step == 3


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")]
)
def test_out_of_memory_halves_the_batch_and_stays_there(
    gated: Any, batching: Any, wanted: Any, error: Exception
) -> None:
    engine, gate = gated
    gate.fault = lambda rows: error if rows > 4 else None
    batcher = batching(engine, started=False, cache=False)
    for outcome in together(batcher, [wanted(seed=seed, split=2) for seed in range(4)]):
        assert outcome.meta.next_step == 2
    assert gate.rows == [8, 4, 4, 4, 4]  # refused once, then halves, also at the second step
    gate.rows.clear()
    for ticket in [batcher.submit(wanted(seed=seed, split=1)) for seed in range(5)]:
        ticket.future.result(60)
    assert max(gate.rows) == 4


def test_memory_that_is_not_there_even_for_half_is_refused(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    gate.fault = lambda rows: torch.OutOfMemoryError("CUDA out of memory") if rows > 2 else None
    outcomes = together(batching(engine, started=False, cache=False), [wanted(seed=seed) for seed in range(5)])
    assert all(isinstance(each, MemoryRefusedError) for each in outcomes)
    gate.fault = lambda rows: torch.OutOfMemoryError("CUDA out of memory")
    outcome = together(batching(engine, started=False, cache=False), [wanted(seed=9)])[0]
    assert isinstance(outcome, MemoryRefusedError)
    assert outcome.retry_after_s >= 1


def test_a_progress_function_that_raises_disturbs_nobody(
    gated: Any, batching: Any, wanted: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _ = gated
    batcher = batching(engine)

    def broken(report: Any) -> None:
        raise ValueError(SECRET)

    assert batcher.submit(wanted(), on_step=broken).future.result(60).meta.next_step == 3
    assert "secret" not in caplog.text


def test_a_preview_that_cannot_be_made_is_left_out(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated

    def broken(latents: Any) -> Any:
        raise RuntimeError(SECRET)

    engine.preview = broken
    seen: list[Any] = []
    ticket = batching(engine).submit(wanted(preview=True), on_step=seen.append)
    assert ticket.future.result(60).meta.next_step == 3
    assert [each.preview for each in seen] == [None] * 3


def test_a_text_that_cannot_be_encoded_fails_alone(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated
    encode = engine.encode

    def fail(texts: Any) -> Any:
        if "bad" in texts:
            raise RuntimeError(SECRET)
        return encode(texts)

    engine.encode = fail
    batcher = batching(engine, started=False)
    good, bad = together(batcher, [wanted(), wanted(prompt="bad")])
    assert good.meta.next_step == 3
    assert isinstance(bad, RunFailedError)


def test_what_does_not_fit_float16_is_named(gated: Any, batching: Any, wanted: Any) -> None:
    engine, _ = gated

    def far(module: Any, given: Any, output: Any) -> Any:
        return (output[0] * 1e6,)

    engine.unet.register_forward_hook(far)
    (outcome,) = together(batching(engine, started=False), [wanted(dtype="float16")])
    assert isinstance(outcome, HandoffFormatError)


def test_an_error_of_the_batchers_own_ends_runs_not_the_thread(
    gated: Any, batching: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = gated
    batcher = batching(engine)
    monkeypatch.setattr(batcher, "_step", lambda jobs: 1 / 0)
    assert isinstance(batcher.submit(wanted()).future.exception(60), RunFailedError)
    monkeypatch.undo()
    assert batcher.submit(wanted(seed=2)).future.result(60).meta.seed == 2
