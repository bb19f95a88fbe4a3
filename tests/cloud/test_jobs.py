"""One job board on one store: accepted is recorded, the same key is the same job, ends are final, prompts go."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from latentrelay.cloud.errors import DrainingError, MemoryRefusedError, ProblemError, RefusedError, ServiceError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.job_ledger import JobLedger
from latentrelay.cloud.job_record import JobStatus
from latentrelay.cloud.jobs import Accepted, JobBoard, JobOptions
from latentrelay.cloud.store import StoreFullError
from latentrelay.runtime.handoff import Handoff

ALICE, BOB = "alice", "bob"


class Desk:
    """A board with its runner and store; every call has a document's worth of defaults."""

    def __init__(self, module: Any, folder: Path, **options: Any) -> None:
        self.module = module
        self.store = FolderStore(folder)
        self.runs = module.ThreadRuns()
        self.told: list[tuple[Any, ...]] = []
        self.board = JobBoard(
            self.store,
            self.runs,
            options=JobOptions(**{"poll_s": 0.02, **options}),
            observer=self,
            model=options.pop("model", "m"),
        )
        self.board.start()

    def accept(self, prompt: str = "a fox", *, key: str | None = None, owner: str = ALICE, **facts: Any) -> Accepted:
        document = self.module.body(prompt, **facts)
        return self.board.accept(self.module.parsed(document), document, owner=owner, key=key)

    def ended(self, id: str, owner: str = ALICE) -> JobStatus:
        status = asyncio.run(self.board.wait(id, owner, timeout_s=60))
        assert status.ended
        return status

    def until(self, holds: Callable[[], object]) -> None:
        """Wait for something that another thread does."""
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, "it did not come"
            time.sleep(0.01)

    def on_disk(self, text: str) -> bool:
        return any(text.encode() in path.read_bytes() for path in self.store.folder.rglob("*") if path.is_file())

    def settled(self, id: str) -> None:
        """Wait until the end of a job is in the store too."""
        ledger = JobLedger(self.store)
        self.until(lambda: (entry := ledger.read(id)) is not None and not entry.record.open)
        self.until(lambda: self.board._live.get(id) is None)

    def job_accepted(self, replayed: bool) -> None:
        self.told.append(("accepted", replayed))

    def job_ended(self, state: str, seconds: float | None = None) -> None:
        self.told.append(("ended", state))

    def job_recovered(self) -> None:
        self.told.append(("recovered",))

    def cache(self, kind: str, hit: bool) -> None:
        self.told.append((kind, hit))

    def close(self) -> None:
        self.board.close()
        self.runs.close()


