"""How commands speak: rich for people, one JSON object on standard output for machines; errors become exit statuses.

0 done, 1 failed, 2 misused, 3 refused. With `--json` nothing but the object goes to standard output; progress and
messages go to standard error always.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from latentrelay.runtime.errors import MissingExtraError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

FAILED = 1
err = Console(stderr=True, highlight=False, soft_wrap=True)


def emit(document: Mapping[str, Any], as_json: bool, show: Callable[[Console], None]) -> None:
    """Print the JSON object, or let `show` print for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, allow_nan=False) + "\n")
    else:
        show(Console(highlight=False, soft_wrap=True))


def table(columns: list[str], rows: list[list[Any]], title: str | None = None) -> Table:
    """A plain table; the first column holds names, the rest are numbers."""
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        out.add_row(*(printable(cell) for cell in row))
    return out


def report_error(error: BaseException, as_json: bool, status: int | None = None) -> int:
    """Print an error for its reader; the exit status to end with."""
    status = int(getattr(error, "exit_status", FAILED)) if status is None else status
    words = getattr(error, "format_message", None)  # a usage error names its parameter there only
    reason = words() if callable(words) else str(error)
    if as_json:
        facts = {name: getattr(error, name, None) for name in ("path", "field", "status")}
        document = {"ok": False, "error": type(error).__name__, "reason": reason, "exit_status": status}
        document |= {name: str(value) for name, value in facts.items() if value is not None}
        sys.stdout.write(json.dumps(document) + "\n")
    err.print(f"[bold red]latentrelay:[/] {printable(reason)}")
    return status


def printable(words: object) -> str:
    """Text from outside as rich prints it literally: no markup, and no half characters (file names may hold some)."""
    return escape(str(words).encode("utf-8", "backslashreplace").decode())


@contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Turn a missing optional dependency into the error that says which extra brings it.

    What the libraries say while they load (progress bars, notes on other packages) is left out: the commands have
    their own progress lines. DIFFUSERS_VERBOSITY and TRANSFORMERS_VERBOSITY still hold where they are set.
    """
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("diffusers.utils.import_utils").setLevel(logging.ERROR)
    try:
        yield
        if "diffusers" in sys.modules:
            sys.modules["diffusers"].utils.logging.disable_progress_bar()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("latentrelay"):
            raise
        raise MissingExtraError(error.name, name, purpose=purpose) from error


@contextmanager
def counting(words: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    """A progress line on standard error; call `advance(words, by)`. Silent where standard error is not a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(words, total=total)

        def advance(now: str = words, by: int = 1) -> None:
            progress.update(bar, description=now, advance=by)

        yield advance
