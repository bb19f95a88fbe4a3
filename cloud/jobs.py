"""The job board: what is accepted is in the store before the answer, runs to its end, and is remembered for a while.

In: parsed requests with their documents, from HTTP. Out: statuses, and the bytes of handoffs. A request with the same
owner and idempotency key is the same job, in every replica. A board that dies leaves its jobs to the next process or to
another replica on the same store (recovery.py); what runs here is in live_jobs.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from latentrelay.cloud import logs
from latentrelay.cloud.doorbell import Doorbell
from latentrelay.cloud.errors import DrainingError, ProblemError, QueueFullError, RefusedError, ServiceError
from latentrelay.cloud.job_ledger import Entry, JobLedger, content_key
from latentrelay.cloud.job_problems import other_model, result_lost
from latentrelay.cloud.job_record import JobRecord, JobStatus, Moment, fingerprint, job_id, same_body
from latentrelay.cloud.job_runs import JobObserver, JobOptions, Report, Runs, RunTicket
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.live_jobs import LiveJob, LiveJobs, overdue, status_of
from latentrelay.cloud.recovery import Recovery
from latentrelay.cloud.requests import RunRequest, parse_request
from latentrelay.cloud.store import Registration, Store

__all__ = ["Accepted", "JobBoard", "JobObserver", "JobOptions", "JobStatus", "Report", "RunTicket", "Runs"]

_log = logging.getLogger("latentrelay.cloud")
_ID = re.compile(r"[0-9a-f]{32}")
_SETTLE_S = 2.0  # how long a replayed key waits to hear that the first request was taken on
_ANY = 2**62
_NO_LIMITS = Limits(_ANY, _ANY, _ANY, _ANY, float(_ANY), _ANY)  # a recorded request was within its own service's


@dataclass(frozen=True)
class Accepted:
    """The job's id; `replayed` where the key was known already."""

    id: str
    replayed: bool


