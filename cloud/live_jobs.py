"""The jobs that this replica runs: submitted, watched step by step, recorded when they end.

A few threads write to the store, so that the thread that makes the steps never waits for a disk. A result is served
from memory as soon as it is there and until it is written; until then the store says that the job runs, so that it is
run again should this process die. What cannot be written now (a full disk) is tried again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial

from latentrelay.cloud import logs
from latentrelay.cloud.doorbell import Doorbell
from latentrelay.cloud.errors import RefusedError, RunCancelled
from latentrelay.cloud.job_ledger import CachedResult, Entry, JobLedger
from latentrelay.cloud.job_problems import deadline_passed, interrupted, problem_of
from latentrelay.cloud.job_record import JobRecord, JobStatus, Moment, Preview
from latentrelay.cloud.job_runs import JobObserver, JobOptions, Report, Runs, RunTicket
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.store import StoreFullError, StoreUnavailableError
from latentrelay.runtime.handoff import Handoff

_log = logging.getLogger("latentrelay.cloud")
_WRITERS = 4  # waits for the disk that overlap are one wait for its journal
_LATE_S = 30.0  # how long after its deadline the end of a run that is over is waited for
_UNWRITABLE = (StoreFullError, StoreUnavailableError)


@dataclass(eq=False)
class LiveJob:
    """`entry` is what the store holds; `ended` what it should hold, with `blob`, once the job has ended."""

    entry: Entry
    request: RunRequest
    ticket: RunTicket | None = None
    step: int = 0
    preview: Preview | None = None
    ended: JobRecord | None = None
    blob: bytes | None = None
    noted_s: float = float("-inf")
    given_up: int = 0
    late_s: float | None = None
    settled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def record(self) -> JobRecord:
        """As this replica knows it."""
        return self.ended or self.entry.record

    def status(self, ttl_s: float) -> JobStatus:
        """What a client is told now."""
        if self.ended is not None:
            return status_of(self.ended, ttl_s)
        step, ticket = self.step, self.ticket
        position = 0 if ticket is None else ticket.queue_position()
        waits = step == 0 and position is not None
        return dataclasses.replace(
            status_of(self.entry.record, ttl_s, step=step),
            state="queued" if waits else "running",
            queue_position=position if waits else None,
            preview=self.preview,
        )


class LiveJobs:
    """Every method may be called from any thread."""

    def __init__(
        self, ledger: JobLedger, runs: Runs, bell: Doorbell, options: JobOptions, observer: JobObserver | None
    ) -> None:
        self._ledger, self._runs, self._bell = ledger, runs, bell
        self._options, self._observer = options, observer
        self._lock = threading.Lock()
        self._jobs: dict[str, LiveJob] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._written, name=f"latentrelay-job-writer-{each}", daemon=True)
            for each in range(_WRITERS)
        ]
        self._leaving = False
        self.accompanied = False  # whether other replicas serve the same store: then ends are recorded first

    def start(self) -> None:
        """Start the threads that write."""
        for thread in self._threads:
            thread.start()

    def get(self, id: str) -> LiveJob | None:
        """The job, where it is this replica's and not yet ended in the store."""
        return self._jobs.get(id)

    def all(self) -> list[LiveJob]:
        """Every job of this replica that the store does not know the end of."""
        with self._lock:
            return list(self._jobs.values())

    def reserve(self, entry: Entry, request: RunRequest) -> LiveJob | None:
        """Hold the id in this process, before it is in the store; None where it is held already."""
        with self._lock:
            if entry.record.id in self._jobs:
                return None
            live = self._jobs[entry.record.id] = LiveJob(entry, request)
            return live

    def abandon(self, live: LiveJob) -> None:
        """Let go of a job that is not this replica's, or not any more."""
        with self._lock:
            if self._jobs.get(live.entry.record.id) is live:
                del self._jobs[live.entry.record.id]
        live.settled.set()
        self._bell.ring(live.entry.record.id)

    def submit(self, live: LiveJob) -> None:
        """Have a recorded job run. Raises what `Runs.submit` raises; the job is then still reserved."""
        record = live.entry.record
        ticket = self._runs.submit(
            live.request, deadline_s=record.left_s(), on_step=partial(self._stepped, live), owner=record.owner
        )
        live.ticket = ticket
        live.settled.set()
        ticket.future.add_done_callback(lambda future: self._work.put(partial(self._finish, live, future)))
        if live.ended is not None:  # cancelled between the record and the ticket
            ticket.cancel()
        if self._options.record_first:
            with contextlib.suppress(*_UNWRITABLE):
                self._note(live)  # so that the other replicas count it from now on
        self._bell.ring(record.id, step=True)

    def cancel(self, live: LiveJob) -> bool:
        """End a job as cancelled, or forget the result of one whose end is not written yet; False where it is."""
        with live.lock:
            if self._jobs.get(live.entry.record.id) is not live:
                return False
            if live.ended is None:
                live.ended = live.entry.record.end("cancelled")
            elif live.ended.state == "done":
                live.ended, live.blob = live.ended.past("deleted"), None
        if live.ticket is not None:
            live.ticket.cancel()
        self._runs.forget(live.record.owner)
        self.write(live)
        return True

    def stop(self, live: LiveJob) -> None:
        """End the run of a job that was ended elsewhere, without recording anything."""
        self.abandon(live)
        if live.ticket is not None:
            live.ticket.cancel()

    def fail(self, live: LiveJob, problem: dict[str, object]) -> None:
        """End a job as failed."""
        with live.lock:
            if live.ended is None:
                live.ended = live.entry.record.end("failed", problem=problem)
        live.settled.set()
        self.write(live)

    def write(self, live: LiveJob) -> None:
        """Record the end of a job; if the store cannot take it, keep it for `write_pending`."""
        with live.lock:
            record = live.ended
            if record is None or self._jobs.get(record.id) is not live:
                return
            try:
                ours = self._record_end(live, record)
            except _UNWRITABLE as error:
                logs.event(_log, "a job's end is kept in memory", level=logging.WARNING, job=record.id, why=error.kind)
                self._bell.ring(record.id)
                return
            self.abandon(live)
        if ours:
            self.tell(record)

    def write_pending(self) -> None:
        """Try again what could not be written, and drop what has outlived its time meanwhile."""
        for live in self.all():
            ended = live.ended
            if ended is not None and ended.ended is not None and live.settled.is_set():
                if ended.state == "done" and ended.ended.elapsed_s() >= self._options.ttl_s:
                    with live.lock:
                        live.ended, live.blob = ended.past("expired"), None
                self.write(live)

    def resubmit(self) -> None:
        """Have run again what the runner gave up on its own, while there is room."""
        for live in self.all():
            if live.ticket is None and live.settled.is_set() and live.ended is None and not self._leaving:
                live.given_up += 1
                try:
                    if live.given_up > self._options.max_attempts:
                        raise interrupted()
                    self.submit(live)
                except RefusedError:
                    live.given_up -= 1
                except Exception as error:
                    self.fail(live, problem_of(error))

    def fail_lost(self) -> None:
        """End what nobody will: jobs past their deadline whose run is over and whose end has not been noted since."""
        now = time.monotonic()
        for live in self.all():
            ticket = live.ticket
            over = ticket is not None and ticket.future.done() and live.entry.record.left_s() == 0.0
            if not over or live.ended is not None or self._leaving:
                continue
            live.late_s = now if live.late_s is None else live.late_s
            if now - live.late_s >= _LATE_S:
                logs.event(_log, "a run's end was lost", level=logging.ERROR, job=live.entry.record.id)
                self.fail(live, deadline_passed().document())

    def note_waiting(self) -> None:
        """Tell the other replicas of jobs that were taken on and have not begun."""
        for live in self.all():
            if live.noted_s < 0 and live.ticket is not None:
                live.noted_s = 0.0
                with contextlib.suppress(*_UNWRITABLE):
                    self._note(live)

    def hand_back(self) -> None:
        """Give what waits to whoever takes it: nobody is its runner any more."""
        for live in self.all():
            ticket = live.ticket
            if ticket is None or live.ended is not None or live.step or ticket.queue_position() is None:
                continue
            free = dataclasses.replace(live.entry.record, runner="")
            if self._ledger.swap(live.entry, free) is not None:
                self.stop(live)

    def leave(self) -> None:
        """End every run without recording that it ended: the next process takes them on."""
        self._leaving = True
        for live in self.all():
            if live.ended is None and live.ticket is not None:
                live.ticket.cancel()

    def close(self) -> None:
        """Write what has ended until now, and end the threads."""
        self._leaving = True
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self.write_pending()
        for live in self.all():
            if live.ended is None:  # who takes it on is not told that it was begun: ending is not dying of it
                with contextlib.suppress(*_UNWRITABLE):
                    self._ledger.forget_progress(live.entry.record.id)

    def _written(self) -> None:
        while (task := self._work.get()) is not None:
            try:
                task()
            except _UNWRITABLE:
                continue  # a note; ends look after themselves
            except Exception as error:
                logs.event(
                    _log, "the job writer went on after an error", level=logging.ERROR, error=type(error).__name__
                )

    def _stepped(self, live: LiveJob, report: Report) -> None:
        """On the runner's thread, after every step."""
        live.step = report.step
        if report.preview is not None:
            live.preview = report.preview
        now = time.monotonic()
        if now - live.noted_s >= self._options.progress_s:
            live.noted_s = now
            self._work.put(partial(self._note, live))
        self._bell.ring(live.entry.record.id, step=True)

    def _note(self, live: LiveJob) -> None:
        with live.lock:  # so that a note is never older than the one before, and none comes after the end
            if live.ended is None and self._jobs.get(live.entry.record.id) is live:
                self._ledger.note_progress(live.entry.record.id, live.entry.record.runner, live.step, live.preview)

    def _finish(self, live: LiveJob, future: Future[Handoff]) -> None:
        """On the writer's thread, when a run has ended however it did."""
        id = live.entry.record.id
        if live.ended is not None or self._jobs.get(id) is not live:
            return
        error = future.exception() if not future.cancelled() else CancelledError()
        if error is None:
            try:
                handoff = future.result()
                self._done(live, handoff, handoff.to_bytes())
            except Exception as failure:  # no memory for the bytes: nothing would look at the job again
                logs.event(_log, "a result was lost", level=logging.ERROR, job=id, error=type(failure).__name__)
                self.fail(live, problem_of(failure))
        elif not isinstance(error, (RunCancelled, CancelledError)):
            logs.event(_log, "a run failed", level=logging.ERROR, job=id, error=type(error).__name__)
            self.fail(live, problem_of(error))
        elif not self._leaving:
            live.ticket = None  # the runner gave it up on its own: `resubmit`
        for other in self.all():
            if other.step == 0:
                self._bell.ring(other.entry.record.id, step=True)  # its place in the queue has changed

    def _done(self, live: LiveJob, handoff: Handoff, blob: bytes) -> None:
        etag = digest_of(blob)
        with live.lock:
            if live.ended is not None:
                return
            live.blob = blob
            ended = live.entry.record.end(
                "done",
                etag=etag,
                size=len(blob),
                next_step=handoff.meta.next_step,
                cloud_ms=round(1000 * live.entry.record.accepted.elapsed_s(), 1),
            )
            ours = self._recorded_first(live, ended) if self._options.record_first or self.accompanied else None
            live.ended = ended
        if ours is None:
            self._bell.ring(live.entry.record.id)
            self.write(live)
        elif ours:
            self.tell(ended)

    def _recorded_first(self, live: LiveJob, ended: JobRecord) -> bool | None:
        """Record the end before anybody is told of it; None where the store cannot take it now."""
        try:
            ours = self._record_end(live, ended)
        except _UNWRITABLE:
            return None
        self.abandon(live)
        return ours

    def _record_end(self, live: LiveJob, record: JobRecord) -> bool:
        """The blob first, then the record that names it; False where another replica ended the job before."""
        if live.blob is not None:
            self._ledger.store.put_blob(live.blob)
        written = self._ledger.swap(live.entry, record)
        while written is None:
            now = self._ledger.read(record.id)
            if now is None:  # the store was wiped; the client may still ask
                written = Entry.of(record) if self._ledger.create(Entry.of(record)) else None
            elif now.record.open:  # another replica took us for dead, and may stop now
                written = self._ledger.swap(now, record)
                self._ledger.ask_to_cancel(record.id)
            else:
                return False
        if record.state == "done" and record.content is not None and record.next_step == record.split:
            self._share(record)
        self._ledger.forget_progress(record.id)
        return True

    def _share(self, record: JobRecord) -> None:
        if record.content is not None and record.etag is not None and record.size is not None and record.ended:
            result = CachedResult(record.etag, record.size, record.split, record.ended)
            self._ledger.cache(record.content, result)

    def tell(self, record: JobRecord) -> None:
        """Metrics and the log: a job has ended, wherever it ran."""
        seconds = record.accepted.elapsed_s()
        if self._observer is not None:
            self._observer.job_ended(record.state, seconds)
        kind = None if record.problem is None else str(record.problem.get("type", "")).rpartition(":")[2]
        logs.event(
            _log,
            "job",
            job=record.id,
            caller=record.owner or None,
            trace=_trace_id(record.trace),
            state=record.state,
            kind=kind,
            attempts=record.attempts,
            ms=1000 * seconds,
        )


