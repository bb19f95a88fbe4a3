"""The record of one job, as the store keeps it, and its status, as a client sees it.

A record is written when the job is accepted, taken over, or ended; what changes at every step is not in it. The request
document, prompts included, is in it only while the job is not ended. Durations are measured on this machine's own
clock since it was started, where the record is read by the same boot; only across machines by the clock on the wall.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from latentrelay.runtime.digest import canonical_json
from latentrelay.runtime.strict_json import check_schema_version, parse_record, read_json, record_to_json

SCHEMA_VERSION = "1.1"  # 1.1: model
OPEN_STATES = ("queued", "running")
END_STATES = ("done", "failed", "cancelled", "expired", "deleted")
Preview = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in time that another process can measure from: seconds on the wall's clock, seconds since `boot`."""

    wall_s: float
    boot_s: float
    boot: str

    @classmethod
    def now(cls) -> Moment:
        """This moment."""
        return cls(time.time(), _since_boot(), _boot())

    @property
    def same_boot(self) -> bool:
        """Whether it was taken on this machine since it was started."""
        return self.boot == _boot()

    def elapsed_s(self) -> float:
        """Seconds since then, never negative: exact in the same boot, else what the clocks on the walls say."""
        return max(0.0, _since_boot() - self.boot_s if self.same_boot else time.time() - self.wall_s)


@dataclass(frozen=True)
class JobRecord:
    """One job. `runner` is the registered owner that runs it ("" is nobody); `deadline_s` counts from `accepted`.

    request: the body as it came; None once ended. fingerprint: "<salt>:<sha256 of salt and body>". attempts: how often
    a runner began it; adoptions: how often another runner took it over. etag and size of the blob and the step it was
    made at: only when done. content: the key under which its result may be shared. problem: an RFC 9457 document, only
    when failed. model: what decides the result's bytes besides the request, as the service that accepted it names it;
    "" is not known (schema 1.0), and then any service's.
    """

    id: str
    owner: str
    state: str
    runner: str
    fingerprint: str
    split: int
    num_steps: int
    accepted: Moment
    request: str | None = None
    deadline_s: float | None = None
    trace: str | None = None
    content: str | None = None
    attempts: int = 1
    adoptions: int = 0
    next_step: int | None = None
    etag: str | None = None
    size: int | None = None
    cloud_ms: float | None = None
    problem: Mapping[str, Any] | None = None
    ended: Moment | None = None
    model: str = ""
    schema_version: str = SCHEMA_VERSION
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether it is still to be run to its end."""
        return self.state in OPEN_STATES

    def made_by(self, model: str) -> bool:
        """Whether a service with this model may answer for the job."""
        return self.model in ("", model)

    def left_s(self) -> float | None:
        """Seconds until the deadline, 0 .. deadline_s whatever the clocks say; None without one."""
        if self.deadline_s is None:
            return None
        return self.deadline_s - min(self.deadline_s, self.accepted.elapsed_s())

    def end(self, state: str, **facts: Any) -> JobRecord:
        """The record of the job in its last state, without the request."""
        return dataclasses.replace(self, state=state, request=None, ended=Moment.now(), **facts)

    def taken_by(self, runner: str, *, begun: bool) -> JobRecord:
        """The record for another runner; `begun` is whether the one before had begun."""
        attempts = self.attempts + (1 if begun else 0)
        return dataclasses.replace(self, runner=runner, attempts=attempts, adoptions=self.adoptions + 1)

    def past(self, state: str) -> JobRecord:
        """The record of an ended job whose result is no longer kept; it is remembered from when it ended."""
        return dataclasses.replace(self, state=state, request=None, etag=None, problem=None, content=None)

    def with_problem(self, problem: Mapping[str, Any]) -> JobRecord:
        """The record of a job that failed for this reason."""
        return dataclasses.replace(self, problem=problem)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        document = record_to_json(self)
        if not self.model:
            del document["model"]  # schema 1.0 has no such key
        return canonical_json({**document.pop("extra"), **document})

    @classmethod
    def from_bytes(cls, data: bytes) -> JobRecord:
        """Raises ValueError; unknown keys are kept from a newer minor version only."""
        document = read_json(data)
        if not isinstance(document, dict):
            raise ValueError("the record is not an object")
        minor = check_schema_version(document.get("schema_version"))
        names = {item.name for item in dataclasses.fields(cls)} - {"extra"}
        unknown = {key: value for key, value in document.items() if key not in names}
        if unknown and minor == 0:
            raise ValueError(f"unknown key {sorted(unknown)[0]}")
        record = parse_record(cls, {key: value for key, value in document.items() if key in names})
        if record.state not in (*OPEN_STATES, *END_STATES) or (record.state in OPEN_STATES) == (record.request is None):
            raise ValueError(f"state {record.state!r} does not go with the rest")
        return dataclasses.replace(record, extra=unknown)


@dataclass(frozen=True)
class JobStatus:
    """What a client is told. Two statuses with the same `version` say the same, whichever replica made them."""

    id: str
    state: str
    split: int
    num_steps: int
    step: int = 0
    next_step: int | None = None
    queue_position: int | None = None
    attempts: int = 1
    etag: str | None = None
    size: int | None = None
    cloud_ms: float | None = None
    expires_in_s: float | None = None
    problem: Mapping[str, Any] | None = None
    preview: Preview | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will be computed for it any more."""
        return self.state in END_STATES

    @property
    def version(self) -> int:
        """0 .. 2**53 - 1, another one when anything but the time to live differs."""
        shown = dataclasses.replace(self, expires_in_s=None, preview=None)
        pixels = b"" if self.preview is None else self.preview[2]
        return int.from_bytes(hashlib.sha256(repr(shown).encode() + pixels).digest()[:8], "big") >> 11

    def to_dict(self) -> dict[str, Any]:
        """The status document of the wire; the preview is not in it."""
        return {
            "id": self.id,
            "state": self.state,
            "step": self.step,
            "split": self.split,
            "num_steps": self.num_steps,
            "next_step": self.next_step,
            "queue_position": self.queue_position,
            "attempts": self.attempts,
            "etag": self.etag,
            "bytes": self.size,
            "cloud_ms": self.cloud_ms,
            "expires_in_s": self.expires_in_s,
            "problem": None if self.problem is None else dict(self.problem),
        }


def job_id(owner: str, key: str) -> str:
    """32 hex digits that two requests share exactly if owner and idempotency key are the same."""
    return hashlib.sha256(canonical_json([owner, key])).hexdigest()[:32]


def fingerprint(document: bytes, salt: str | None = None) -> str:
    """ "<salt>:<sha256>" of a JSON body, the same for the same JSON however it is spaced and ordered.

    Salted, so that equal prompts of two jobs cannot be told from their records. Not keyed: who reads the record can try
    guesses of the body.
    """
    salt = uuid4().hex if salt is None else salt
    with contextlib.suppress(ValueError):
        document = canonical_json(read_json(document))
    return f"{salt}:{hashlib.sha256(bytes.fromhex(salt) + document).hexdigest()}"


def same_body(known: str, document: bytes) -> bool:
    """Whether `document` is the body that `known` is the fingerprint of."""
    return fingerprint(document, known.partition(":")[0]) == known


def _since_boot() -> float:
    """Seconds that go on while the machine sleeps, where the system tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


@cache
def _boot() -> str:
    """Names this start of this machine; where the system does not tell, this process."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid4().hex