class JobBoard:
    """Every method may be called from any thread, `wait` from any event loop. `accept` and `cancel` wait for the disk
    (about a millisecond), `status` and `blob` read it; in a service they belong on a thread."""

    def __init__(
        self,
        store: Store,
        runs: Runs,
        *,
        options: JobOptions | None = None,
        observer: JobObserver | None = None,
        model: str = "",
        parse: Callable[[bytes], RunRequest] | None = None,
    ) -> None:
        """model: names everything about the service that decides a result's bytes (model digest, default sampler,
        compute precision): boards with different ones may share a store, and leave each other's jobs alone; "" switches
        the cache of results off. parse: reads the requests of adopted jobs."""
        self._store, self._runs, self._observer, self._model = store, runs, observer, model
        self._options = options or JobOptions()
        self._parse = parse or (lambda body: parse_request(body, _NO_LIMITS))
        self._ledger = JobLedger(store)
        self._bell = Doorbell()
        self._live = LiveJobs(self._ledger, runs, self._bell, self._options, observer)
        self._registration: Registration | None = None
        self._recovery: Recovery | None = None
        self._thread = threading.Thread(target=self._watch, name="latentrelay-job-board", daemon=True)
        self._stopped = threading.Event()
        self._closing = False

    def start(self) -> None:
        """Register, and start the threads: jobs of dead runners are adopted from now on, beginning at once.

        Raises StoreFullError or StoreUnavailableError where the store cannot be written.
        """
        self._registration = self._store.register(secrets.token_hex(16))
        self._recovery = Recovery(
            self._ledger,
            self._live,
            self._bell,
            self._registration,
            self._options,
            self._observer,
            self._parse,
            model=self._model,
        )
        self._live.start()
        self._thread.start()

    def drain(self) -> None:
        """Take nothing new, and give what waits to other replicas, or the next process, of the same model; what runs
        goes on."""
        self._closing = True
        if self._recovery is not None:
            self._recovery.adopting = False
        with contextlib.suppress(RefusedError):
            self._live.hand_back()
            self._store.register(secrets.token_hex(16)).release()  # a dead runner: whoever sees it looks for jobs

    def close(self, *, drain_s: float = 0.0) -> None:
        """Take nothing new; with drain_s wait so long for what runs; leave the rest to the next process or replica.

        Runs that are cancelled here are not recorded as cancelled. Call it before the runner is closed.
        """
        self._closing = True
        if drain_s > 0:
            self.drain()
            until = time.monotonic() + drain_s
            while time.monotonic() < until and any(live.ended is None for live in self._live.all()):
                time.sleep(0.01)
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        self._live.leave()
        self._live.close()
        if self._registration is not None:
            self._registration.release()

    def accept(
        self, request: RunRequest, document: bytes, *, owner: str, key: str | None = None, trace: str | None = None
    ) -> Accepted:
        """Record the job and have it run; or the job of an earlier request with the same owner and key.

        Raises ProblemError (422 idempotency-key-reused where the body is another one; 409 other-model where the job is
        another model's; what the runner says of the request) and RefusedError (the queue, the memory, the deadline, the
        store); then nothing was accepted.
        """
        id = job_id(owner, key if key is not None else secrets.token_hex(32))
        until = time.monotonic() + _SETTLE_S
        while True:
            known = self._known(id, until)
            if known is not None:
                if not same_body(known.fingerprint, document):
                    raise _reused()
                if not known.made_by(self._model):
                    raise other_model()
                self._count(replayed=True)
                return Accepted(id, True)
            if self._accepted(id, request, document, owner, trace):
                self._count(replayed=False)
                return Accepted(id, False)

    def status(self, id: str, owner: str) -> JobStatus:
        """The job's status. Raises ProblemError: 404 unknown-handoff for an id that is none of this owner's."""
        live = self._live.get(id)
        if live is not None and live.settled.is_set():
            self._check_owner(live.record, owner)
            return live.status(self._options.ttl_s)
        record = self._read(id, owner).record
        note = self._ledger.progress(id) if record.open else None
        if note is None or note.runner != record.runner:
            return status_of(record, self._options.ttl_s)
        return dataclasses.replace(status_of(record, self._options.ttl_s, step=note.step), preview=note.picture())

    async def wait(self, id: str, owner: str, *, seen: int | None = None, timeout_s: float) -> JobStatus:
        """The first status whose version is not `seen` (None: that is the job's last), or the one when the time is up.

        Jobs of this replica wake their waiters; others are looked at every poll_s, once for all who wait.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while True:
            bell = self._bell.listen(id, for_end=seen is None)
            try:
                status = await self._looked(id, owner)
                left = until - loop.time()
                if left <= 0 or (status.ended if seen is None else status.version != seen):
                    return status
                await asyncio.wait([bell], timeout=left)
            finally:
                self._bell.leave(id, bell)

    def blob(self, id: str, owner: str) -> tuple[str, bytes]:
        """(etag, bytes) of a job that is done; else ProblemError: the job's own, 410, or 409 not-done.

        A blob that is damaged or gone ends the job as failed (410 result-lost): its request is no longer known.
        """
        live = self._live.get(id)
        if live is not None:
            self._check_owner(live.record, owner)
            ended, blob = live.ended, live.blob  # no lock: it is held while the end is being written
            if ended is not None and ended.etag is not None and blob is not None:
                return ended.etag, blob
            if live.ended is not None:
                raise _no_blob(status_of(live.ended, self._options.ttl_s))
        entry = self._read(id, owner)
        record = entry.record
        status = status_of(record, self._options.ttl_s)
        if status.state != "done" or record.etag is None:
            raise _no_blob(status)
        blob = self._store.read_blob(record.etag)
        if blob is None:
            self._lose(entry)
            raise result_lost()
        return record.etag, blob

    def cancel(self, id: str, owner: str) -> JobStatus:
        """Cancel a job, or forget the result of a finished one; nothing more where that was done before.

        Raises ProblemError 404, and StoreFullError or StoreUnavailableError for a job of another replica.
        """
        live = self._live.get(id)
        if live is not None:
            self._check_owner(live.record, owner)
            live.settled.wait(_SETTLE_S)
            if self._live.cancel(live):
                return live.status(self._options.ttl_s)
        while True:
            entry = self._read(id, owner)
            if self._ended_by(entry):
                return self.status(id, owner)

    def open_jobs(self, owner: str) -> int:
        """How many jobs of an owner are not ended: of this replica all, of others those seen at the last sweep, or
        with record_first those that have a note of their progress now."""
        here = sum(live.record.owner == owner and live.ended is None for live in self._live.all())
        if self._options.record_first:
            return here + self._noted_elsewhere(owner)
        return here + (0 if self._recovery is None else self._recovery.open_elsewhere(owner))

    def _noted_elsewhere(self, owner: str) -> int:
        entries = [self._ledger.read(id) for id in self._ledger.progress_notes() if self._live.get(id) is None]
        return sum(entry is not None and entry.record.open and entry.record.owner == owner for entry in entries)

    def _known(self, id: str, until: float) -> JobRecord | None:
        """The job's record, once it is sure that it was taken on; None where there is none, or it was refused."""
        while True:
            live = self._live.get(id)
            if live is not None:
                live.settled.wait(max(0.0, until - time.monotonic()))
                if self._live.get(id) is live:
                    return live.record
            entry = self._ledger.read(id)
            if entry is None:
                return None
            record = entry.record
            if (
                not record.open
                or self._ledger.progress(id) is not None
                or not self._store.alive(record.runner)
                or time.monotonic() >= until
            ):
                return record
            time.sleep(0.005)  # another replica has recorded it and is about to submit or to refuse it

    def _accepted(self, id: str, request: RunRequest, document: bytes, owner: str, trace: str | None) -> bool:
        """Record and submit; False where somebody else has recorded the id meanwhile."""
        registration = self._admitting()
        seconds = request.deadline_ms / 1000 if request.deadline_ms is not None else self._options.deadline_s
        content = content_key(request, owner=owner, model=self._model) if self._caching else None
        record = JobRecord(
            id=id,
            owner=owner,
            state="queued",
            runner=registration.owner,
            fingerprint=fingerprint(document),
            request=document.decode(),
            split=request.split,
            num_steps=request.num_steps,
            accepted=Moment.now(),
            deadline_s=seconds,
            trace=trace,
            content=content,
            model=self._model,
        )
        ready = self._from_cache(record)
        if ready is not None:
            created = self._ledger.create(Entry.of(ready))
            if created:
                self._live.tell(ready)
            return created
        entry = Entry.of(record)
        live = self._live.reserve(entry, request)
        if live is None:
            return False
        try:
            if not self._ledger.create(entry):
                self._live.abandon(live)
                return False
            self._live.submit(live)
        except BaseException:
            self._refused(live)
            raise
        return True

    @property
    def _caching(self) -> bool:
        return self._options.cache and bool(self._model)

    def _admitting(self) -> Registration:
        if self._registration is None:
            raise ServiceError("the job board takes nothing on", got="no call of start()", do="Call start() first.")
        if self._closing:
            raise DrainingError("the service is ending", retry_after_s=1)
        behind = 0 if self._recovery is None else self._recovery.behind
        if behind:  # adopted jobs were accepted before, so they go first
            raise QueueFullError(behind, 1)
        self._registration.hold()
        return self._registration

    def _refused(self, live: LiveJob) -> None:
        """Nothing was accepted: as if the request had never come."""
        with contextlib.suppress(RefusedError):
            self._ledger.remove(live.entry)
        self._live.abandon(live)

    def _from_cache(self, record: JobRecord) -> JobRecord | None:
        """The record of the job as done already, where the same content was computed before and is still whole."""
        if record.content is None:
            return None
        result = self._ledger.cached(record.content)
        hit = (
            result is not None
            and not overdue(result.made, self._options.ttl_s)
            and self._store.read_blob(result.etag) is not None
        )
        if self._observer is not None:
            self._observer.cache("job", hit)
        if result is None or not hit:
            return None
        return record.end("done", etag=result.etag, size=result.size, next_step=result.next_step, cloud_ms=0.0)

    def _count(self, *, replayed: bool) -> None:
        if self._observer is not None:
            self._observer.job_accepted(replayed)

    async def _looked(self, id: str, owner: str) -> JobStatus:
        """The status: from memory at once, from the store on a thread."""
        live = self._live.get(id)
        if live is not None and live.settled.is_set():
            return self.status(id, owner)
        return await asyncio.to_thread(self.status, id, owner)

    def _read(self, id: str, owner: str) -> Entry:
        entry = self._ledger.read(id) if _ID.fullmatch(id) else None
        if entry is None:
            raise _unknown()
        self._check_owner(entry.record, owner)
        return entry

    def _check_owner(self, record: JobRecord, owner: str) -> None:
        """Raise the 404 that does not tell whether the id exists."""
        if record.owner != owner:
            raise _unknown()

    def _ended_by(self, entry: Entry) -> bool:
        """Cancel a job that does not run here, or forget its result; False where the record has changed meanwhile."""
        record = entry.record
        if record.open:
            after = self._ledger.swap(entry, record.end("cancelled"))
            if after is None:
                return False
            self._ledger.ask_to_cancel(record.id)
            self._live.tell(after.record)
        elif record.state == "done":
            if self._ledger.swap(entry, record.past("deleted")) is None:
                return False
            if record.content is not None:
                self._ledger.uncache(record.content)
            self._runs.forget(record.owner)  # all of the owner's, as the record does not hold the request any more
        self._bell.ring(record.id)
        return True

    def _lose(self, entry: Entry) -> None:
        """The blob of a job is not what it was: nobody is served with it, now or from the cache."""
        record = entry.record
        logs.event(_log, "a result is damaged or gone", level=logging.ERROR, job=record.id)
        with contextlib.suppress(RefusedError):
            self._ledger.swap(entry, record.past("failed").with_problem(result_lost().document()))
            if record.content is not None:
                self._ledger.uncache(record.content)
            if record.etag is not None:
                self._store.delete_blob(record.etag)

    def _watch(self) -> None:
        """The thread that adopts, ends and removes."""
        if self._recovery is None:
            return
        while True:
            try:
                self._recovery.poll()
            except RefusedError as error:
                logs.event(_log, "the store could not be looked at", level=logging.WARNING, why=error.kind)
            except Exception as error:
                logs.event(
                    _log, "the job board went on after an error", level=logging.ERROR, error=type(error).__name__
                )
            if self._stopped.wait(self._options.poll_s):
                return


def _unknown() -> ProblemError:
    return ProblemError(404, "unknown-handoff", "There is no such handoff here.")


def _reused() -> ProblemError:
    return ProblemError(
        422,
        "idempotency-key-reused",
        "This Idempotency-Key was sent before with another body.",
        field="idempotency-key",
        received="another body",
        wanted="the same body, or a new key",
    )


def _no_blob(status: JobStatus) -> ProblemError:
    """Why there are no bytes."""
    if status.problem is not None:
        facts = status.problem
        kind = str(facts.get("type", "")).rpartition(":")[2]
        return ProblemError(int(facts.get("status", 500)), kind, str(facts.get("detail", "")))
    if status.ended:
        return ProblemError(410, status.state, "There is no result, or it is no longer kept.")
    return ProblemError(409, "not-done", "The job has not ended yet.")
