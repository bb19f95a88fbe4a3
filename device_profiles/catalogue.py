"""The catalogue of device profiles: TOML files in this folder and, before them, in a folder of the user's own.

In: a name, an alias or a path. Out: a validated `DeviceProfile`. A user's profile wins every name and alias over those
shipped here. Errors name the file, the key, what was got and what was expected; unknown names list what exists.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from latentrelay.device_profiles.errors import ProfileFileError, UnknownProfileError
from latentrelay.device_profiles.schema import DeviceProfile, normalised
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHIPPED = Path(__file__).parent
_MAX_BYTES = 1 << 20


def list_profiles(folder: str | os.PathLike[str] | None = None) -> tuple[DeviceProfile, ...]:
    """Every profile, by name: the shipped ones and those in `folder`.

    What a user's profile is called is the user's: a shipped profile of that name is left out, and an alias that the
    user's profile has as a name or an alias is taken from the shipped one. Raises ProfileFileError for a folder that
    does not exist, a broken file, or two profiles of one folder that share an alias; the message names both files.
    """
    own = _read_folder(Path(folder)) if folder is not None else []
    taken = {name for profile, _ in own for name in _names(profile)}
    shipped = [
        _without(profile, taken) for profile, _ in _read_folder(_SHIPPED) if normalised(profile.name) not in taken
    ]
    return tuple(sorted([*shipped, *(profile for profile, _ in own)], key=lambda profile: profile.name))


def load_profile(name_or_path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> DeviceProfile:
    """One profile by name, alias or path of a TOML file (anything with a separator or ending in .toml is a path).

    Raises UnknownProfileError, which lists what exists and the nearest match, and ProfileFileError.
    """
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, os.PathLike) or text.endswith(".toml") or "/" in text or os.sep in text:
        return validate_file(text)
    profiles = list_profiles(folder)
    for profile in profiles:
        if profile.answers_to(text):
            return profile
    raise _unknown(text, profiles)


def validate_file(path: str | os.PathLike[str]) -> DeviceProfile:
    """The profile in one TOML file, whose stem must be the profile's name. Raises ProfileFileError."""
    path = Path(path)
    content = _read(path)
    try:
        document = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ProfileFileError(
            f"{path}: got a date or a number that is not finite ({error}), expected strings, numbers, true or false",
            path=path,
        ) from error
    try:
        # JSON mode keeps strictness and still takes arrays as tuples.
        profile = DeviceProfile.model_validate_json(document, strict=True)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_url=False)]
        key = _dotted(error.errors()[0]["loc"]) or None
        raise ProfileFileError(f"{path}: " + "; ".join(lines), path=path, key=key) from error
    if profile.name != path.stem:
        raise ProfileFileError(
            f"{path}: key 'name': got {profile.name!r}, expected the file's own name {path.stem!r}; rename one of them",
            path=path,
            key="name",
        )
    return profile


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ProfileFileError(f"{folder}: no such folder, expected a folder of device profiles (*.toml)", path=folder)
    return sorted(folder.glob("*.toml"))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ProfileFileError(f"{path}: larger than {_MAX_BYTES} bytes, expected a device profile", path=path)
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileFileError(
            f"{path}: cannot be read ({error.strerror}), expected a TOML file; check the path, or give a name from "
            "`latentrelay devices list`",
            path=path,
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProfileFileError(f"{path}: not TOML: {error}; correct the file there", path=path) from error


def _read_folder(folder: Path) -> list[tuple[DeviceProfile, Path]]:
    entries = [(validate_file(path), path) for path in _files(folder)]
    _refuse_shared_names(entries)
    return entries


def _refuse_shared_names(entries: Iterable[tuple[DeviceProfile, Path]]) -> None:
    owner: dict[str, Path] = {}
    for profile, path in entries:
        for name in _names(profile):
            if name in owner:
                raise ProfileFileError(
                    f"{path}: key 'aliases': {name!r} is already a name or alias in {owner[name]}, expected each once; "
                    "take it out of one of them",
                    path=path,
                    key="aliases",
                )
            owner[name] = path


def _names(profile: DeviceProfile) -> set[str]:
    return {normalised(each) for each in (profile.name, *profile.aliases)}


def _without(profile: DeviceProfile, taken: set[str]) -> DeviceProfile:
    kept = tuple(alias for alias in profile.aliases if normalised(alias) not in taken)
    return profile if kept == profile.aliases else profile.model_copy(update={"aliases": kept})


def _unknown(name: str, profiles: tuple[DeviceProfile, ...]) -> UnknownProfileError:
    spelling = {normalised(each): profile.name for profile in profiles for each in (profile.name, *profile.aliases)}
    close = difflib.get_close_matches(normalised(name), spelling, n=1, cutoff=0.5)
    nearest = spelling[close[0]] if close else None
    available = tuple(profile.name for profile in profiles)
    hint = f" Did you mean {nearest!r}?" if nearest else ""
    return UnknownProfileError(
        f"No device profile is called {name!r}.{hint} There are: {', '.join(available)}. Or give the path of a TOML "
        "file of your own.",
        name=name,
        nearest=nearest,
        available=available,
    )


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _explain(detail: ErrorDetails) -> str:
    key = _dotted(detail["loc"])
    if detail["type"] == "extra_forbidden":
        allowed = _allowed_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        return f"key '{key}': got an unknown key, expected one of {', '.join(allowed)}{hint}"
    if detail["type"] == "missing":
        return f"key '{key}': got nothing, expected a value; add the key"
    if detail["type"] == "value_error":
        return f"{f'key {key!r}: ' if key else ''}{detail['msg'].removeprefix('Value error, ')}"
    expected = detail["msg"].removeprefix("Input should be ")
    return f"key '{key}': got {_short(detail['input'])}, expected {expected}"


def _short(value: object) -> str:
    text = f"{value!r} ({type(value).__name__})"
    return text if len(text) <= 120 else text[:117] + "..."


def _allowed_keys(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = DeviceProfile
    for part in loc:
        if isinstance(part, str):
            model = _model_of(model.model_fields[part].annotation)
    return sorted(model.model_fields)


def _model_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_of, typing.get_args(annotation))), None)
