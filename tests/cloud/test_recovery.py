"""Several boards on one store: one of them dies, one adopts; nothing accepted is lost and nothing is run twice."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from latentrelay.cloud.errors import MemoryRefusedError, ProblemError, QueueFullError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.job_ledger import JobLedger
from latentrelay.cloud.job_record import JobRecord, JobStatus, Moment
from latentrelay.cloud.jobs import JobBoard

ME = "me"
Boards = Callable[..., tuple[JobBoard, Any]]


def ended(board: JobBoard, id: str) -> JobStatus:
    status = asyncio.run(board.wait(id, ME, timeout_s=60))
    assert status.ended
    return status


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def record(store: FolderStore, id: str) -> JobRecord:
    entry = JobLedger(store).read(id)
    assert entry is not None
    return entry.record


def rewrite(store: FolderStore, id: str, **facts: Any) -> None:
    """Change the record of a job that nobody runs."""
    ledger = JobLedger(store)
    entry = ledger.read(id)
    assert entry is not None
    assert ledger.swap(entry, dataclasses.replace(entry.record, **facts)) is not None


def test_the_next_process_finishes_what_was_left(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    first, runs = boards(paused=True)
    jobs = [accept(first, str(each), key=str(each)) for each in range(3)]
    until(lambda: first.status(jobs[0], ME).state == "running")
    first.close()
    runs.close()
    assert [record(store, id).state for id in jobs] == ["queued"] * 3, "not recorded as cancelled"
    second, later = boards()
    assert [ended(second, id).state for id in jobs] == ["done"] * 3
    assert [ticket.request.prompt for ticket in later.submitted] == ["0", "1", "2"], "the oldest first"
    assert accept(second, "0", key="0") == jobs[0]


def test_another_replica_takes_over_at_once_and_only_one_does(boards: Boards, accept: Callable[..., str]) -> None:
    first, runs = boards(paused=True)
    others = [boards() for _ in range(3)]
    jobs = [accept(first, str(each)) for each in range(12)]
    others.append(boards())
    until(lambda: others[-1][0].open_jobs(ME) == 12)  # it has looked at them
    assert not any(other.submitted for _, other in others), "the living keep their jobs"
    first.close()
    runs.close()
    for id in jobs:
        assert ended(others[0][0], id).state == "done"
    assert sorted(t.request.prompt for _, other in others for t in other.submitted) == sorted(map(str, range(12)))


def test_a_job_of_another_replica_is_followed_and_cancelled_from_here(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    first, runs = boards(paused=True)
    second, _ = boards()
    job, waiting = accept(first, split=4), accept(first, "later")

    async def followed() -> list[JobStatus]:
        seen = [second.status(job, ME)]
        runs.gate.set()
        started = asyncio.get_running_loop().time()
        while not seen[-1].ended:
            seen.append(await second.wait(job, ME, seen=seen[-1].version, timeout_s=60))
        assert asyncio.get_running_loop().time() - started < 55, "it was woken, it did not time out"
        return seen

    assert asyncio.run(followed())[-1].state == "done"
    assert second.blob(job, ME) == first.blob(job, ME)
    assert ended(second, waiting).state == "done"
    runs.gate.clear()
    third = accept(first, "third")
    until(lambda: first.status(third, ME).state == "running")
    assert second.cancel(third, ME).state == "cancelled"
    until(lambda: runs.submitted[-1].cancelled.is_set())
    assert ended(first, third).state == "cancelled"
    until(lambda: store.keys("cancel") == [])
    assert second.open_jobs(ME) == first.open_jobs(ME) == 0


def test_progress_of_another_replica_is_seen(boards: Boards, accept: Callable[..., str], thread_runs: Any) -> None:
    first, runs = boards(progress_s=0.0, paused=True)
    second, _ = boards()
    job = accept(first, split=6)
    until(lambda: runs.submitted)
    runs.submitted[0].on_step(thread_runs.Step(3))
    until(lambda: second.status(job, ME).step == 3)
    assert second.status(job, ME).state == "running"
    assert second.status(job, ME).preview is None


def test_the_same_key_at_two_replicas_runs_once(boards: Boards, accept: Callable[..., str]) -> None:
    (first, runs), (second, others) = boards(), boards()
    with ThreadPoolExecutor(4) as pool:
        for key in map(str, range(10)):
            replicas = (first, second, first, second)
            ids = list(pool.map(lambda board, key: accept(board, key, key=key), replicas, [key] * 4))
            assert len(set(ids)) == 1
            assert ended(second, ids[0]).state == "done"
    assert len(runs.submitted) + len(others.submitted) == 10


def test_a_key_that_another_replica_refuses_meanwhile_is_free_again(
    store: FolderStore, boards: Boards, accept: Callable[..., str], thread_runs: Any
) -> None:
    """A replica that has recorded a job and not yet submitted it has not accepted it: who asks again waits for that."""
    first, runs = boards()
    second, others = boards()
    entered, go = threading.Event(), threading.Event()

    def slow(*_: Any, **__: Any) -> Any:
        entered.set()
        go.wait(60)
        raise QueueFullError(1, 1)

    runs.submit = slow
    errors: list[Exception] = []

    def refused() -> None:
        try:
            accept(first, key="k")
        except QueueFullError as error:
            errors.append(error)

    one = threading.Thread(target=refused)
    one.start()
    entered.wait(60)
    ids: list[str] = []
    two = threading.Thread(target=lambda: ids.append(accept(second, key="k")))
    two.start()
    time.sleep(0.1)
    assert ids == [], "it is not known yet"
    go.set()
    one.join(60)
    two.join(60)
    assert len(errors) == 1
    assert ended(second, ids[0]).state == "done"
    assert len(others.submitted) == 1


def test_a_job_is_begun_no_more_often_than_allowed(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    ledger = JobLedger(store)
    board, runs = boards(paused=True)
    job, innocent = accept(board), accept(board, "it never began")
    for attempt in range(1, 4):
        _begin(board, runs, job)
        assert board.status(job, ME).attempts == attempt
        assert ledger.progress(innocent) is None or ledger.progress(innocent).step == 0  # type: ignore[union-attr]
        runner = record(store, job).runner
        board.close()
        runs.close()
        assert ledger.progress(job) is None, "to end is not to die of it"
        ledger.note_progress(job, runner, 1)  # as if it had died
        board, runs = boards(paused=True)
    status = ended(board, job)
    assert status.state == "failed"
    assert (status.problem or {})["type"].endswith("run-interrupted")
    runs.gate.set()
    assert ended(board, innocent).state == "done"


def _begin(board: JobBoard, runs: Any, job: str) -> None:
    """The runner reports the first step of the oldest job; it is noted in the store."""
    until(lambda: runs.submitted and board.status(job, ME).state == "running")
    runs.submitted[0].on_step(type("Step", (), {"step": 1, "preview": None})())
    ledger = board._ledger
    until(lambda: (note := ledger.progress(job)) is not None and note.step == 1)


def test_a_process_that_ends_in_order_does_not_use_up_attempts(boards: Boards, accept: Callable[..., str]) -> None:
    board, runs = boards(paused=True)
    job = accept(board)
    for _ in range(5):
        _begin(board, runs, job)
        board.close()
        runs.close()
        board, runs = boards(paused=True)
    runs.gate.set()
    status = ended(board, job)
    assert (status.state, status.attempts) == ("done", 1)


def test_a_job_that_kills_before_its_first_step_is_given_up_too(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    board, runs = boards(paused=True)
    job = accept(board)
    board.close()
    runs.close()
    rewrite(store, job, adoptions=12)
    board, _ = boards()
    assert (ended(board, job).problem or {})["type"].endswith("run-interrupted")


def test_a_job_whose_deadline_is_over_fails_cleanly(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    board, runs = boards(paused=True)
    late, early = accept(board, "late", deadline_ms=60_000), accept(board, "early", deadline_ms=60_000)
    board.close()
    runs.close()
    then = record(store, late).accepted
    rewrite(store, late, accepted=dataclasses.replace(then, boot_s=then.boot_s - 61))
    board, runs = boards()
    status = ended(board, late)
    assert (status.problem or {})["status"] == 504
    assert ended(board, early).state == "done"
    assert [ticket.request.prompt for ticket in runs.submitted] == ["early"]
    assert 0 < runs.submitted[0].deadline_s <= 60


@pytest.mark.parametrize(("shift_s", "left_s"), [(0, 60), (1e9, 60), (-30, 30), (-1e9, 0)])
def test_a_wrong_clock_neither_prolongs_nor_turns_a_deadline_negative(
    store: FolderStore, boards: Boards, accept: Callable[..., str], shift_s: float, left_s: float
) -> None:
    """The record of another machine (another boot) whose wall clock is `shift_s` ahead of this one's."""
    board, runs = boards(paused=True)
    job = accept(board, deadline_ms=60_000)
    board.close()
    runs.close()
    there = dataclasses.replace(record(store, job).accepted, boot="another", wall_s=time.time() + shift_s, boot_s=0.0)
    rewrite(store, job, accepted=there)
    left = record(store, job).left_s()
    assert left is not None
    assert left_s - 30 < left <= left_s
    board, runs = boards()
    assert ended(board, job).state == ("done" if left_s else "failed")


