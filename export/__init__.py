"""Export: a diffusers pipeline and a device profile -> a bundle. `export(pipeline, profile, out)` is the whole of it.

Names resolve when first used, so importing this package loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrelay.export.build_bundle import ExportResult, export
    from latentrelay.export.source import SourceModel, load_source

__all__ = ["ExportResult", "SourceModel", "export", "load_source"]

_HOMES = {
    "ExportResult": "build_bundle",
    "export": "build_bundle",
    "SourceModel": "source",
    "load_source": "source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
