"""The store: where accepted jobs and their results live, so that a server's death loses neither. One small interface.

Records are small documents under a kind and a key, changed by compare-and-swap; blobs are bytes under their sha256.
Replicas that share a store take turns over it by nothing else. A registration tells the living from the dead without a
clock. `FolderStore` is the one implementation here; what jobs mean is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from latentrelay.cloud.errors import RefusedError

KINDS = ("job", "progress", "cancel", "result", "quota")
Stamp = tuple[int, int, int]


class StoreFullError(RefusedError):
    """The store has no room left for what was to be written; what it held before is unchanged."""

    kind = "store-full"

    def __init__(self, retry_after_s: float = 10.0) -> None:
        super().__init__("the store is full", expected="room for a record", retry_after_s=retry_after_s)


class StoreUnavailableError(RefusedError):
    """The store cannot be read or written, for another reason than that it is full."""

    kind = "store-unavailable"

    def __init__(self, what: str, retry_after_s: float = 5.0) -> None:
        super().__init__("the store does not answer", got=what, retry_after_s=retry_after_s)


class Registration(Protocol):
    """A process's word that it lives. It ends with `release`, or with the process, however that ends."""

    owner: str

    def hold(self) -> None:
        """Make sure that others still see the registration, also where the store was wiped meanwhile."""

    def release(self) -> None:
        """Give it up: from now on `alive(owner)` is False."""


class Store(Protocol):
    """Every method may be called from any thread and process.

    Keys are 32 lower-case hex digits and kinds one of KINDS (else ValueError). What writes raises StoreFullError or
    StoreUnavailableError, what reads the latter; a write happened whole or not at all.
    """

    def put_blob(self, data: bytes) -> str:
        """Keep bytes; the bare hex sha256 they are found by. Kept durably when this returns."""

    def read_blob(self, digest: str) -> bytes | None:
        """The bytes, verified; None where there are none or they no longer have this sha256."""

    def delete_blob(self, digest: str, *, stamp: Stamp | None = None) -> None:
        """Remove it if it is there; with `stamp` only if it has not been put again since `blobs()` gave that."""

    def blobs(self) -> Iterator[tuple[str, Stamp]]:
        """The sha256 of every blob, with a value that changes whenever the blob is put again."""

    def create(self, kind: str, key: str, data: bytes) -> bool:
        """Write a new record, durably; False, and nothing changed, where there is one already."""

    def read(self, kind: str, key: str) -> bytes | None:
        """The record's bytes, or None."""

    def replace(self, kind: str, key: str, data: bytes, *, expected: bytes, durable: bool = True) -> bool:
        """Write the record if its bytes are `expected`; else False. No other change can come between. Without `durable`
        nobody waits for the disk, and a power failure may undo it."""

    def put(self, kind: str, key: str, data: bytes) -> None:
        """Write the record whatever was there; a power failure may undo it. Not for records that `replace` changes."""

    def delete(self, kind: str, key: str, *, expected: bytes | None = None) -> bool:
        """Remove the record (if its bytes are `expected`); whether it was removed. A power failure may undo it."""

    def keys(self, kind: str) -> list[str]:
        """The keys of every record of a kind, in no order."""

    def register(self, owner: str) -> Registration:
        """Declare `owner` (32 hex digits, never used before) alive for as long as this process is, or until release."""

    def alive(self, owner: str) -> bool:
        """Whether a live process holds the registration of `owner`."""

    def owners(self) -> list[str]:
        """Every owner that was registered and not forgotten, alive or dead."""

    def forget(self, owner: str) -> None:
        """Remove what a dead owner left; nothing where it is alive."""

    def tidy(self) -> None:
        """Remove what writers that died in the middle left behind, and nothing else."""

    def healthy(self) -> bool:
        """Whether a record could be written now. Never raises."""