def test_a_wall_clock_that_jumps_changes_nothing_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = Moment.now()
    monkeypatch.setattr("time.time", lambda: moment.wall_s + 1e9)
    assert moment.elapsed_s() < 60
    monkeypatch.setattr("time.time", lambda: moment.wall_s - 1e9)
    assert 0 <= moment.elapsed_s() < 60
    other = dataclasses.replace(moment, boot="another")
    assert other.elapsed_s() == 0


def test_results_of_another_machine_do_not_expire_by_its_clock(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    board, runs = boards()
    job = accept(board)
    ended(board, job)
    until(lambda: not record(store, job).open)
    end = record(store, job).ended
    assert end is not None
    rewrite(store, job, ended=dataclasses.replace(end, boot="another", wall_s=end.wall_s - 7200))
    board.close()
    runs.close()
    board, runs = boards(ttl_s=1.0)
    time.sleep(0.3)
    assert board.status(job, ME).state == "done", "an hour ago by a foreign clock is not believed"
    until(lambda: board.status(job, ME).state == "expired")


def test_a_full_queue_leaves_the_rest_to_others_and_new_jobs_wait_their_turn(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    first, runs = boards(paused=True)
    jobs = [accept(first, str(each)) for each in range(4)]
    first.close()
    runs.close()
    small, few = boards(limit=2, paused=True)
    until(lambda: len(few.submitted) == 2)
    until(lambda: _refuses(lambda: accept(small, "new")))
    adopted = [record(store, id).adoptions for id in jobs]
    until(lambda: [record(store, id).adoptions for id in jobs] == [1, 1, 0, 0])
    assert sum(adopted) <= 3
    second, _ = boards()
    assert [ended(second, id).state for id in jobs[2:]] == ["done"] * 2
    few.gate.set()
    assert [ended(small, id).state for id in jobs[:2]] == ["done"] * 2
    until(lambda: not _refuses(lambda: accept(small, "new")))


def test_what_was_accepted_before_goes_first(
    boards: Boards, accept: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, runs = boards(paused=True)
    jobs = [accept(first, str(each)) for each in range(3)]
    first.close()
    runs.close()
    monkeypatch.setattr("latentrelay.cloud.recovery._RETRY_S", 5.0)
    second, few = boards(limit=1, paused=True)
    until(lambda: second._recovery is not None and second._recovery.behind == 2)
    few._limit = 64
    assert _refuses(lambda: accept(second, "newer")), "there is room, and older jobs wait for it"
    few.gate.set()
    assert [ended(second, id).state for id in jobs] == ["done"] * 3
    assert not _refuses(lambda: accept(second, "newest"))


def _refuses(act: Callable[[], object]) -> bool:
    try:
        act()
    except QueueFullError:
        return True
    return False


def test_a_job_too_large_for_every_replica_fails_in_the_end_and_holds_up_nobody(
    store: FolderStore, boards: Boards, accept: Callable[..., str], monkeypatch: pytest.MonkeyPatch, thread_runs: Any
) -> None:
    monkeypatch.setattr("latentrelay.cloud.recovery._RETRY_S", 0.01)
    monkeypatch.setattr("latentrelay.cloud.recovery._REFUSALS", 20)
    board, runs = boards(paused=True)
    large, small = accept(board, "large"), accept(board, "small")
    board.close()
    runs.close()
    taken = thread_runs.ThreadRuns.submit

    def submit(self: Any, request: Any, **rest: Any) -> Any:
        if request.prompt == "large":
            raise MemoryRefusedError("no", retry_after_s=1)
        return taken(self, request, **rest)

    monkeypatch.setattr(thread_runs.ThreadRuns, "submit", submit)
    board, runs = boards()
    assert ended(board, small).state == "done"
    status = ended(board, large)
    assert (status.problem or {})["type"].endswith("memory")
    assert status.attempts == 1


def test_draining_gives_what_waits_to_others_and_finishes_what_runs(boards: Boards, accept: Callable[..., str]) -> None:
    first, runs = boards(paused=True)
    running, waiting = accept(first, "runs"), accept(first, "waits")
    until(lambda: first.status(running, ME).state == "running")
    second, others = boards()
    first.drain()
    assert ended(second, waiting).state == "done"
    runs.gate.set()
    first.close(drain_s=60)
    assert second.status(running, ME).state == "done"
    assert [ticket.request.prompt for ticket in others.submitted] == ["waits"]
    with pytest.raises(ProblemError):
        first.blob("0" * 32, ME)


def test_draining_alone_leaves_what_waits_to_the_next_process(boards: Boards, accept: Callable[..., str]) -> None:
    first, runs = boards(paused=True)
    running, waiting = accept(first, "runs"), accept(first, "waits")
    until(lambda: first.status(running, ME).state == "running")
    first.drain()
    time.sleep(0.1)
    assert len(runs.submitted) == 2, "it does not adopt its own"
    runs.gate.set()
    first.close(drain_s=60)
    second, _ = boards()
    assert second.status(running, ME).state == "done"
    assert ended(second, waiting).state == "done"


def test_a_request_that_cannot_be_read_any_more_fails_its_job(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    board, runs = boards(paused=True)
    job = accept(board)
    board.close()
    runs.close()
    rewrite(store, job, request='{"prompt":7}')
    board, _ = boards()
    status = ended(board, job)
    assert (status.problem or {})["type"].endswith("request-unreadable")


def test_a_replica_taken_for_dead_brings_its_result_all_the_same(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    """Its registration vanished for a moment (a wiped folder); another replica adopted; the first to finish wins."""
    first, runs = boards(paused=True, poll_s=30.0)
    job = accept(first)
    until(lambda: first.status(job, ME).state == "running")
    for owner in store.owners():
        (store.folder / "owner" / owner).unlink()
    second, others = boards(paused=True)
    until(lambda: record(store, job).adoptions == 1)
    runs.gate.set()
    assert ended(first, job).state == "done"
    assert ended(second, job).state == "done"
    etag = second.status(job, ME).etag
    others.gate.set()
    until(lambda: second.open_jobs(ME) == 0)
    assert record(store, job).etag == etag


class Process:
    """tests/cloud/thread_runs.py in a process of its own."""

    def __init__(self, module: Any, folder: Path, *options: str) -> None:
        command = [sys.executable, module.__file__, str(folder), *options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def __call__(self, name: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self.gone()

    def gone(self) -> int:
        status = self._process.wait(60)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]
        return status


@pytest.fixture
def processes(thread_runs: Any, store: FolderStore) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(*options: str) -> Process:
        made.append(Process(thread_runs, store.folder, *options))
        return made[-1]

    yield start
    for each in made:
        each.kill()


def test_a_killed_process_loses_nothing(
    store: FolderStore, thread_runs: Any, processes: Callable[..., Process]
) -> None:
    first = processes("--step-s", "0.05")
    texts = [thread_runs.body(f"number {each}").decode() for each in range(4)]
    jobs = [first("accept", text=text, key=str(each))["id"] for each, text in enumerate(texts)]
    until(lambda: first("status", id=jobs[0])["step"] > 0)
    first.kill()
    second = processes()
    until(lambda: all(second("status", id=id)["state"] == "done" for id in jobs))
    assert second("accept", text=texts[0], key="0") == {"id": jobs[0], "replayed": True}
    assert second("accept", text=texts[1], key="0") == {"error": "idempotency-key-reused"}
    expected = [thread_runs.handoff(thread_runs.parsed(text.encode())).digest() for text in texts]
    assert [second("blob", id=id) for id in jobs] == expected
    assert sorted(second("prompts")) <= [f"number {each}" for each in range(4)]
    until(lambda: not any(b"number" in path.read_bytes() for path in store.folder.rglob("*") if path.is_file()))


def test_the_living_share_the_jobs_of_the_killed(thread_runs: Any, processes: Callable[..., Process]) -> None:
    first, *others = processes("--step-s", "30"), processes(), processes()
    jobs = [first("accept", text=thread_runs.body(str(each)).decode(), key=str(each))["id"] for each in range(10)]
    first.kill()
    until(lambda: all(others[0]("status", id=id)["state"] == "done" for id in jobs))
    assert sorted(others[0]("prompts") + others[1]("prompts")) == sorted(map(str, range(10))), "each by one of them"


def test_a_job_that_kills_its_process_is_given_up(thread_runs: Any, processes: Callable[..., Process]) -> None:
    process = processes()
    text = thread_runs.body("die").decode()
    job = process("accept", text=text, key="k")["id"]
    deaths = 0
    while (status := process("status", id=job)) is None or status["state"] != "failed":
        if status is None:
            assert process.gone() == -9
            deaths += 1
            process = processes()
        time.sleep(0.01)
    assert 3 <= deaths <= 6, "a death before the first step was noted is not counted at once"
    assert status["problem"]["type"].endswith("run-interrupted")
    other = process("accept", text=thread_runs.body("live").decode(), key="l")["id"]
    until(lambda: process("status", id=other)["state"] == "done")


def test_accepting_survives_kills_at_any_moment(
    thread_runs: Any, processes: Callable[..., Process], store: FolderStore
) -> None:
    """Kill a process again and again while it accepts; whatever it answered with is done in the end."""
    answered: list[str] = []
    for round in range(4):
        process = processes("--places", "2")
        for each in range(3 + round):
            answer = process("accept", text=thread_runs.body(f"{round} {each}").decode(), key=f"{round} {each}")
            answered.append(answer["id"])
        process.kill()
    last = processes()
    until(lambda: all(last("status", id=id)["state"] in ("done", "failed") for id in answered))
    assert len(set(answered)) == 3 + 4 + 5 + 6
    statuses = [last("status", id=id) for id in answered]
    assert {status["attempts"] for status in statuses if status["state"] == "failed"} <= {3}
    assert statuses[-1]["state"] == "done"
    until(lambda: store.keys("progress") == [])
