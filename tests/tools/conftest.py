"""The command two ways: as a process of its own, and in this process for speed; both give status, output and JSON."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Done:
    """One finished command; `cpu_s` is processor time (0 in process)."""

    status: int
    out: str
    err: str
    cpu_s: float = 0.0

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output; anything else there is an error."""
        lines = self.out.splitlines()
        if len(lines) != 1:
            raise ValueError(f"expected one line on standard output, got {self.out!r}; standard error: {self.err}")
        document = json.loads(lines[0])
        if not isinstance(document, dict):
            raise ValueError(f"expected an object, got {document!r}")
        return document


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`command("verify", folder, "--json")` in this process."""
    from latentrelay.tools.cli import main

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(item) for item in arguments])
        out, err = capfd.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., Done]:
    """`process("--help")` as a process; `without=("torch",)` makes those modules impossible to import there."""

    def run(*arguments: object, without: tuple[str, ...] = ()) -> Done:
        words = [str(item) for item in arguments]
        start = ["-m", "latentrelay.tools.cli", *words]
        if without:
            block = f"import sys; sys.modules.update(dict.fromkeys({without!r})); "
            start = ["-c", f"{block}from latentrelay.tools.cli import main; main({words!r})"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        settings = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
        done = subprocess.run(
            [sys.executable, *start], capture_output=True, text=True, timeout=120, env=settings, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        return Done(done.returncode, done.stdout, done.stderr, cpu_s)

    return run
