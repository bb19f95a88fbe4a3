"""What a board does on its own: adopts the jobs of dead runners, ends what is over, removes what nobody needs.

Who is dead the store's registrations say, not a clock. Adopting is one compare-and-swap of the record, so that one
replica alone does it. A job of another model is left to a replica of that model, and fails when its deadline passes:
whoever notices ends it. Results end after their time to live, records after theirs; blobs that no record and no cached
result names are removed when they were seen so twice, a while apart by this process's own clock.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from latentrelay.cloud import logs
from latentrelay.cloud.doorbell import Doorbell
from latentrelay.cloud.errors import DeadlineRefusedError, MemoryRefusedError, ProblemError, RefusedError
from latentrelay.cloud.job_ledger import DamagedRecordError, Entry, JobLedger
from latentrelay.cloud.job_problems import deadline_passed, interrupted, problem_of, unreadable
from latentrelay.cloud.job_record import JobRecord, Moment
from latentrelay.cloud.job_runs import JobObserver, JobOptions
from latentrelay.cloud.live_jobs import LiveJob, LiveJobs, overdue
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.store import Registration, Stamp

_log = logging.getLogger("latentrelay.cloud")
_RETRY_S = 1.0  # between two tries of what the runner or the disk refused
_REMEMBERED = 50_000  # jobs that have ended; beyond, those without a result are forgotten before tombstone_s
_REFUSALS = 60  # a job that does not fit this replica's memory so many times fails


@dataclass(frozen=True, slots=True)
class _Ended:
    """What is remembered of an ended job, so that its record need not be read again before it is due."""

    state: str
    ended: Moment
    etag: str | None
    first_seen_s: float

    @classmethod
    def of(cls, record: JobRecord, first_seen_s: float) -> _Ended:
        """There may be many: equal texts are kept once."""
        moment = record.ended or record.accepted
        moment = dataclasses.replace(moment, boot=sys.intern(moment.boot))
        return cls(sys.intern(record.state), moment, record.etag, first_seen_s)


class Recovery:
    """Called from one thread alone, every poll_s."""

    def __init__(
        self,
        ledger: JobLedger,
        live: LiveJobs,
        bell: Doorbell,
        registration: Registration,
        options: JobOptions,
        observer: JobObserver | None,
        parse: Callable[[bytes], RunRequest],
        *,
        model: str,
    ) -> None:
        self._ledger, self._live, self._bell = ledger, live, bell
        self._me, self._options, self._observer, self._parse = registration, options, observer, parse
        self._model = model
        self._ended: dict[str, _Ended] = {}
        self._orphans: dict[str, tuple[Stamp, float]] = {}
        self._shared: set[str] = set()
        self._results: dict[str, float] = {}
        self._watched: dict[str, tuple[bytes | None, bytes | None]] = {}
        self._damaged: set[str] = set()
        self._refusals: Counter[str] = Counter()
        self._retry_at = self._sweep_at = 0.0
        self._elsewhere: dict[str, str] = {}
        self._left = 0
        self._mourned: set[str] = set()
        self._foreign: set[str] = set()
        self.behind = 0
        self.adopting = True

    def poll(self) -> None:
        """Everything that is due now. Raises what the store raises."""
        self._me.hold()
        self._live.note_waiting()
        self._watch()
        self._read_cancel_notes()
        now = time.monotonic()
        again = now >= self._retry_at
        if again:
            self._retry_at = now + _RETRY_S
            self._live.write_pending()
            self._live.resubmit()
            self._live.fail_lost()
        owners = self._ledger.store.owners()
        dead = [each for each in owners if not self._ledger.store.alive(each)]
        self._live.accompanied = len(owners) - len(dead) > 1
        if now >= self._sweep_at or (again if self._left else not self._mourned.issuperset(dead)):
            self.sweep(dead)

    def sweep(self, dead: list[str]) -> None:
        """Look at every record: adopt what `dead` and forgotten runners left, end what is over, collect blobs."""
        self._sweep_at = time.monotonic() + self._options.sweep_s
        mine = self._live.all()
        notes = self._ledger.progress_notes()  # before the ids: a note is written after its record
        ids = set(self._ledger.ids())
        orphans = self._look_at(ids)
        for id in notes:
            if id in self._ended or id not in ids:
                self._ledger.forget_progress(id)
        self._forget_oldest()
        self._record_again(mine, ids)
        orphans.sort(key=lambda entry: entry.record.accepted.wall_s)
        self._left = self._adopt_all(orphans) if self.adopting else len(orphans)
        if not self._left:
            self._mourned = set(dead) if self._foreign else set()
            for each in () if self._foreign else dead:  # else replicas of the other model learn of it late
                self._ledger.store.forget(each)
        self._collect_results()
        self._collect_blobs()
        self._ledger.store.tidy()

    def open_elsewhere(self, owner: str) -> int:
        """How many of the jobs that other replicas ran at the last sweep are still open."""
        ids = [id for id, whose in self._elsewhere.items() if whose == owner and self._live.get(id) is None]
        entries = [self._understood(id) for id in ids]
        return sum(entry is not None and entry.record.open for entry in entries)

    def _watch(self) -> None:
        """Wake those who wait for a job that runs in another replica, when its record or its progress has changed."""
        waited = [id for id in self._bell.waited_for() if self._live.get(id) is None]
        store = self._ledger.store
        seen = {id: (store.read("job", id), store.read("progress", id)) for id in waited}
        for id, now in seen.items():
            if self._watched.get(id) != now:
                self._bell.ring(id)
        self._watched = seen

    def _read_cancel_notes(self) -> None:
        for id in self._ledger.cancel_notes():
            live, entry = self._live.get(id), self._understood(id)
            if live is not None and entry is not None and not entry.record.open:
                self._live.stop(live)
            if live is not None or entry is None or not self._ledger.store.alive(entry.record.runner):
                self._ledger.forget_cancel(id)

    def _look_at(self, ids: set[str]) -> list[Entry]:
        """Read every record that is not known to be ended and not due; the open ones whose runner is dead."""
        now = time.monotonic()
        known, self._ended = self._ended, {}
        elsewhere: dict[str, str] = {}
        orphans, foreign = [], []
        for id in ids:
            seen = known.get(id)
            if seen is not None and self._due(seen, now) is None:
                self._ended[id] = seen
                continue
            entry = self._understood(id)
            if entry is None:
                continue
            record = entry.record
            if not record.open:
                self._age(entry, seen.first_seen_s if seen is not None else now, now)
            elif self._live.get(id) is None:
                if record.runner != self._me.owner and self._ledger.store.alive(record.runner):
                    elsewhere[id] = record.owner
                elif record.made_by(self._model):
                    orphans.append(entry)
                else:
                    elsewhere[id] = record.owner
                    foreign.append(entry)
        self._elsewhere = elsewhere
        self._leave_to_others(foreign, now)
        return orphans

    def _leave_to_others(self, foreign: list[Entry], now: float) -> None:
        """Jobs of another model that no living replica runs: fail those whose time is over, leave the others."""
        warned, self._foreign = self._foreign, set()
        for entry in foreign:
            record, left_s = entry.record, entry.record.left_s()
            if left_s == 0.0:
                self._fail(entry, deadline_passed())
            elif left_s is None and overdue(record.accepted, self._options.tombstone_s):
                self._fail(entry, interrupted())
            else:
                self._foreign.add(record.id)
                if left_s is not None:
                    self._sweep_at = min(self._sweep_at, now + max(left_s, _RETRY_S))
        if self._foreign - warned:
            logs.event(
                _log,
                "unfinished jobs of another model are left to a replica of that model",
                level=logging.WARNING,
                jobs=len(self._foreign),
            )

    def _understood(self, id: str) -> Entry | None:
        """The record; None, and a line in the log, where this version cannot read it: it is left as it is."""
        try:
            return self._ledger.read(id)
        except DamagedRecordError:
            if id not in self._damaged:
                logs.event(_log, "a job record cannot be understood", level=logging.ERROR, job=id)
                self._damaged.add(id)
            return None

    def _due(self, seen: _Ended, now: float) -> str | None:
        """What has to be done to an ended job: "expire", "remove" or nothing."""
        watched_s = now - seen.first_seen_s
        if overdue(seen.ended, self._options.tombstone_s, watched_s=watched_s):
            return "remove"
        if seen.state in ("done", "failed") and overdue(seen.ended, self._options.ttl_s, watched_s=watched_s):
            return "expire"
        return None

    def _age(self, entry: Entry, first_seen_s: float, now: float) -> None:
        seen = _Ended.of(entry.record, first_seen_s)
        due = self._due(seen, now)
        if due == "remove":
            self._ledger.remove(entry)
            return
        if due == "expire":
            after = self._ledger.swap(entry, entry.record.past("expired"))
            seen = _Ended.of(entry.record if after is None else after.record, first_seen_s)
        self._ended[entry.record.id] = seen

    def _forget_oldest(self) -> None:
        """Remove the oldest jobs without a result where too many are remembered."""
        excess = len(self._ended) - _REMEMBERED
        if excess <= 0:
            return
        past = [(seen.ended.wall_s, id) for id, seen in self._ended.items() if seen.state not in ("done", "failed")]
        for _, id in sorted(past)[:excess]:
            entry = self._understood(id)
            if entry is not None and not entry.record.open:
                self._ledger.remove(entry)
            del self._ended[id]

    def _record_again(self, mine: list[LiveJob], ids: set[str]) -> None:
        """A job that runs here and is not in the store any more: the store was wiped, the job is still accepted."""
        for live in mine:
            id = live.entry.record.id
            if id not in ids and live.settled.is_set() and self._live.get(id) is live and live.ended is None:
                self._ledger.create(live.entry)

    def _adopt_all(self, orphans: list[Entry]) -> int:
        """Take jobs over, the oldest first, while the runner takes them; how many are left."""
        self.behind = too_large = 0
        for place, entry in enumerate(orphans):
            try:
                self._adopt(entry)
            except MemoryRefusedError as error:
                self._refusals[entry.record.id] += 1
                if self._refusals[entry.record.id] >= _REFUSALS:
                    self._fail(entry, ProblemError(503, error.kind, str(error)))
                    del self._refusals[entry.record.id]
                else:
                    too_large += 1
            except RefusedError:
                self.behind = len(orphans) - place
                return self.behind + too_large
        return too_large

    def _adopt(self, entry: Entry) -> None:
        """Take one job over, or end it where it may not be begun again. RefusedError: nothing was changed."""
        record = entry.record
        note = self._ledger.progress(record.id)
        begun = note is not None and note.runner == record.runner and note.step > 0
        taken = record.taken_by(self._me.owner, begun=begun)
        limit = self._options.max_attempts
        if taken.attempts > limit or taken.adoptions > 4 * limit:
            self._fail(entry, interrupted())
            return
        if record.left_s() == 0.0:
            self._fail(entry, deadline_passed())
            return
        try:
            request = self._parse((record.request or "").encode())
        except Exception:
            self._fail(entry, unreadable())
            return
        live = self._live.reserve(Entry.of(taken), request)
        if live is None:
            return
        written = False
        try:
            written = self._ledger.swap(entry, taken) is not None
        finally:
            if not written:
                self._live.abandon(live)
        if not written:
            return  # another replica was first, or the job has ended
        try:
            self._live.submit(live)
        except DeadlineRefusedError:
            self._live.fail(live, deadline_passed().document())
        except RefusedError:
            self._live.abandon(live)
            self._ledger.swap(live.entry, record)
            raise
        except Exception as error:
            self._live.fail(live, problem_of(error))
        if self._observer is not None:
            self._observer.job_recovered()
        logs.event(_log, "a job was taken over", job=record.id, attempts=taken.attempts)

    def _fail(self, entry: Entry, problem: ProblemError) -> None:
        """End a job that no runner has."""
        record = entry.record
        after = self._ledger.swap(entry, record.end("failed", problem=problem.document()))
        if after is None:
            return
        self._ledger.forget_progress(record.id)
        self._live.tell(after.record)
        self._bell.ring(record.id)

    def _collect_results(self) -> None:
        """Forget cached results that are over; note which blobs the others name."""
        self._shared, now = set(), time.monotonic()
        known, self._results = self._results, {}
        for key in self._ledger.cached_keys():
            result, since = self._ledger.cached(key), known.get(key, now)
            if result is None or overdue(result.made, self._options.ttl_s, watched_s=now - since):
                self._ledger.uncache(key)
            else:
                self._shared.add(result.etag)
                self._results[key] = since

    def _collect_blobs(self) -> None:
        """Remove the blobs that nothing named at two sweeps at least grace_s apart, if nobody put them again since."""
        store, now = self._ledger.store, time.monotonic()
        named = {seen.etag for seen in self._ended.values()} | self._shared
        known, self._orphans = self._orphans, {}
        for digest, stamp in store.blobs():
            if digest in named:
                continue
            before = known.get(digest)
            since = before[1] if before is not None and before[0] == stamp else now
            if now - since >= self._options.grace_s and before is not None:
                store.delete_blob(digest, stamp=stamp)
            else:
                self._orphans[digest] = (stamp, since)
