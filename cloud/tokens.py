"""Who may call: bearer tokens in, a named `Caller` with its limits out, or a 401.

Tokens come from one value or from a TOML file of [[token]] tables (name; token, or the hex sha256 of one; limits),
which is read again when it changes. A given token is compared in constant time with every entry, by digest; only
digests are held. Not an account system: a name is what logs, metrics and quotas say, and two tokens may share one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from latentrelay.cloud.errors import ProblemError
from latentrelay.runtime.errors import RequestError
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

_log = logging.getLogger("latentrelay.cloud")
_MAX_HEADER_CHARS = 4096
_MAX_FILE_BYTES = 2**20
_VISIBLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True)
class CallerLimits:
    """What one name may use; None is unlimited. Steps are denoising steps asked for, per UTC day."""

    requests_per_minute: int | None = None
    open_jobs: int | None = None
    steps_per_day: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who sent a request. `name` may stand in logs and metrics: it is the operator's word, never the client's."""

    name: str
    limits: CallerLimits = CallerLimits()


ANONYMOUS = Caller("anonymous")


class _Entry(BaseModel):
    """One [[token]] table."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    token: Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[\x21-\x7e]+$")] | None = None
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    open_jobs: Annotated[int, Field(ge=1)] | None = None
    steps_per_day: Annotated[int, Field(ge=1)] | None = None


class _File(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", hide_input_in_errors=True)

    token: Annotated[list[_Entry], Field(min_length=1)]


class Tokens:
    """The tokens of one service. Safe to use from several threads."""

    def __init__(self, entries: Sequence[tuple[bytes, Caller]] | None, *, path: Path | None = None) -> None:
        self._entries = None if entries is None else tuple(entries)
        self._path = path
        self._stamp = _stamp(path) if path else None
        self._lock = threading.Lock()

    @classmethod
    def none(cls) -> Tokens:
        """Everyone may call, as "anonymous", without limits."""
        return cls(None)

    @classmethod
    def single(cls, token: str, *, name: str = "default", limits: CallerLimits = CallerLimits()) -> Tokens:
        """One token. Raises RequestError if it is empty or not one line of text."""
        if not token or any(ord(each) < 32 or ord(each) == 127 for each in token) or token != token.strip():
            raise RequestError("the token is empty, not one line, or begins or ends with a space", do="Give another.")
        return cls([(_digest(token), Caller(name, limits))])

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokens:
        """The tokens of a TOML file, read again when it changes. Raises RequestError naming the place, no token."""
        file = Path(path)
        stamp = _stamp(file)
        tokens = cls(_read(file), path=file)
        tokens._stamp = stamp
        return tokens

    @property
    def open(self) -> bool:
        """Whether no token is needed."""
        return self._entries is None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all callers there can be, sorted."""
        return (
            tuple(sorted({caller.name for _, caller in self._entries})) if self._entries is not None else ("anonymous",)
        )

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller of an `Authorization` header's value. Raises ProblemError 401, the same whatever was wrong."""
        if self._entries is None:
            return ANONYMOUS
        self._reload()
        text = authorization or ""
        scheme, _, given = text[:_MAX_HEADER_CHARS].partition(" ")
        digest = _digest(given.strip(" "))
        found: Caller | None = None
        for held, caller in self._entries:  # every entry is compared: the time says nothing about which one fits
            if hmac.compare_digest(digest, held):
                found = caller
        if found is None or scheme.lower() != "bearer" or len(text) > _MAX_HEADER_CHARS:
            raise ProblemError(
                401,
                "unauthorised",
                "This service needs its token as Authorization: Bearer.",
                field="authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found

    def _reload(self) -> None:
        """Take a changed file; one that cannot be read leaves the tokens as they were, and the log says so once."""
        if self._path is None:
            return
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        with self._lock:
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._entries = tuple(_read(self._path))
            except RequestError as error:
                _log.error("the changed tokens file is not used, the tokens before it are: %s", error)
            else:
                _log.info("the tokens file changed: %d tokens", len(self._entries))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _read(path: Path) -> list[tuple[bytes, Caller]]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _bad(error.strerror or type(error).__name__) from None
    if len(text) > _MAX_FILE_BYTES:
        raise _bad(f"more than {_MAX_FILE_BYTES} bytes")
    try:
        document = _File.model_validate(tomllib.loads(text.decode("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _bad(f"not TOML ({_place(error)})") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _bad(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    return [_entry(row, entry) for row, entry in enumerate(document.token)]


def _entry(row: int, entry: _Entry) -> tuple[bytes, Caller]:
    if (entry.token is None) == (entry.sha256 is None):
        raise _bad(f"token.{row}: give either token or sha256")
    digest = _digest(entry.token) if entry.token is not None else bytes.fromhex(entry.sha256 or "")
    limits = CallerLimits(entry.requests_per_minute, entry.open_jobs, entry.steps_per_day)
    return digest, Caller(entry.name, limits)


def _place(error: Exception) -> str:
    """Where the text is wrong, without the text: messages of parsers may quote what they read."""
    found = re.search(r"line \d+, column \d+", str(error))
    return found.group() if found else type(error).__name__


def _bad(what: str) -> RequestError:
    return RequestError(
        "the tokens file cannot be used",
        got=what,
        expected="[[token]] tables with name and token or sha256, and any of requests_per_minute, open_jobs, "
        "steps_per_day",
        do="Correct the file.",
    )
