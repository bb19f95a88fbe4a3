"""A device profile written as TOML: under its final name and all at once, or not at all.

In: the profile and a comment. Out: a file that `latentrelay devices validate` accepts, because it was read back by the
catalogue before it took its place. The comment lines stand on top. It decides nothing about the profile.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from latentrelay.device_profiles import DeviceProfile, ProfileFileError, validate_file
from latentrelay.device_profiles.schema import normalised
from latentrelay.runtime.errors import MISUSED, LatentRelayError, RequestError

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class ProfileExistsError(LatentRelayError):
    """The output file is there already and replacing it was not asked for."""

    exit_status = MISUSED


@contextlib.contextmanager
def profile_file(path: Path, *, overwrite: bool) -> Iterator[Callable[[DeviceProfile, str], None]]:
    """Yields `write(profile, comment)`; checks at once that `path` may be written, so that nothing is measured in vain.

    Raises RequestError for a name that no profile can have, ProfileExistsError, and OSError where the folder refuses.
    """
    check_path(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", suffix=".partial", dir=path.parent))

    def write(profile: DeviceProfile, comment: str) -> None:
        partial = beside / path.name
        partial.write_text(to_toml(profile, comment), encoding="utf-8")
        _read_back(partial, profile)
        check_path(path, overwrite=overwrite)  # again: a minute has passed
        os.replace(partial, path)

    try:
        yield write
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_path(path: Path, *, overwrite: bool) -> None:
    """Raise unless a profile may be written there."""
    if path.is_dir():
        raise RequestError("the output is a folder", got=str(path), expected="a file", do=f"Try {path / 'mine.toml'}.")
    if path.suffix != ".toml" or not _NAME.fullmatch(path.stem) or len(path.stem) > 64:
        words = re.sub(r"[^a-z0-9-]+", "-", normalised(path.stem))
        better = re.sub(r"-+", "-", words).strip("-")[:64].strip("-") or "this-machine"
        raise RequestError(
            "the file's name is the profile's name, and this cannot be one",
            got=path.name,
            expected="small letters, digits and single hyphens, at most 64, then .toml",
            do=f"Try {path.with_name(f'{better}.toml')}.",
        )
    if os.path.lexists(path) and not overwrite:
        raise ProfileExistsError(
            "the output file is there already", got=str(path), do="Give --overwrite, or another file name."
        )


def to_toml(profile: DeviceProfile, comment: str = "") -> str:
    """The profile as TOML, in the schema's order, without the keys that have no value."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join([*lines, *_table(profile.model_dump(mode="json"), "")]) + "\n"


def _read_back(path: Path, profile: DeviceProfile) -> None:
    try:
        same = validate_file(path) == profile
    except ProfileFileError as error:
        raise LatentRelayError(f"the profile that was measured does not follow the schema: {error}") from error
    if not same:
        raise LatentRelayError("the profile that was written reads back as another one", got=str(path))


def _table(table: Mapping[str, Any], prefix: str) -> list[str]:
    """Plain keys first, because a key after a header belongs to that table; then tables and lists of tables."""
    plain = {key: value for key, value in table.items() if value is not None and not _is_nested(value)}
    lines = [f"{key} = {_value(value)}" for key, value in plain.items()]
    for key, value in table.items():
        if isinstance(value, dict):
            if value:
                lines += ["", f"[{prefix}{_key(key)}]", *_table(value, f"{prefix}{_key(key)}.")]
        elif _is_nested(value):
            for row in value:
                lines += ["", f"[[{prefix}{_key(key)}]]", *_table(row, f"{prefix}{_key(key)}.")]
    return lines


def _is_nested(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):  # JSON's escapes are TOML's, but TOML refuses a bare DEL and half characters
        whole = value.encode("utf-8", "replace").decode().replace("\x7f", "")
        return json.dumps(whole, ensure_ascii=False)
    return json.dumps(value)
