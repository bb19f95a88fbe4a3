"""The store as a folder that every replica mounts: job, progress, cancel, result, blob, owner, lock and part in it.

A record is a file; it is written beside (`part/`) and put in its place in one step, by link where it must be new and by
rename under an advisory lock where it must be unchanged. Locks are flock's: the kernel drops them when their process
dies, so no clock and no time-out decides who lives. Folders have mode 0700, files 0600. Files with other names than
ours are never touched. Needs a file system with hard links and flock (any local one; NFS version 4).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from latentrelay.cloud.store import KINDS, Registration, Stamp, StoreFullError, StoreUnavailableError
from latentrelay.runtime.errors import RequestError

T = TypeVar("T")
_KEY = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FOLDERS = (*KINDS, "blob", "owner", "lock", "part")
_WIPES = 8
_PART_S = 300.0  # a part older than this was left by a writer that died; a live one takes milliseconds


class FolderStore:
    """Records and blobs under one folder, which is made where it does not exist, also when it vanishes later."""

    def __init__(self, folder: str | os.PathLike[str], *, durable: bool = True) -> None:
        """durable: a write has reached the disk when it returns; False is for a folder that ends with the process.

        Raises RequestError where the folder cannot be made or written.
        """
        self.folder = Path(os.path.abspath(folder))
        self._durable = durable
        self._parts: dict[str, float] = {}
        try:
            self._make_folders()
            for each in (self.folder, *(self.folder / name for name in _FOLDERS)):
                if not os.access(each, os.R_OK | os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except (OSError, ValueError) as error:
            raise RequestError(
                "the store's folder cannot be used",
                got=f"{self.folder} ({getattr(error, 'strerror', None) or error})",
                expected="a folder that this user may write, or a path where one can be made",
                do="Choose another folder, or make its owner the service's user.",
            ) from error

    def put_blob(self, data: bytes) -> str:
        """See Store."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path("blob", digest)

        def write() -> None:
            with self._written(data) as part, self._locked(digest):
                os.rename(part, path)
            self._sync_folder(path)

        self._made(write)
        return digest

    def read_blob(self, digest: str) -> bytes | None:
        """See Store."""
        data = self._bytes(self._path("blob", digest))
        return data if data is not None and hashlib.sha256(data).hexdigest() == digest else None

    def delete_blob(self, digest: str, *, stamp: Stamp | None = None) -> None:
        """See Store."""
        path = self._path("blob", digest)

        def remove() -> None:
            with self._locked(digest):
                if stamp is None or _stamp(path) == stamp:
                    path.unlink(missing_ok=True)

        self._made(remove)

    def blobs(self) -> Iterator[tuple[str, Stamp]]:
        """See Store."""
        for name in self._names("blob", _DIGEST):
            stamp = _stamp(self._path("blob", name))
            if stamp is not None:
                yield name, stamp

    def create(self, kind: str, key: str, data: bytes) -> bool:
        """See Store. Named first and synced then: one wait for the disk makes the bytes durable and, where the file
        system has a journal of names (ext4, XFS), the name too. Accepting a job waits for no more."""
        path = self._path(kind, key)
        if _stamp(path) is not None and self._bytes(path) is not None:
            return False

        def write() -> bool:
            handle, part = self._open_part()
            try:
                _write_all(handle, data)
                if not self._linked(part, path):
                    return False
                try:
                    self._sync(handle)
                except OSError:  # refused, so it may not stay either
                    path.unlink(missing_ok=True)
                    raise
            finally:
                os.close(handle)
                part.unlink(missing_ok=True)
            return True

        return self._made(write)

    def _linked(self, part: Path, path: Path) -> bool:
        """Give a part its name, if that is free; the empty file that a power failure can leave there counts as free."""
        try:
            os.link(part, path)
        except FileExistsError:
            with self._locked(path.name):
                status = os.stat(path, follow_symlinks=False)
                if status.st_size:
                    return False
                os.rename(part, path)
        return True

    def read(self, kind: str, key: str) -> bytes | None:
        """See Store."""
        return self._bytes(self._path(kind, key))

    def replace(self, kind: str, key: str, data: bytes, *, expected: bytes, durable: bool = True) -> bool:
        """See Store."""
        path = self._path(kind, key)

        def write() -> bool:
            with self._written(data, durable=durable) as part, self._locked(key):
                if self._bytes(path) != expected:
                    return False
                os.rename(part, path)
            if durable:
                with contextlib.suppress(OSError):  # the change is made, and others have seen it
                    self._sync_folder(path)
            return True

        return self._made(write)

    def put(self, kind: str, key: str, data: bytes) -> None:
        """See Store."""
        path = self._path(kind, key)

        def write() -> None:
            with self._written(data, durable=False) as part:
                os.rename(part, path)

        self._made(write)

    def delete(self, kind: str, key: str, *, expected: bytes | None = None) -> bool:
        """See Store."""
        path = self._path(kind, key)

        def remove() -> bool:
            with self._locked(key):
                return (expected is None or self._bytes(path) == expected) and _removed(path)

        return self._made(remove)

    def keys(self, kind: str) -> list[str]:
        """See Store."""
        self._path(kind, "0" * 32)
        return list(self._names(kind, _KEY))

    def register(self, owner: str) -> Registration:
        """See Store."""
        return _FlockRegistration(self, owner, self._path("owner", owner))

    def alive(self, owner: str) -> bool:
        """See Store."""
        if not _KEY.fullmatch(owner):
            return False
        with _translated():
            try:
                handle = os.open(self._path("owner", owner), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(handle)
        return False

    def owners(self) -> list[str]:
        """See Store."""
        return list(self._names("owner", _KEY))

    def forget(self, owner: str) -> None:
        """See Store."""
        if not self.alive(owner):
            with _translated():
                self._path("owner", owner).unlink(missing_ok=True)

    def tidy(self) -> None:
        """See Store. A part is removed once this process has seen it for five minutes by its own monotonic clock."""
        now = time.monotonic()
        names = set(self._names("part", _KEY))
        self._parts = {name: self._parts.get(name, now) for name in names}
        with _translated():
            for name, since in self._parts.items():
                if now - since > _PART_S:
                    (self.folder / "part" / name).unlink(missing_ok=True)

    def healthy(self) -> bool:
        """See Store."""
        try:
            self._made(self._probe)
        except (StoreFullError, StoreUnavailableError):
            return False
        return True

    def _probe(self) -> None:
        with self._written(b"healthy"):
            pass

    def locked_file(self, path: Path) -> int:
        """A handle on a new file, locked before it is seen at `path`; the lock lasts until the last copy closes."""

        def make() -> int:
            handle, part = self._open_part()
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(part, path)
            except BaseException:
                os.close(handle)
                raise
            return handle

        return self._made(make)

    def _path(self, kind: str, name: str) -> Path:
        """Where a record, a blob or an owner lies. ValueError for any name that is not plain hex digits."""
        pattern = _DIGEST if kind == "blob" else _KEY
        if kind not in (*KINDS, "blob", "owner") or not pattern.fullmatch(name):
            raise ValueError(f"got kind {kind!r:.40} and a key of {len(name)} characters, expected hex digits")
        return self.folder / kind / name

    def _names(self, kind: str, pattern: re.Pattern[str]) -> Iterator[str]:
        with _translated():
            try:
                found = os.listdir(self.folder / kind)
            except FileNotFoundError:
                return iter(())
        return (name for name in found if pattern.fullmatch(name))

    def _bytes(self, path: Path) -> bytes | None:
        with _translated():
            try:
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            with open(handle, "rb", buffering=0) as file:
                return file.readall() or None

    def _make_folders(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in _FOLDERS:
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)

    def _made(self, act: Callable[[], T]) -> T:
        """`act()`, which is whole or nothing; again, with new folders, where they have vanished under it."""
        for _ in range(_WIPES):
            try:
                with _translated():
                    return act()
            except FileNotFoundError:
                with _translated():
                    self._make_folders()
        raise StoreUnavailableError("a folder that keeps vanishing")

    def _sync(self, handle: int) -> None:
        if self._durable:
            os.fsync(handle)

    def _sync_folder(self, path: Path) -> None:
        """Make the name that `path` was just given durable."""
        if self._durable:
            handle = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def _open_part(self) -> tuple[int, Path]:
        path = self.folder / "part" / secrets.token_hex(16)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), path

    @contextmanager
    def _written(self, data: bytes, *, durable: bool = True) -> Iterator[Path]:
        """A file beside with `data`, on the disk already if durable; gone at the end, unless it was renamed."""
        handle, path = self._open_part()
        try:
            try:
                _write_all(handle, data)
                if durable:
                    self._sync(handle)
            finally:
                os.close(handle)
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Alone with every key that has the same first two digits, among all threads and processes."""
        path = self.folder / "lock" / key[:2]
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                if _is_at(handle, path):  # else the folder was wiped while we waited, and others lock another file
                    yield
                    return
            finally:
                os.close(handle)


class _FlockRegistration:
    """A locked file. It is locked before it gets its name, so that nobody finds it unlocked while its process lives."""

    def __init__(self, store: FolderStore, owner: str, path: Path) -> None:
        self.owner = owner
        self._store, self._path = store, path
        self._handle, self._released = -1, False
        self._lock = threading.Lock()
        self.hold()
        _HELD.add(self)

    def hold(self) -> None:
        """See Registration."""
        with self._lock:
            if not self._released and not (self._handle >= 0 and _is_at(self._handle, self._path)):
                handle = self._store.locked_file(self._path)
                self.drop()
                self._handle = handle

    def release(self) -> None:
        """See Registration. The file stays, unlocked: the others see by it that there may be jobs to adopt."""
        with self._lock:
            self._released = True
            self.drop()

    def drop(self) -> None:
        """Close the handle; the lock goes with its last copy."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


_HELD: weakref.WeakSet[_FlockRegistration] = weakref.WeakSet()


def _drop_all() -> None:
    for each in list(_HELD):
        each.drop()


os.register_at_fork(after_in_child=_drop_all)  # else a child that outlives us would keep us registered


@contextmanager
def _translated() -> Iterator[None]:
    """An OSError as the store's own error, but for the two that say whether a file is there."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFullError from error
        raise StoreUnavailableError(errno.errorcode.get(error.errno or 0, "an unknown error")) from error


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _stamp(path: Path) -> Stamp | None:
    with _translated():
        try:
            status = os.stat(path, follow_symlinks=False)
        except FileNotFoundError:
            return None
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    with _translated():
        try:
            return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            return False


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
