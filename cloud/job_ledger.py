"""Job records, progress notes, cancel notes and cached results in a store: documents in, documents out.

Progress is a note beside the record, cheap and not durable: which runner took the job on and how many steps it made.
A cancel note tells the runner of a job that another replica cancelled it. Nothing here runs or decides anything.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from latentrelay.cloud.job_record import JobRecord, Moment, Preview
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.store import Store, StoreUnavailableError
from latentrelay.runtime.digest import canonical_json
from latentrelay.runtime.strict_json import parse_record, read_json, record_to_json


class DamagedRecordError(StoreUnavailableError):
    """What lies under a job's id is not a record that this version reads."""


@dataclass(frozen=True)
class Entry:
    """A record and the bytes it was read from, which a change must name."""

    record: JobRecord
    raw: bytes

    @classmethod
    def of(cls, record: JobRecord) -> Entry:
        """The entry that writing `record` makes."""
        return cls(record, record.to_bytes())


@dataclass(frozen=True)
class Progress:
    """`runner` has taken the job on and made `step` steps; `preview` is the last one's RGB bytes in base64."""

    runner: str
    step: int
    rows: int = 0
    columns: int = 0
    preview: str | None = None

    def picture(self) -> Preview | None:
        """The preview as (rows, columns, RGB bytes)."""
        return None if self.preview is None else (self.rows, self.columns, base64.b64decode(self.preview))


@dataclass(frozen=True)
class CachedResult:
    """The blob that an earlier job with the same content ended with."""

    etag: str
    size: int
    next_step: int
    made: Moment


class JobLedger:
    """Typed access to the store. Raises what the store raises."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def read(self, id: str) -> Entry | None:
        """The job's record. DamagedRecordError where what lies there cannot be understood."""
        raw = self.store.read("job", id)
        if raw is None:
            return None
        try:
            return Entry(JobRecord.from_bytes(raw), raw)
        except ValueError as error:
            raise DamagedRecordError("a damaged job record") from error

    def create(self, entry: Entry) -> bool:
        """Write a new record; False where the id has one."""
        return self.store.create("job", entry.record.id, entry.raw)

    def swap(self, before: Entry, record: JobRecord) -> Entry | None:
        """Write `record` where `before` still stands; None where it does not."""
        after = Entry.of(record)
        return after if self.store.replace("job", record.id, after.raw, expected=before.raw) else None

    def remove(self, entry: Entry) -> bool:
        """Delete the record where it still stands, and its notes."""
        removed = self.store.delete("job", entry.record.id, expected=entry.raw)
        if removed:
            self.forget_progress(entry.record.id)
        return removed

    def ids(self) -> list[str]:
        """Every job's id."""
        return self.store.keys("job")

    def note_progress(self, id: str, runner: str, step: int, preview: Preview | None = None) -> None:
        """Tell the other replicas."""
        note = Progress(runner, step)
        if preview is not None:
            note = Progress(runner, step, *preview[:2], base64.b64encode(preview[2]).decode())
        self.store.put("progress", id, canonical_json(record_to_json(note)))

    def progress(self, id: str) -> Progress | None:
        """The last note, whoever's; None where there is none that can be understood."""
        raw = self.store.read("progress", id)
        try:
            return None if raw is None else parse_record(Progress, read_json(raw))
        except ValueError:
            return None

    def progress_notes(self) -> list[str]:
        """The ids that have a note."""
        return self.store.keys("progress")

    def forget_progress(self, id: str) -> None:
        """The job has ended."""
        self.store.delete("progress", id)

    def ask_to_cancel(self, id: str) -> None:
        """Leave a note for whichever replica runs the job."""
        self.store.create("cancel", id, b"{}")

    def cancel_notes(self) -> list[str]:
        """The ids of jobs that were cancelled elsewhere."""
        return self.store.keys("cancel")

    def forget_cancel(self, id: str) -> None:
        """The note was read, or concerns nobody any more."""
        self.store.delete("cancel", id)

    def cached(self, key: str) -> CachedResult | None:
        """The result under a content key."""
        raw = self.store.read("result", key)
        try:
            return None if raw is None else parse_record(CachedResult, read_json(raw))
        except ValueError:
            return None

    def cache(self, key: str, result: CachedResult) -> None:
        """Keep a result for the next job with the same content."""
        self.store.put("result", key, canonical_json(record_to_json(result)))

    def uncache(self, key: str) -> None:
        """Forget the result."""
        self.store.delete("result", key)

    def cached_keys(self) -> list[str]:
        """Every content key."""
        return self.store.keys("result")


def content_key(request: RunRequest, *, owner: str, model: str) -> str:
    """32 hex digits that requests share whose results are the same bytes; owners never share results. A plain hash: who
    lists the names can try guesses of the request.

    A result at the full split serves whoever would accept a smaller one too.
    """
    content = {name: value for name, value in request.content().items() if name != "accept_splits"}
    document = [owner, model, content, list(request.wire_versions)]
    return hashlib.sha256(canonical_json(document)).hexdigest()[:32]
