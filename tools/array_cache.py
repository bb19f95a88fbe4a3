"""Arrays kept on disk under a digest of what made them, so that a killed sweep goes on where it was.

Each entry is one safetensors file, written beside its place and renamed, so that a reader sees all of it or none. An
entry that cannot be read counts as absent and is made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.digest import json_digest
from latentrelay.tools.console import err
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class ArrayCache:
    """A folder of entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, kind: str, made_from: Mapping[str, Any], make: Callable[[], Arrays]) -> Arrays:
        """The entry of `kind` for a JSON document of everything that its arrays depend on; made where it is missing."""
        path = self.folder / kind / f"{json_digest(made_from)[7:39]}.safetensors"
        found = _read(path)
        if found is None:
            found = make()
            _write(path, found)
        return found


def _read(path: Path) -> Arrays | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        err.print(f"[yellow]cache:[/] {path.name} cannot be read ({type(error).__name__}) and is made again")
        return None


def _write(path: Path, arrays: Arrays) -> None:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
