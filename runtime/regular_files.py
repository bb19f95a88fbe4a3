"""The regular files below a folder, and nothing else: what a bundle may consist of.

Links, junctions, devices, sockets and pipes are refused where they are met, before anything is opened.
"""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

from latentrelay.runtime.errors import BundleLayoutError


def regular_files(root: Path) -> list[str]:
    """POSIX paths of all regular files below root. Raises BundleLayoutError at a link or a special file."""
    paths, folders = [], [""]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(root / folder), key=lambda item: item.name):
            path = posixpath.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False) and not _is_junction(entry):
                folders.append(path)
            else:
                check_regular(root, path)
                paths.append(path)
    return paths


def _is_junction(entry: os.DirEntry[str]) -> bool:
    """Windows' directory junctions are links that `is_symlink` does not show."""
    attributes = getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0)
    return bool(attributes)


def check_regular(root: Path, path: str) -> None:
    """Raise BundleLayoutError unless root/path, itself and not what it may point to, is a regular file."""
    mode = (root / path).lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
        raise BundleLayoutError(
            f"{path} is {kind}",
            path=path,
            expected="regular files and folders only",
            do="Copy the bundle without links.",
        )
