"""coremltools, imported once and held quiet: on Linux it logs eight lines about frameworks that only macOS has.

`quiet()` holds back its progress bars, its notes on the torch version and the tracer's warnings while a block runs;
errors still come out as exceptions. Nothing is changed for good: the logger's level is put back.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from latentrelay.export.errors import ExportError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No coremltools notes, progress bars or tracer warnings inside."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


try:
    with quiet():
        import coremltools
        from coremltools.converters.mil.frontend.milproto import load as milproto
except ModuleNotFoundError as error:
    raise ExportError(
        f"Core ML packages need {error.name}, which is not installed", do="Run: pip install latentrelay[export]"
    ) from error

__all__ = ["coremltools", "milproto", "quiet"]
