"""Digests: of files, of JSON documents in canonical form, and of weights whatever file format they came in.

A digest of a document or of weights is written "sha256:<64 hex digits>"; a file's, as in manifests, is bare hex.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IGNORED_WEIGHTS = ("text_model.embeddings.position_ids",)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Bare hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(obj: object) -> bytes:
    """The one byte form of a JSON document: sorted keys, no spaces, UTF-8, no NaN. Raises ValueError or TypeError."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def json_digest(obj: object) -> str:
    """ "sha256:<hex>" of the canonical form."""
    return "sha256:" + hashlib.sha256(canonical_json(obj)).hexdigest()


def weights_digest(named: Iterable[tuple[str, NDArray[Any]]]) -> str:
    """ "sha256:<hex>" of named arrays, in the order of their names.

    Floating arrays are hashed as little-endian float32, integers and booleans as int64, in C order, each after its
    name, kind and shape. So fp16 and fp32 files of the same values agree, and order and file format do not matter.
    CLIP's `position_ids` buffer, which some versions save and some do not, is left out. Raises ValueError on a
    repeated name or another kind of array.
    """
    digest = hashlib.sha256()
    last: str | None = None
    for name, array in sorted(named, key=lambda pair: pair[0]):
        if name == last:
            raise ValueError(f"two arrays are called {name!r}; prefix the names with their component")
        last = name
        if name.endswith(_IGNORED_WEIGHTS):
            continue
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name}: got dtype {array.dtype}, expected floats, integers or booleans")
        kind = "<f4" if array.dtype.kind == "f" else "<i8"
        shape = ",".join(str(size) for size in array.shape)
        digest.update(f"{name}\0{kind}\0{shape}\0".encode())
        digest.update(np.ascontiguousarray(array, dtype=kind).tobytes())
    return "sha256:" + digest.hexdigest()
