"""A bundle on disk: opened, and verified before a session sees any of it.

`Bundle.open` reads manifest.json, walks the folder, and refuses links, special files, paths that leave the folder,
files that the manifest does not list or that are missing, sizes and sha256 that differ, and ONNX graphs whose external
data lies anywhere but beside them in a listed file. Masks of predicted steps must be those of the bundle's plan. With a
public key, the bundle must be signed by it; the signature is the one file that the manifest does not list.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentrelay.runtime.digest import sha256_file
from latentrelay.runtime.errors import (
    BundleLayoutError,
    BundleTamperedError,
    ManifestError,
    RequestError,
)
from latentrelay.runtime.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileEntry, Manifest, check_path
from latentrelay.runtime.onnx_paths import external_locations
from latentrelay.runtime.prediction_check import check_plan
from latentrelay.runtime.regular_files import check_regular, regular_files
from latentrelay.runtime.signature import SIGNATURE_NAME, PublicKey, SignedFiles, check_covers, read_signature

PLAN_NAME = "plan.json"
_AGAIN = "Fetch the bundle again, or build it again."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: absolute folder and parsed manifest. Make one with `Bundle.open`.

    `signed_by` is the fingerprint of the key whose signature was verified, None where none was asked for.
    """

    path: Path
    manifest: Manifest
    signed_by: str | None = None

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
        *,
        public_key: PublicKey | None = None,
        require_signature: bool | None = None,
    ) -> Bundle:
        """Open the bundle in folder `path`.

        `verify=False` leaves out the sha256 of the files (for a bundle verified before, on a disk you trust); layout,
        sizes, external data, masks, the signature and the manifest's own digest are checked always. `on_file` is called
        before each file is hashed. `public_key`, PEM bytes or the path of a PEM file: the bundle must be signed with
        it; `require_signature=False` lets one without a signature pass all the same, never one with another.
        Raises ManifestError, BundleLayoutError, BundleTamperedError, BundleSignatureError, RequestError.
        """
        root = Path(path).resolve()
        key = _signed_by(root, public_key, require_signature)
        text = _read_manifest(root)
        bundle = cls(root, Manifest.from_json_bytes(text), key.key if key else None)
        _check_layout(bundle)
        if key is not None:
            digests = {entry.path: entry.sha256 for entry in bundle.files}
            digests[MANIFEST_NAME] = hashlib.sha256(text).hexdigest()
            check_covers(key, digests, set(digests))
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


def _signed_by(root: Path, public_key: PublicKey | None, required: bool | None) -> SignedFiles | None:
    """What the bundle's signature covers; None where no key was given, or none is there and none is required."""
    if public_key is None:
        if required:
            raise RequestError("a signature is required but there is no key to verify it with", do="Give a public key.")
        return None
    path = root / SIGNATURE_NAME
    if not os.path.lexists(path):
        if required is False or not os.path.lexists(root / MANIFEST_NAME):  # no bundle at all is said as such
            return None
    else:
        check_regular(root, SIGNATURE_NAME)
    return read_signature(path, public_key)


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST_NAME
    if not root.is_dir() or not os.path.lexists(path):
        raise ManifestError(
            f"there is no bundle at {root}: no {MANIFEST_NAME}",
            path=MANIFEST_NAME,
            do="Give the folder that `latentrelay build` wrote.",
        )
    check_regular(root, MANIFEST_NAME)
    with path.open("rb") as file:
        return file.read(MAX_MANIFEST_BYTES + 1)


def _check_layout(bundle: Bundle) -> None:
    found = set(regular_files(bundle.path)) - {SIGNATURE_NAME}
    listed = {entry.path for entry in bundle.files} | {MANIFEST_NAME}
    for path in sorted(found - listed):
        raise BundleLayoutError(
            "the bundle holds a file that its manifest does not list", path=path, got=path, do=_AGAIN
        )
    for path in sorted(listed - found):
        raise BundleLayoutError("a file of the manifest is missing", path=path, expected=path, do=_AGAIN)


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