@pytest.fixture
def make(thread_runs: Any, tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    desks: list[Desk] = []

    def made(**options: Any) -> Desk:
        desks.append(Desk(thread_runs, tmp_path / "store", **options))
        return desks[-1]

    yield made
    for each in desks:
        each.close()


@pytest.fixture
def desk(make: Callable[..., Desk]) -> Desk:
    return make()


def test_an_accepted_job_is_recorded_runs_and_is_served(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept("a fox in the snow")
    assert not job.replayed
    entry = JobLedger(desk.store).read(job.id)
    assert entry is not None
    assert "a fox in the snow" in (entry.record.request or "")
    assert desk.board.status(job.id, ALICE).state in ("queued", "running")
    desk.runs.gate.set()
    status = desk.ended(job.id)
    assert (status.state, status.step, status.next_step, status.attempts) == ("done", 4, 4, 1)
    etag, blob = desk.board.blob(job.id, ALICE)
    assert (status.etag, status.size) == (etag, len(blob))
    assert Handoff.from_bytes(blob) == desk.module.handoff(desk.runs.submitted[0].request)
    desk.settled(job.id)
    assert desk.board.blob(job.id, ALICE) == (etag, blob)
    again = desk.board.status(job.id, ALICE)
    assert again.version == status.version
    assert 590 < (again.expires_in_s or 0) <= 600


def test_the_prompt_leaves_the_disk_when_the_job_ends(desk: Desk) -> None:
    desk.runs.gate.clear()
    jobs = [desk.accept(f"a secret number {each}") for each in range(3)]
    assert desk.on_disk("a secret number")
    desk.board.cancel(jobs[2].id, ALICE)
    desk.runs.gate.set()
    for job in jobs:
        desk.ended(job.id)
        desk.settled(job.id)
    assert not desk.on_disk("a secret number")


def test_the_same_key_is_the_same_job(desk: Desk) -> None:
    first = desk.accept(key="k")
    assert desk.accept(key="k") == Accepted(first.id, True)
    desk.ended(first.id)
    desk.settled(first.id)
    assert desk.accept(key="k") == Accepted(first.id, True)
    assert desk.accept(key="k", owner=BOB).id != first.id
    assert desk.accept(key="l").id != first.id
    assert desk.accept().id != desk.accept().id
    with pytest.raises(ProblemError) as caught:
        desk.accept("another", key="k")
    assert (caught.value.status, caught.value.kind) == (422, "idempotency-key-reused")
    assert desk.told.count(("accepted", True)) == 2


def test_a_body_written_otherwise_is_the_same_body(desk: Desk) -> None:
    request = desk.module.parsed(desk.module.body())
    first = desk.board.accept(request, desk.module.body(), owner=ALICE, key="k")
    spaced = desk.module.body().replace(b",", b",  ").replace(b"{", b"{\n")
    assert desk.board.accept(request, spaced, owner=ALICE, key="k") == Accepted(first.id, True)


def test_one_key_from_many_threads_runs_once(desk: Desk) -> None:
    jobs: list[Accepted] = []
    threads = [threading.Thread(target=lambda: jobs.append(desk.accept(key="k"))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len({job.id for job in jobs}) == 1
    assert [job.replayed for job in jobs].count(False) == 1
    desk.ended(jobs[0].id)
    assert len(desk.runs.submitted) == 1


def test_nobody_sees_the_jobs_of_others(desk: Desk) -> None:
    job = desk.accept()
    desk.ended(job.id)
    for id, owner in ((job.id, BOB), ("0" * 32, ALICE), ("../job", ALICE), ("", ALICE), (job.id.upper() + "\n", ALICE)):
        for act in (desk.board.status, desk.board.blob, desk.board.cancel):
            with pytest.raises(ProblemError) as caught:
                act(id, owner)
            assert (caught.value.status, caught.value.kind) == (404, "unknown-handoff")
        with pytest.raises(ProblemError):
            asyncio.run(desk.board.wait(id, owner, timeout_s=0))


@pytest.mark.parametrize(
    "refusal", [MemoryRefusedError("no", retry_after_s=1), ProblemError(422, "invalid-request", "no")]
)
def test_what_the_runner_refuses_was_never_accepted(desk: Desk, refusal: Exception) -> None:
    desk.runs.refusal = refusal
    with pytest.raises(type(refusal)):
        desk.accept("a secret", key="k")
    assert JobLedger(desk.store).ids() == []
    assert not desk.on_disk("a secret")
    assert desk.board.open_jobs(ALICE) == 0
    desk.runs.refusal = None
    assert not desk.accept("a secret", key="k").replayed


def test_a_queued_job_says_its_place_and_a_running_one_its_step(desk: Desk) -> None:
    desk.runs.gate.clear()
    first, second, third = (desk.accept(str(each), preview=True) for each in range(3))
    desk.until(lambda: desk.board.status(first.id, ALICE).state == "running")
    assert [desk.board.status(job.id, ALICE).queue_position for job in (first, second, third)] == [None, 0, 1]
    assert desk.board.open_jobs(ALICE) == 3
    desk.runs.gate.set()
    assert desk.ended(third.id).state == "done"
    desk.until(lambda: desk.board.open_jobs(ALICE) == 0)


def test_every_change_wakes_who_waits_for_it(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept(preview=True, split=3)

    async def steps() -> list[JobStatus]:
        seen = [desk.board.status(job.id, ALICE)]
        while not seen[-1].ended:
            desk.runs.gate.set()
            seen.append(await desk.board.wait(job.id, ALICE, seen=seen[-1].version, timeout_s=60))
        return seen

    seen = asyncio.run(steps())
    assert len({status.version for status in seen}) == len(seen)
    assert [status.step for status in seen] == sorted(status.step for status in seen)
    assert seen[-1].state == "done"
    assert all(status.preview is None or len(status.preview[2]) == 3 for status in seen)
    assert "preview" not in seen[0].to_dict()


def test_a_wait_ends_when_the_time_is_up(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept()
    assert asyncio.run(desk.board.wait(job.id, ALICE, timeout_s=0.05)).state in ("queued", "running")


def test_a_thousand_waiters_need_no_thread_each(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept()
    others = threading.active_count()  # what other tests have left running is not this one's

    async def all_wait() -> list[JobStatus]:
        waiters = [asyncio.ensure_future(desk.board.wait(job.id, ALICE, timeout_s=60)) for _ in range(1000)]
        await asyncio.sleep(0.05)
        more = threading.active_count() - others
        desk.runs.gate.set()
        statuses = await asyncio.gather(*waiters)
        assert more <= 4 + (os.cpu_count() or 1)  # what the loop keeps for calls that block
        return statuses

    assert {status.state for status in asyncio.run(all_wait())} == {"done"}


def test_cancelling_ends_a_job_at_once_and_for_good(desk: Desk) -> None:
    desk.runs.gate.clear()
    running, queued = desk.accept("one"), desk.accept("two")
    assert desk.board.cancel(queued.id, ALICE).state == "cancelled"
    assert desk.board.cancel(running.id, ALICE).state == "cancelled"
    assert desk.board.cancel(running.id, ALICE).state == "cancelled"
    desk.runs.gate.set()
    last = desk.accept("three")
    desk.ended(last.id)
    assert desk.board.status(running.id, ALICE).state == "cancelled"
    assert desk.runs.finished == 1
    assert desk.told.count(("ended", "cancelled")) == 2
    with pytest.raises(ProblemError) as caught:
        desk.board.blob(running.id, ALICE)
    assert (caught.value.status, caught.value.kind) == (410, "cancelled")


def test_deleting_a_result_takes_it_from_the_cache_too(desk: Desk) -> None:
    job = desk.accept()
    desk.ended(job.id)
    desk.settled(job.id)
    assert desk.board.cancel(job.id, ALICE).state == "deleted"
    assert desk.board.cancel(job.id, ALICE).to_dict()["etag"] is None
    with pytest.raises(ProblemError) as caught:
        desk.board.blob(job.id, ALICE)
    assert (caught.value.status, caught.value.kind) == (410, "deleted")
    desk.ended(desk.accept().id)
    assert desk.runs.finished == 2


@pytest.mark.parametrize(
    ("prompt", "deadline_ms", "status", "kind"),
    [("break", None, 500, "run-failed"), ("too large", None, 500, "run-failed"), ("slow", 1, 504, "deadline-passed")],
)
def test_a_failed_run_fails_its_job(desk: Desk, prompt: str, deadline_ms: int | None, status: int, kind: str) -> None:
    desk.runs.gate.clear()
    job = desk.accept(prompt, deadline_ms=deadline_ms)
    time.sleep(0.05)
    desk.runs.gate.set()
    ended = desk.ended(job.id)
    assert ended.state == "failed"
    assert (ended.problem or {})["status"] == status
    assert (ended.problem or {})["type"].endswith(kind)
    assert "secret" not in str(ended.problem)
    desk.settled(job.id)
    with pytest.raises(ProblemError) as caught:
        desk.board.blob(job.id, ALICE)
    assert (caught.value.status, caught.value.kind) == (status, kind)


class Deaf(Future[Any]):
    """A future that forgets whom to tell."""

    def add_done_callback(self, fn: Any) -> None:
        pass


def test_a_run_whose_end_is_lost_fails_after_its_deadline(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrelay.cloud.live_jobs._LATE_S", 0.1)
    monkeypatch.setattr(desk.module, "Future", Deaf)
    lasting, lost = desk.accept("lasting", deadline_ms=600_000), desk.accept("lost", deadline_ms=5000)
    desk.until(lambda: desk.runs.finished == 2)
    ended = desk.ended(lost.id)
    assert (ended.problem or {})["type"].endswith("deadline-passed")
    assert not desk.board.status(lasting.id, ALICE).ended, "its end may still be noted"


def test_an_unfinished_job_has_no_blob(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept()
    with pytest.raises(ProblemError) as caught:
        desk.board.blob(job.id, ALICE)
    assert (caught.value.status, caught.value.kind) == (409, "not-done")


def test_a_second_identical_request_is_done_at_once(desk: Desk) -> None:
    first = desk.accept()
    desk.ended(first.id)
    desk.settled(first.id)
    desk.until(lambda: desk.store.keys("result"))
    second = desk.accept(deadline_ms=5000, preview=True, accept_splits=[2])
    assert desk.board.status(second.id, ALICE).state == "done"
    assert desk.board.blob(second.id, ALICE) == desk.board.blob(first.id, ALICE)
    assert len(desk.runs.submitted) == 1
    desk.board.cancel(first.id, ALICE)
    assert desk.board.status(second.id, ALICE).state == "done"
    for other in ({"seed": 2}, {"wire_versions": ["1.1"]}, {"deterministic": True}, {"owner": BOB}):
        desk.ended(desk.accept(**other).id, str(other.get("owner", ALICE)))
    assert len(desk.runs.submitted) == 5


def test_no_results_are_shared_where_the_cache_is_off(make: Callable[..., Desk]) -> None:
    desk = make(cache=False)
    for _ in range(2):
        job = desk.accept()
        desk.ended(job.id)
        desk.settled(job.id)
    assert len(desk.runs.submitted) == 2
    assert desk.store.keys("result") == []


def test_a_damaged_result_is_served_to_nobody(desk: Desk) -> None:
    job = desk.accept()
    etag = desk.ended(job.id).etag
    desk.settled(job.id)
    desk.until(lambda: desk.store.keys("result"))
    assert etag is not None
    (desk.store.folder / "blob" / etag).write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(ProblemError) as caught:
            desk.board.blob(job.id, ALICE)
        assert (caught.value.status, caught.value.kind) == (410, "result-lost")
    assert desk.board.status(job.id, ALICE).state == "failed"
    assert desk.ended(desk.accept(seed=5).id).state == "done"


def test_a_damaged_result_is_not_shared_but_made_again(desk: Desk) -> None:
    first = desk.accept()
    etag = desk.ended(first.id).etag
    desk.settled(first.id)
    desk.until(lambda: desk.store.keys("result"))
    (desk.store.folder / "blob" / str(etag)).write_bytes(b"damaged")
    second = desk.accept()
    assert desk.ended(second.id).state == "done"
    desk.settled(second.id)
    assert len(desk.runs.submitted) == 2
    assert desk.board.blob(second.id, ALICE) == desk.board.blob(first.id, ALICE), "the same bytes heal the first too"


def test_results_expire_and_are_forgotten_later(make: Callable[..., Desk]) -> None:
    desk = make(ttl_s=0.4, tombstone_s=2.0, grace_s=0.05)
    desk.runs.gate.set()
    job, failing = desk.accept(key="k"), desk.accept("break")
    assert desk.ended(job.id).state == "done"
    desk.until(lambda: desk.board.status(job.id, ALICE).state == "expired")
    with pytest.raises(ProblemError) as caught:
        desk.board.blob(job.id, ALICE)
    assert (caught.value.status, caught.value.kind) == (410, "expired")
    assert desk.accept(key="k").replayed, "an expired job is remembered"
    desk.until(lambda: not list(desk.store.blobs()))
    assert desk.store.keys("result") == []
    desk.until(lambda: desk.store.keys("job") == [])
    for id in (job.id, failing.id):
        with pytest.raises(ProblemError) as caught:
            desk.board.status(id, ALICE)
        assert caught.value.status == 404


def test_blobs_that_are_named_or_not_ours_stay(make: Callable[..., Desk]) -> None:
    desk = make(grace_s=0.05, ttl_s=2.0)
    job = desk.accept()
    etag, _ = desk.board.blob(job.id, ALICE) if desk.ended(job.id) else ("", b"")
    desk.settled(job.id)
    stranger = desk.store.folder / "blob" / "keep.txt"
    stranger.write_text("mine")
    orphan = desk.store.put_blob(b"nobody names it")
    desk.until(lambda: desk.store.read_blob(orphan) is None)
    assert desk.store.read_blob(etag) is not None
    assert stranger.exists()


def test_no_more_than_so_many_jobs_are_remembered(make: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrelay.cloud.recovery._REMEMBERED", 3)
    desk = make(ttl_s=0.3)
    desk.runs.gate.clear()
    jobs = [desk.accept(str(each)).id for each in range(6)]
    for id in jobs[:5]:
        desk.board.cancel(id, ALICE)
    desk.until(lambda: len(desk.store.keys("job")) == 4)
    assert set(jobs[2:]) == set(desk.store.keys("job")), "the oldest go, what is open stays"


def test_leftover_notes_of_progress_are_removed(make: Callable[..., Desk]) -> None:
    desk = make(ttl_s=0.3)
    job = desk.accept().id
    desk.ended(job)
    desk.settled(job)
    ledger = JobLedger(desk.store)
    ledger.note_progress(job, "0" * 32, 1)
    ledger.note_progress("f" * 32, "0" * 32, 1)
    desk.until(lambda: ledger.progress_notes() == [])


def test_a_full_store_accepts_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.write", _no_room)
    with pytest.raises(StoreFullError) as caught:
        desk.accept("a secret")
    assert caught.value.kind == "store-full"
    assert caught.value.retry_after_s >= 1
    monkeypatch.undo()
    assert JobLedger(desk.store).ids() == []
    assert desk.runs.submitted == []
    assert desk.ended(desk.accept().id).state == "done"


def test_a_result_that_cannot_be_written_is_served_from_memory_until_it_can(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.runs.gate.clear()
    job, cancelled, deleted = desk.accept("one"), desk.accept("two"), desk.accept("three")
    monkeypatch.setattr("os.write", _no_room)
    assert desk.board.cancel(cancelled.id, ALICE).state == "cancelled"
    desk.runs.gate.set()
    assert desk.ended(job.id).state == "done"
    assert desk.ended(deleted.id).state == "done"
    assert desk.board.cancel(deleted.id, ALICE).state == "deleted"
    for each, kind in ((deleted, "deleted"), (cancelled, "cancelled")):
        with pytest.raises(ProblemError) as caught:
            desk.board.blob(each.id, ALICE)
        assert (caught.value.status, caught.value.kind) == (410, kind)
    etag, blob = desk.board.blob(job.id, ALICE)
    assert Handoff.from_bytes(blob).digest() == etag
    entry = JobLedger(desk.store).read(job.id)
    assert entry is not None
    assert entry.record.open, "for the next process it would run again"
    monkeypatch.undo()
    for each, state in ((job, "done"), (cancelled, "cancelled"), (deleted, "deleted")):
        desk.settled(each.id)
        assert desk.board.status(each.id, ALICE).state == state
    desk.until(lambda: desk.board.open_jobs(ALICE) == 0)
    assert desk.board.blob(job.id, ALICE) == (etag, blob)


def _no_room(handle: int, data: Any) -> int:
    raise OSError(28, "No space left on device")


def test_a_store_wiped_while_a_job_runs_has_it_again(desk: Desk) -> None:
    desk.runs.gate.clear()
    job, other = desk.accept("one", key="k"), desk.accept("two")
    subprocess.run(["rm", "-rf", desk.store.folder], check=False)
    assert desk.board.status(job.id, ALICE).state in ("queued", "running")
    assert desk.accept("one", key="k").replayed
    desk.runs.gate.set()
    assert desk.ended(job.id).state == "done"
    desk.settled(job.id)
    desk.settled(other.id)
    assert desk.board.blob(job.id, ALICE)[0] == desk.board.status(job.id, ALICE).etag
    subprocess.run(["rm", "-rf", desk.store.folder], check=False)
    with pytest.raises(ProblemError) as caught:
        desk.board.status(job.id, ALICE)
    assert caught.value.status == 404
    assert desk.ended(desk.accept("three").id).state == "done"


def test_a_wiped_store_has_the_jobs_that_still_run_again(make: Callable[..., Desk]) -> None:
    desk = make(ttl_s=1.0)
    desk.runs.gate.clear()
    jobs = {desk.accept("one").id, desk.accept("two").id}
    subprocess.run(["rm", "-rf", desk.store.folder], check=False)
    desk.until(lambda: set(desk.store.keys("job")) == jobs)
    assert desk.on_disk("two"), "another process could finish them"


def test_a_runner_that_gives_up_on_its_own_is_asked_again(desk: Desk) -> None:
    desk.runs.gate.clear()
    job = desk.accept()
    desk.runs.submitted[0].cancel()
    desk.until(lambda: len(desk.runs.submitted) == 2)
    desk.runs.gate.set()
    assert desk.ended(job.id).state == "done"


def test_a_board_that_is_closing_takes_nothing_on(desk: Desk) -> None:
    done = desk.accept()
    desk.ended(done.id)
    desk.board.close()
    with pytest.raises(DrainingError):
        desk.accept()
    assert desk.board.status(done.id, ALICE).state == "done", "what was written stays readable"


def test_a_board_that_was_not_started_takes_nothing_on(thread_runs: Any, tmp_path: Path) -> None:
    board = JobBoard(FolderStore(tmp_path), thread_runs.ThreadRuns())
    document = thread_runs.body()
    with pytest.raises(ServiceError, match="start"):
        board.accept(thread_runs.parsed(document), document, owner=ALICE)
    board.close()


def test_a_damaged_record_is_left_alone_and_stops_nothing(desk: Desk) -> None:
    job = desk.accept(key="k")
    desk.ended(job.id)
    desk.settled(job.id)
    path = desk.store.folder / "job" / job.id
    path.write_bytes(b'{"schema_version":"2.0"}')
    with pytest.raises(RefusedError):
        desk.board.status(job.id, ALICE)
    with pytest.raises(RefusedError):
        desk.accept(key="k")
    JobLedger(desk.store).ask_to_cancel(job.id)
    desk.until(lambda: JobLedger(desk.store).cancel_notes() == [])
    desk.board._recovery.sweep([])  # type: ignore[union-attr]
    assert path.exists()
    assert desk.ended(desk.accept(seed=3).id).state == "done"
