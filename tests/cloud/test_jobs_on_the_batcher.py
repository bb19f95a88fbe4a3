"""The job board on the real batcher: results are the engine's, what was left is finished by the next one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.cloud.batcher import Batcher
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import DeadlineRefusedError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.jobs import JobBoard, JobOptions, JobStatus
from latentrelay.cloud.requests import parse_request
from latentrelay.runtime.handoff import Handoff

ME = "me"


@pytest.fixture
def board(engine: Engine, tmp_path: Path) -> Iterator[Callable[[], tuple[JobBoard, Batcher]]]:
    """`board()`: another board and batcher on the same store."""
    with ExitStack() as stack:

        def made() -> tuple[JobBoard, Batcher]:
            batcher = Batcher(engine, cache=False)
            board = JobBoard(FolderStore(tmp_path), batcher, options=JobOptions(poll_s=0.02), model=engine.digest)
            batcher.start()
            stack.callback(batcher.close)
            board.start()
            stack.callback(board.close)
            return board, batcher

        yield made


def document(prompt: str = "a fox", **facts: Any) -> bytes:
    return json.dumps(
        {"prompt": prompt, "seed": 1, "height": 16, "width": 16, "num_steps": 4, "split": 2, **facts}
    ).encode()


def accept(board: JobBoard, engine: Engine, body: bytes) -> str:
    return board.accept(parse_request(body, engine.limits), body, owner=ME).id


def ended(board: JobBoard, id: str) -> JobStatus:
    return asyncio.run(board.wait(id, ME, timeout_s=120))


def test_results_are_the_engines_own(board: Callable[[], tuple[JobBoard, Batcher]], engine: Engine) -> None:
    jobs, _ = board()
    bodies = [document(str(each), seed=each, deterministic=True) for each in range(3)]
    ids = [accept(jobs, engine, body) for body in bodies]
    for id, body in zip(ids, bodies, strict=True):
        status = ended(jobs, id)
        assert (status.state, status.next_step) == ("done", 2)
        got = Handoff.from_bytes(jobs.blob(id, ME)[1])
        alone = engine.run(parse_request(body, engine.limits))
        np.testing.assert_array_equal(got.latents, alone.latents)


def test_every_step_is_told_with_its_preview(board: Callable[[], tuple[JobBoard, Batcher]], engine: Engine) -> None:
    jobs, _ = board()
    id = accept(jobs, engine, document(num_steps=40, split=40, preview=True))

    async def followed() -> list[JobStatus]:
        seen = [jobs.status(id, ME)]
        while not seen[-1].ended:
            seen.append(await jobs.wait(id, ME, seen=seen[-1].version, timeout_s=120))
        return seen

    seen = asyncio.run(followed())
    assert seen[-1].state == "done"
    pictures = [status.preview for status in seen if status.preview is not None]
    assert pictures
    assert all(len(rgb) == 3 * rows * columns for rows, columns, rgb in pictures)


def test_the_next_batcher_finishes_what_was_left(board: Callable[[], tuple[JobBoard, Batcher]], engine: Engine) -> None:
    first, batcher = board()
    body = document("a long one", num_steps=60, split=60)
    ids = [accept(first, engine, body), accept(first, engine, document("b", num_steps=60, split=60))]
    first.close()
    batcher.close()
    second, _ = board()
    assert [ended(second, id).state for id in ids] == ["done", "done"]
    alone = engine.run(parse_request(body, engine.limits))
    got = Handoff.from_bytes(second.blob(ids[0], ME)[1])
    np.testing.assert_allclose(got.latents.astype(float), alone.latents.astype(float), atol=0.02, rtol=0.01)


def test_a_cancelled_job_leaves_the_batch(board: Callable[[], tuple[JobBoard, Batcher]], engine: Engine) -> None:
    jobs, batcher = board()
    id = accept(jobs, engine, document(num_steps=200, split=200))
    assert jobs.cancel(id, ME).state == "cancelled"
    end = time.monotonic() + 60
    while batcher.load().waiting + batcher.load().running:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert jobs.status(id, ME).state == "cancelled"


def test_a_deleted_result_is_gone_from_memory_too(gated: Any, tmp_path: Path) -> None:
    """And it never was another owner's."""
    engine, gate = gated
    with ExitStack() as stack:
        batcher = Batcher(engine)
        jobs = JobBoard(FolderStore(tmp_path), batcher, options=JobOptions(poll_s=0.02), model=engine.digest)
        batcher.start()
        stack.callback(batcher.close)
        jobs.start()
        stack.callback(jobs.close)
        calls = []
        for owner in (ME, "other", ME):
            body = document()
            id = jobs.accept(parse_request(body, engine.limits), body, owner=owner).id
            assert asyncio.run(jobs.wait(id, owner, timeout_s=120)).state == "done"
            calls.append(len(gate.rows))
            until = time.monotonic() + 60
            while jobs._live.get(id) is not None:  # until its end is in the store
                assert time.monotonic() < until
                time.sleep(0.01)
            assert jobs.cancel(id, owner).state == "deleted"
        assert calls == [2, 4, 6]


def test_a_deadline_that_is_missed_hands_over_early_or_fails(
    board: Callable[[], tuple[JobBoard, Batcher]], engine: Engine
) -> None:
    jobs, _ = board()
    try:
        id = accept(jobs, engine, document(num_steps=200, split=200, deadline_ms=200, accept_splits=[1]))
    except DeadlineRefusedError:  # not even one step, on a machine this busy
        return
    status = ended(jobs, id)
    if status.state == "done":
        assert status.next_step in (1, 200)
    else:
        assert (status.problem or {})["status"] == 504
