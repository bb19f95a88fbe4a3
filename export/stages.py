"""Stages of a build that are not run twice: each one's files in a folder of their own, named after what went into it.

`StageStore.made(name, inputs, write)` -> the folder that holds the stage's files. `inputs` is what the result depends
on (digests, settings, tool versions), as JSON values; where a folder of the same inputs is there and its files are what
they were, `write` is not called. A folder is written under another name and renamed when it is whole, so a build that
was killed goes on where it was. The store knows nothing of graphs, and removes nothing but its own unfinished folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrelay.runtime.digest import json_digest, sha256_file

RECORD = "stage.json"
Progress = Callable[[str], None]


@dataclass
class StageStore:
    """The stages of one work folder; `tools`: versions that every stage depends on; `seconds` by stage of those that
    were run, `reused` the names of the others, `places` the folder of each."""

    folder: Path
    progress: Progress = lambda words: None
    tools: Mapping[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)
    places: dict[str, Path] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str, words: str) -> Iterator[None]:
        """Announce a stage that is always run, and time it."""
        self.progress(words)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def made(self, name: str, words: str, inputs: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
        """The stage's folder, written by `write(folder)` unless it is there. Whatever `write` raises passes through."""
        inputs = {**inputs, "tool_versions": dict(self.tools)}
        digest = json_digest(_plain(inputs))
        place = self.folder / f"{name}-{digest.removeprefix('sha256:')[:16]}"
        self.places[name] = place
        if _whole(place, digest):
            self.progress(f"{words}: unchanged")
            self.reused.append(name)
            return place
        with self.timed(name, words):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep(name)
            partial = Path(tempfile.mkdtemp(prefix=f".{name}.{os.getpid()}.", suffix=".partial", dir=self.folder))
            try:
                write(partial)
                record = {"inputs": _plain(inputs), "digest": digest, "files": _files(partial)}
                (partial / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                if place.exists():  # damaged, or it would have been taken
                    shutil.rmtree(place)
                os.rename(partial, place)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return place

    def _sweep(self, name: str) -> None:
        """What a killed build left unfinished of this stage; a build that is under way keeps its own."""
        for left in self.folder.glob(f".{name}.*.partial"):
            owner = left.name.removeprefix(f".{name}.").split(".")[0]
            if not (owner.isdecimal() and _alive(int(owner))):
                shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return process != os.getpid()


def place_files(stage: Path, target: Path) -> None:
    """Copy a stage's files (its record aside) into `target`. Not as hard links: ONNX tools refuse weights with two
    names as an attack, and a bundle that is edited would edit the stage."""
    for path in sorted(stage.rglob("*")):
        if path.is_dir() or path == stage / RECORD:
            continue
        goal = target / path.relative_to(stage)
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, goal)


def stage_digest(stage: Path) -> str:
    """The digest of a stage's files, for stages that are made of them."""
    return json_digest(read_json(stage, RECORD)["files"])


def read_json(stage: Path, name: str) -> Any:
    """A JSON file of a stage."""
    return json.loads((stage / name).read_text(encoding="utf-8"))


def _whole(place: Path, digest: str) -> bool:
    try:
        record = json.loads((place / RECORD).read_text(encoding="utf-8"))
        return bool(record["digest"] == digest and record["files"] == _files(place))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / RECORD)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def _plain(value: Any) -> Any:
    """JSON values; floats stay exact, tuples become lists, bytes their sha256."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value
