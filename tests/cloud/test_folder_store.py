"""The folder store: whole or nothing, one winner, alive or dead, and never a file that is not ours."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.store import KINDS, StoreFullError, StoreUnavailableError
from latentrelay.runtime.errors import RequestError

KEY, OTHER = "0" * 32, "0" * 30 + "ff"


def child(program: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process of the same environment."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def release(processes: list[subprocess.Popen[str]]) -> None:
    """Let children that wait for a line go on together, once all of them do."""
    for each in processes:
        assert each.stdout is not None
        each.stdout.readline()
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def test_blobs_are_found_by_their_sha256_and_verified(store: FolderStore) -> None:
    digest = store.put_blob(b"latents")
    assert digest == hashlib.sha256(b"latents").hexdigest()
    assert store.read_blob(digest) == b"latents"
    assert store.put_blob(b"latents") == digest
    (store.folder / "blob" / digest).write_bytes(b"latentz")
    assert store.read_blob(digest) is None
    store.delete_blob(digest)
    store.delete_blob(digest)
    assert list(store.blobs()) == []
    assert store.read_blob(digest) is None


def test_a_blob_that_was_put_again_is_not_deleted_by_an_old_stamp(store: FolderStore) -> None:
    digest = store.put_blob(b"latents")
    ((_, stamp),) = store.blobs()
    store.put_blob(b"latents")
    store.delete_blob(digest, stamp=stamp)
    assert store.read_blob(digest) == b"latents"
    ((_, stamp),) = store.blobs()
    store.delete_blob(digest, stamp=stamp)
    assert store.read_blob(digest) is None


def test_a_record_is_created_once_and_changed_only_as_it_was_read(store: FolderStore) -> None:
    assert store.create("job", KEY, b"one")
    assert not store.create("job", KEY, b"two")
    assert store.read("job", KEY) == b"one"
    assert not store.replace("job", KEY, b"three", expected=b"two")
    assert store.replace("job", KEY, b"three", expected=b"one")
    assert not store.replace("job", OTHER, b"x", expected=b"")
    assert store.read("job", OTHER) is None
    assert not store.delete("job", KEY, expected=b"one")
    assert store.delete("job", KEY, expected=b"three")
    assert not store.delete("job", KEY)
    store.put("progress", KEY, b"1")
    store.put("progress", KEY, b"2")
    assert store.read("progress", KEY) == b"2"
    assert list((store.folder / "part").iterdir()) == []


def test_an_empty_file_that_a_power_failure_left_is_no_record(store: FolderStore) -> None:
    (store.folder / "job" / KEY).touch()
    assert store.read("job", KEY) is None
    assert store.create("job", KEY, b"one")
    assert store.read("job", KEY) == b"one"


@pytest.mark.parametrize(
    "key", ["", "..", "../" + "0" * 29, "0" * 31, "0" * 33, "0" * 31 + "\n", "A" * 32, "/etc/passwd"]
)
def test_keys_that_are_not_plain_hex_are_refused(store: FolderStore, key: str) -> None:
    for act in (
        lambda: store.create("job", key, b"x"),
        lambda: store.read("job", key),
        lambda: store.put("job", key, b"x"),
        lambda: store.delete("job", key),
        lambda: store.read_blob(key),
        lambda: store.delete_blob(key),
        lambda: store.register(key),
    ):
        with pytest.raises(ValueError, match="hex digits"):
            act()
    assert not store.alive(key)


@pytest.mark.parametrize("kind", ["blob", "lock", "owner", "../job", ""])
def test_other_kinds_are_refused(store: FolderStore, kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        store.create(kind if kind not in ("blob", "owner") else kind + "s", KEY, b"x")
    with pytest.raises(ValueError, match="kind"):
        store.keys("lock")


def test_only_our_user_reads_what_is_stored(store: FolderStore) -> None:
    before = os.umask(0)
    try:
        store = FolderStore(store.folder.with_name("another"))
        store.create("job", KEY, b"a prompt")
        store.put("progress", KEY, b"1")
        store.put_blob(b"latents")
        registration = store.register(KEY)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (store.folder, *store.folder.rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    registration.release()


def test_files_that_are_not_ours_are_neither_listed_nor_removed(store: FolderStore) -> None:
    strange = [
        store.folder / folder / name for folder in ("job", "blob", "part", "owner") for name in ("note.txt", "F" * 32)
    ]
    for path in strange:
        path.write_text("mine")
    (store.folder / "job" / ("0" * 31 + "g")).mkdir()
    assert store.keys("job") == []
    assert list(store.blobs()) == []
    assert store.owners() == []
    store.tidy()
    assert all(path.exists() for path in strange)


def test_a_link_in_the_place_of_a_record_is_not_followed(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (store.folder / "job" / KEY).symlink_to(tmp_path / "secret")
    with pytest.raises(StoreUnavailableError):
        store.read("job", KEY)
    assert not store.healthy() or (tmp_path / "secret").read_text() == "secret"


def test_a_wiped_store_goes_on(store: FolderStore) -> None:
    registration = store.register(KEY)
    store.create("job", KEY, b"one")
    subprocess.run(["rm", "-r", store.folder], check=True)
    assert store.keys("job") == []
    assert store.owners() == []
    assert store.read("job", KEY) is None
    assert not store.replace("job", KEY, b"two", expected=b"one")
    subprocess.run(["rm", "-r", store.folder], check=True)
    assert store.create("job", KEY, b"two")
    subprocess.run(["rm", "-r", store.folder], check=True)
    assert store.read_blob(store.put_blob(b"latents")) == b"latents"
    subprocess.run(["rm", "-r", store.folder], check=True)
    store.put("progress", KEY, b"1")
    subprocess.run(["rm", "-r", store.folder], check=True)
    assert store.healthy()
    assert not store.alive(KEY)
    registration.hold()
    assert store.alive(KEY)
    registration.release()


@pytest.mark.parametrize("name", ["file", "file/store", "/proc/nowhere", "held", "a" * 300, "nul\0"])
def test_a_store_that_cannot_be_made_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "job").touch()
    with pytest.raises(RequestError, match="the store's folder cannot be used") as caught:
        FolderStore(tmp_path / name)
    said = str(caught.value)
    assert "Errno" not in said
    assert all(each in said for each in ("got ", "expected a folder", "Choose another folder"))


def test_parts_of_dead_writers_are_removed_after_a_while(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    part = store.folder / "part" / KEY
    part.touch()
    store.tidy()
    assert part.exists()
    monkeypatch.setattr("latentrelay.cloud.folder_store._PART_S", -1.0)
    store.tidy()
    assert not part.exists()


def test_registrations_live_as_long_as_they_are_held(store: FolderStore) -> None:
    assert not store.alive(KEY)
    assert not store.alive("")
    mine, another = store.register(KEY), FolderStore(store.folder).register(OTHER)
    assert store.alive(KEY)
    assert store.alive(OTHER), "two replicas of one process are told apart"
    store.forget(KEY)
    assert sorted(store.owners()) == [KEY, OTHER]
    mine.release()
    assert not store.alive(KEY)
    assert store.alive(OTHER)
    mine.hold()
    assert not store.alive(KEY), "released is released"
    store.forget(KEY)
    assert store.owners() == [OTHER]
    another.release()


REGISTER = """
    import os, sys, time
    from latentrelay.cloud.folder_store import FolderStore
    registration = FolderStore(sys.argv[1]).register(sys.argv[2])
    child = os.fork() if sys.argv[3] == "fork" else None
    if child == 0:
        sys.stdin.readline()
        os._exit(0)
    print(child or 0, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_the_kernel_ends_a_killed_process_registration(store: FolderStore, how: str) -> None:
    process = child(REGISTER, store.folder, KEY, how)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    assert store.alive(KEY)
    process.kill()
    process.wait(30)
    assert not store.alive(KEY), "not even where a child of it lives on"
    process.stdin.close()
    process.stdout.close()


COUNT = """
    import sys, time
    from latentrelay.cloud.folder_store import FolderStore

    class Slow(FolderStore):  # between the comparison and the change there is time for others
        def _bytes(self, path):
            data = super()._bytes(path)
            time.sleep(0.002)
            return data

    store, key, wins = Slow(sys.argv[1]), sys.argv[2], 0
    print(flush=True)
    sys.stdin.readline()
    while wins < int(sys.argv[3]):
        raw = store.read("job", key)
        if raw == b"wiped":
            break
        if store.replace("job", key, str(int(raw) + 1).encode(), expected=raw):
            wins += 1
"""


def test_compare_and_swap_is_atomic_between_processes(store: FolderStore) -> None:
    store.create("job", KEY, b"0")
    processes = [child(COUNT, store.folder, KEY, 20) for _ in range(4)]
    release(processes)
    for each in processes:
        each.communicate(timeout=120)
    assert [each.returncode for each in processes] == [0] * 4
    assert store.read("job", KEY) == b"80"


def test_compare_and_swap_is_atomic_between_threads(store: FolderStore) -> None:
    store.create("job", KEY, b"0")

    def count() -> None:
        wins = 0
        while wins < 25:
            raw = store.read("job", KEY) or b""
            wins += store.replace("job", KEY, str(int(raw) + 1).encode(), expected=raw)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(120)
    assert store.read("job", KEY) == b"100"


CREATE = """
    import sys
    from latentrelay.cloud.folder_store import FolderStore
    store, won = FolderStore(sys.argv[1]), 0
    print(flush=True)
    sys.stdin.readline()
    for number in range(100):
        won += store.create("job", f"{number:032x}", sys.argv[2].encode())
    print(won)
"""


def test_one_of_several_processes_creates_a_record(store: FolderStore) -> None:
    processes = [child(CREATE, store.folder, name) for name in "abc"]
    release(processes)
    won = [int(each.communicate(timeout=120)[0]) for each in processes]
    assert sum(won) == 100
    assert len(store.keys("job")) == 100


FULL = """
    import resource, signal, sys
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.store import StoreFullError
    store = FolderStore(sys.argv[1])
    store.create("job", "0" * 32, b"one")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    for act in (
        lambda: store.put_blob(bytes(200)),
        lambda: store.create("job", "1" * 32, bytes(200)),
        lambda: store.replace("job", "0" * 32, bytes(200), expected=b"one"),
        lambda: store.put("progress", "0" * 32, bytes(200)),
    ):
        try:
            act()
        except StoreFullError as error:
            print(error.kind)
    print(store.read("job", "0" * 32), store.read("job", "1" * 32), store.keys("progress"), list(store.blobs()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 100))
    print(store.healthy())
"""


def test_a_full_disk_is_said_and_changes_nothing(store: FolderStore) -> None:
    lines = child(FULL, store.folder).communicate(timeout=60)[0].splitlines()
    assert lines == ["store-full"] * 4 + ["b'one' None [] []", "False"]
    assert list((store.folder / "part").iterdir()) == []
    assert store.healthy()


def test_a_file_system_without_room_is_full(tmp_path: Path) -> None:
    """The real ENOSPC, where this user may mount."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", tmp_path], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a small file system needs the right to")
    try:
        store = FolderStore(tmp_path / "store")
        store.create("job", KEY, b"one")
        with pytest.raises(StoreFullError):
            deque(store.put_blob(bytes([number]) * 16_384) for number in range(64))
        with pytest.raises(StoreFullError):
            store.create("job", OTHER, bytes(60_000))
        assert store.read("job", OTHER) is None
        assert store.read("job", KEY) == b"one"
        for digest, _ in store.blobs():
            store.delete_blob(digest)
        assert store.create("job", OTHER, b"two")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_name_is_on_the_disk_when_the_write_returns(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fsync(handle: int, sync: Callable[[int], None] = os.fsync) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(f"sync {path.name}" if path.is_dir() else "sync file")
        sync(handle)

    def rename(before: Path, after: Path, rename: Callable[..., None] = os.rename) -> None:
        done.append("rename")
        rename(before, after)

    def calls() -> list[str]:
        made = list(done)
        done.clear()
        return made

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    store.create("job", KEY, b"one")
    assert calls() == ["sync file"], "accepting a job waits once"
    store.replace("job", KEY, b"two", expected=b"one")
    assert calls() == ["sync file", "rename", "sync job"]
    store.put_blob(b"latents")
    assert calls() == ["sync file", "rename", "sync blob"]
    store.replace("job", KEY, b"three", expected=b"two", durable=False)
    store.put("progress", KEY, b"{}")
    assert calls() == ["rename", "rename"]
    FolderStore(store.folder, durable=False).replace("job", KEY, b"four", expected=b"three")
    assert calls() == ["rename"]


def test_every_kind_has_its_folder(store: FolderStore) -> None:
    for kind in KINDS:
        assert store.create(kind, KEY, b"x")
        assert store.keys(kind) == [KEY]
