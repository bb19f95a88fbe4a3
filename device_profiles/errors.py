"""Errors of the device profiles. Each message says what, got, expected and what to do.

ProfileError
├── UnknownProfileError    no profile has that name or alias                         (exit status 2: misused)
└── ProfileFileError       a profile file cannot be read or does not follow the schema (exit status 3: refused)
"""

from __future__ import annotations

from pathlib import Path


class ProfileError(Exception):
    """Something is wrong with a device profile or with the request for one."""

    exit_status: int = 1


class UnknownProfileError(ProfileError):
    """No profile has the requested name or alias; `nearest` is the closest one that exists, if any is close."""

    exit_status = 2

    def __init__(self, message: str, *, name: str, nearest: str | None, available: tuple[str, ...]) -> None:
        super().__init__(message)
        self.name = name
        self.nearest = nearest
        self.available = available


class ProfileFileError(ProfileError):
    """A profile file is missing, not TOML, or against the schema; `path` is the file, `key` the dotted key if known."""

    exit_status = 3

    def __init__(self, message: str, *, path: Path, key: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.key = key
