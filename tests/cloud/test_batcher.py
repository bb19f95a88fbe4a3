"""The batcher against diffusers and against the engine alone: whoever shares the calls, the same latents.

NOISE is the bound on what sharing a call may change, relative to the largest latent; a deterministic run changes by
nothing.
"""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.ticket import StepReport

NOISE = 2e-4  # of the tiny random network, whose latents grow to 10; the reference's own bound is a bar
KINDS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
MIXED = [
    {"prompt": f"the red cat {i}", "negative_prompt": "on" * (i % 2), "seed": i, "guidance": 1.0 + i}
    | {"sampler": ("ddim", "dpmsolver++")[i % 2], "num_steps": (6, 16, 4)[i % 3], "split": 1 + i % 4}
    for i in range(10)
]


def diffusers_latents(pipeline: Any, wanted: Any) -> dict[int, np.ndarray[Any, Any]]:
    """The latents of a whole diffusers run by the number of steps done."""
    seen: dict[int, np.ndarray[Any, Any]] = {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[step + 1] = tensors["latents"].numpy().copy()
        return {}

    before = pipeline.scheduler
    pipeline.scheduler = KINDS[wanted.sampler].from_config(
        before.config, **({"clip_sample": False} if wanted.sampler == "ddim" else {})
    )
    try:
        pipeline(
            wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            guidance_scale=wanted.guidance,
            num_inference_steps=wanted.num_steps,
            height=wanted.height,
            width=wanted.width,
            generator=torch.Generator("cpu").manual_seed(wanted.seed),
            output_type="latent",
            callback_on_step_end=keep,
        )
    finally:
        pipeline.scheduler = before
    return seen


def distance(got: Any, expected: Any) -> float:
    """The largest difference, in parts of the largest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_mixed_requests_share_calls_and_equal_diffusers(
    tiny: Any, tmp_path: Path, gated: Any, batching: Any, wanted: Any
) -> None:
    engine, gate = gated
    batcher = batching(engine, started=False, cache=False)
    requests = [wanted(**each) for each in MIXED]
    tickets = [batcher.submit(each) for each in requests]
    batcher.start()
    handoffs = [ticket.future.result(60) for ticket in tickets]
    assert max(gate.rows) == 2 * len(requests)
    assert len(set(gate.timesteps[0])) > 1  # one call, different timesteps
    assert len(gate.rows) == max(each.split for each in requests)
    reference = tiny.make_pipeline(tmp_path / "reference")
    for request, handoff in zip(requests, handoffs, strict=True):
        alone = diffusers_latents(reference, request)
        assert distance(handoff.latents, alone[request.split]) < NOISE
        assert handoff.meta.next_step == request.split
        exact = engine.run(request)
        assert handoff.meta == exact.meta
        assert (handoff.x0_prev is None) == (exact.x0_prev is None)
        if exact.x0_prev is not None:
            assert distance(handoff.x0_prev, exact.x0_prev) < NOISE


def test_requests_join_and_leave_between_steps(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, cache=False)
    gate.hold()
    long = batcher.submit(wanted(seed=1, split=5))
    gate.let(2)  # the third call of the first run is held
    short = batcher.submit(wanted(seed=2, split=2))
    gate.release()
    handoffs = [short.future.result(60), long.future.result(60)]
    assert gate.rows == [2, 2, 2, 4, 4]
    for handoff, request in zip(handoffs, (wanted(seed=2, split=2), wanted(seed=1, split=5)), strict=True):
        assert distance(handoff.latents, engine.run(request).latents) < NOISE


def test_a_deterministic_run_is_exact_whatever_else_runs(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    exact = {seed: engine.run(wanted(seed=seed, split=4)) for seed in range(3)}
    gate.rows.clear()
    batcher = batching(engine, started=False, cache=False)
    others = [batcher.submit(wanted(seed=100 + i, split=5, prompt="the red cat")) for i in range(5)]
    own = {seed: batcher.submit(wanted(seed=seed, split=4, deterministic=True)) for seed in exact}
    batcher.start()
    for seed, ticket in own.items():
        assert ticket.future.result(60).to_bytes() == exact[seed].to_bytes()
    for ticket in others:
        ticket.future.result(60)
    assert gate.rows.count(2) == 12
    assert gate.rows.count(10) == 5


def test_a_consistency_pipeline_has_one_row_a_request(tiny: Any, tmp_path: Path, batching: Any, wanted: Any) -> None:
    pipeline = tiny.make_pipeline(tmp_path, sampler="lcm")
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, given: None if type(given[0]).__name__ == "FakeTensor" else rows.append(len(given[0]))
    )
    engine = Engine(pipeline, name="lcm")
    plain = {"guidance": 1.0, "negative_prompt": "", "num_steps": 4}
    requests = [wanted(seed=i, split=1 + i, **plain) for i in range(4)]
    batcher = batching(engine, started=False, cache=False)
    tickets = [batcher.submit(each) for each in requests]
    batcher.start()
    handoffs = [ticket.future.result(60) for ticket in tickets]
    assert rows == [4, 3, 2, 1]
    for request, handoff in zip(requests, handoffs, strict=True):
        assert distance(handoff.latents, engine.run(request).latents) < NOISE


def test_compiled_calls_have_few_sizes(
    tiny: Any, tmp_path: Path, batching: Any, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)  # a minute of compiling, which is torch's own
    pipeline = tiny.make_pipeline(tmp_path)
    rows: list[int] = []
    pipeline.unet.register_forward_pre_hook(
        lambda module, given: None if type(given[0]).__name__ == "FakeTensor" else rows.append(len(given[0]))
    )
    engine = Engine(pipeline, name="compiled", compiled=True)
    batcher = batching(engine, started=False, cache=False, max_batch=7)  # so that four have a place
    requests = [wanted(seed=seed, split=1 + seed % 3) for seed in range(5)]
    tickets = [batcher.submit(each) for each in requests]
    batcher.start()
    handoffs = [ticket.future.result(60) for ticket in tickets]
    assert set(rows) <= {2, 4, 8}
    assert rows[0] == 8
    for request, handoff in zip(requests, handoffs, strict=True):
        assert distance(handoff.latents, engine.run(request).latents) < NOISE


def test_no_steps_is_the_seeds_noise(engine: Engine, batching: Any, wanted: Any) -> None:
    ticket = batching(engine).submit(wanted(split=0))
    assert ticket.future.result(60).to_bytes() == engine.run(wanted(split=0)).to_bytes()


def test_progress_and_previews_for_those_who_ask(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine)
    seen: dict[bool, list[StepReport]] = {True: [], False: []}
    tickets = [batcher.submit(wanted(preview=each), on_step=seen[each].append) for each in seen]
    for ticket in tickets:
        ticket.future.result(60)
    assert [(each.step, each.split, each.num_steps) for each in seen[True]][-1] == (3, 3, 6)
    assert all(each.preview is None for each in seen[False])
    rows, columns, rgb = seen[True][0].preview or (0, 0, b"")
    assert (rows, columns, len(rgb)) == (8, 8, 8 * 8 * 3)


def test_the_wire_version_is_each_clients_own(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine)
    old, new = (batcher.submit(wanted(wire_versions=each)) for each in (("1.0",), ("1.0", "1.1")))
    assert old.future.result(60).meta.schema_version == "1.0"
    assert new.future.result(60).meta.schema_version == "1.1"


def test_torchs_threads_are_the_callers(engine: Engine, batching: Any, wanted: Any) -> None:
    before, seen = torch.get_num_threads(), []
    batcher = batching(engine)
    batcher.submit(wanted(), on_step=lambda report: seen.append(torch.get_num_threads())).future.result(60)
    assert set(seen) == {before} == {torch.get_num_threads()}


def test_load_says_what_is_held(gated: Any, batching: Any, wanted: Any) -> None:
    engine, gate = gated
    batcher = batching(engine, max_batch=2)
    empty = batcher.load()
    assert (empty.waiting, empty.running, empty.limit) == (0, 0, engine.limits.queue)
    assert (empty.step_ms, empty.occupancy, empty.estimate_ms) == (None, None, None)
    gate.hold()
    tickets = [batcher.submit(wanted(seed=i)) for i in range(3)]
    gate.let(1)
    assert (batcher.load().waiting, batcher.load().running) == (1, 2)
    gate.release()
    for ticket in tickets:
        ticket.future.result(60)
    after = batcher.load()
    assert (after.waiting, after.running) == (0, 0)
    assert after.step_ms is not None
    assert after.estimate_ms is not None
    assert after.estimate_ms > 0
    assert 0.5 <= (after.occupancy or 0) <= 1


def test_a_kept_ticket_keeps_no_run(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher = batching(engine, started=False)
    ticket, gone = batcher.submit(wanted(seed=21)), batcher.submit(wanted(seed=22))
    runs = [weakref.ref(each.job) for each in (ticket, gone)]
    gone.cancel()
    batcher.start()
    ticket.future.result(60)
    batcher.close()
    gc.collect()
    assert [each() for each in runs] == [None, None]


def test_many_threads_may_submit(engine: Engine, batching: Any, wanted: Any) -> None:
    batcher, done = batching(engine, cache=False), []

    def ask(seed: int) -> None:
        done.append(batcher.submit(wanted(seed=seed)).future.result(60).meta.seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(24))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_an_accelerator(tiny: Any, tmp_path: Path, batching: Any, wanted: Any, dtype: torch.dtype) -> None:
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "folder")
    engine = Engine.load(str(folder), device="cuda", dtype=dtype)
    requests = [wanted(seed=i, split=1 + i % 5, deterministic=i == 3) for i in range(12)]
    batcher = batching(engine, started=False, cache=False)
    tickets = [batcher.submit(each) for each in requests]
    batcher.start()
    bound = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}[dtype]
    for request, ticket in zip(requests, tickets, strict=True):
        handoff, alone = ticket.future.result(60), engine.run(request)
        assert distance(handoff.latents, alone.latents) < (1e-12 if request.deterministic else bound)