def status_of(record: JobRecord, ttl_s: float, *, step: int = 0) -> JobStatus:
    """The status that a record alone tells; `step` is what is known of one that runs. Past ttl_s it is expired."""
    if record.state in ("done", "failed") and record.ended is not None and overdue(record.ended, ttl_s):
        record = record.past("expired")
    elapsed = record.ended.elapsed_s() if record.ended is not None and record.state in ("done", "failed") else None
    if record.state == "done" and record.next_step is not None:
        step = record.next_step
    return JobStatus(
        id=record.id,
        state=("running" if step else "queued") if record.open else record.state,
        split=record.split,
        num_steps=record.num_steps,
        step=step,
        next_step=record.next_step,
        attempts=record.attempts,
        etag=record.etag,
        size=record.size,
        cloud_ms=record.cloud_ms,
        expires_in_s=None if elapsed is None else round(min(ttl_s, max(0.0, ttl_s - elapsed)), 3),
        problem=record.problem,
    )


def overdue(since: Moment, seconds: float, *, watched_s: float = 0.0) -> bool:
    """Whether `seconds` have passed: by this machine's own clock or for as long as this process has watched; a clock on
    another machine's wall may be wrong by up to a day."""
    if since.same_boot:
        return since.elapsed_s() >= seconds
    return watched_s >= seconds or since.elapsed_s() >= seconds + 86_400


def _trace_id(header: str | None) -> str | None:
    parts = (header or "").split("-")
    return parts[1] if len(parts) == 4 else None


def digest_of(blob: bytes) -> str:
    """Bare hex sha256."""
    return hashlib.sha256(blob).hexdigest()
