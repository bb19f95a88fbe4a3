"""A bundle on disk: opened, and verified before a session sees any of it.

`Bundle.open` reads manifest.json, walks the folder, and refuses links, special files, paths that leave the folder,
files that the manifest does not list or that are missing, sizes and sha256 that differ, and ONNX graphs whose external
data lies anywhere but beside them in a listed file. Masks of predicted steps must be those of the bundle's plan.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import BundleLayoutError, BundleTamperedError, ManifestError
from latentrelay.runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, check_path
from latentrelay.runtime.onnx_paths import external_locations
from latentrelay.runtime.prediction_check import check_plan

PLAN_NAME = "plan.json"
_AGAIN = "Fetch the bundle again, or build it again."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: absolute folder and parsed manifest. Make one with `Bundle.open`."""

    path: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The manifest's digest, "sha256:<hex>", which covers every file through its sha256."""
        return self.manifest.digest

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """What the manifest lists: everything but manifest.json itself."""
        return self.manifest.files

    def file(self, path: str) -> Path:
        """The absolute path of a listed file; raises BundleLayoutError for any other."""
        if all(entry.path != path for entry in self.files):
            raise BundleLayoutError("the manifest does not list this file", path=path, got=path)
        return self.path / path

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool = True,
        on_file: Callable[[FileEntry], None] | None = None,
    ) -> Bundle:
        """Open the bundle in folder `path`.

        `verify=False` leaves out the sha256 of the files (for a bundle verified before, on a disk you trust); layout,
        sizes, external data, masks and the manifest's own digest are checked always. `on_file` is called before each
        file is hashed. Raises ManifestError, BundleLayoutError, BundleTamperedError.
        """
        root = Path(path).resolve()
        bundle = cls(root, _read_manifest(root))
        _check_layout(bundle)
        for entry in bundle.files:
            _check_size(root, entry)
        for entry in bundle.files if verify else ():
            if on_file is not None:
                on_file(entry)
            _check_sha256(root, entry)
        for entry in bundle.files:
            if entry.path.endswith(".onnx"):
                _check_external_data(bundle, entry.path)
        _check_masks(bundle)
        return bundle


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST_NAME
    if not root.is_dir() or not os.path.lexists(path):
        raise ManifestError(
            f"there is no bundle at {root}: no {MANIFEST_NAME}",
            path=MANIFEST_NAME,
            do="Give the folder that `latentrelay build` wrote.",
        )
    _check_regular(root, MANIFEST_NAME)
    with path.open("rb") as file:
        return Manifest.from_json_bytes(file.read(MAX_MANIFEST_BYTES + 1))


def _check_layout(bundle: Bundle) -> None:
    found = set(_walk(bundle.path))
    listed = {entry.path for entry in bundle.files} | {MANIFEST_NAME}
    for path in sorted(found - listed):
        raise BundleLayoutError(
            "the bundle holds a file that its manifest does not list", path=path, got=path, do=_AGAIN
        )
    for path in sorted(listed - found):
        raise BundleLayoutError("a file of the manifest is missing", path=path, expected=path, do=_AGAIN)


def _walk(root: Path) -> list[str]:
    """POSIX paths of all regular files below root; links and special files are refused on the way."""
    paths, folders = [], [""]
    while folders:
        folder = folders.pop()
        for entry in sorted(os.scandir(root / folder), key=lambda item: item.name):
            path = posixpath.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False) and not _is_junction(entry):
                folders.append(path)
            else:
                _check_regular(root, path)
                paths.append(path)
    return paths


def _is_junction(entry: os.DirEntry[str]) -> bool:
    """Windows' directory junctions are links that `is_symlink` does not show."""
    attributes = getattr(entry.stat(follow_symlinks=False), "st_reparse_tag", 0)
    return bool(attributes)


def _check_regular(root: Path, path: str) -> None:
    mode = (root / path).lstat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
        raise BundleLayoutError(
            f"{path} is {kind}",
            path=path,
            expected="regular files and folders only",
            do="Copy the bundle without links.",
        )


def _check_size(root: Path, entry: FileEntry) -> None:
    size = (root / entry.path).stat().st_size
    if size != entry.bytes:
        raise BundleTamperedError(
            f"the size of {entry.path} differs", path=entry.path, got=size, expected=entry.bytes, do=_AGAIN
        )


def _check_sha256(root: Path, entry: FileEntry) -> None:
    digest = sha256_file(root / entry.path)
    if digest != entry.sha256:
        raise BundleTamperedError(
            f"the sha256 of {entry.path} differs", path=entry.path, got=digest, expected=entry.sha256, do=_AGAIN
        )


def _check_masks(bundle: Bundle) -> None:
    """The manifest's masks are the plan's, from which the graphs' tables were made."""
    if all(entry.path != PLAN_NAME for entry in bundle.files):
        return
    try:
        check_plan(bundle.manifest, (bundle.path / PLAN_NAME).read_bytes())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ManifestError(f"{MANIFEST_NAME} and {PLAN_NAME} disagree: {error}", path=PLAN_NAME, do=_AGAIN) from error


def _check_external_data(bundle: Bundle, path: str) -> None:
    try:
        locations = external_locations(bundle.path / path)
    except ValueError as error:  # UnicodeDecodeError is one
        raise BundleTamperedError(f"{path} is not an ONNX graph: {error}", path=path, do=_AGAIN) from error
    listed = {entry.path for entry in bundle.files}
    for location in sorted(locations):
        target = posixpath.join(posixpath.dirname(path), check_path(location))
        if "/" in location or target not in listed:
            raise BundleLayoutError(
                f"{path} reads external data that is not a listed file beside it",
                path=path,
                got=location,
                expected="a file of the manifest in the graph's own folder",
                do="Do not use this bundle.",
            )
