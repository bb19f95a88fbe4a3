"""Real server processes for the faults: the tiny pipeline in a folder, and the modules beside this file as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def _beside(name: str) -> ModuleType:
    known = f"faults_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


@pytest.fixture(scope="session")
def processes() -> Any:
    """tests/faults/server_process.py."""
    return _beside("server_process")


@pytest.fixture(scope="session")
def proxies() -> Any:
    """tests/faults/cutting_proxy.py."""
    return _beside("cutting_proxy")


@pytest.fixture(scope="session")
def model_folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a diffusers folder."""
    work = tmp_path_factory.mktemp("faults")
    return Path(tiny.save_pipeline(tiny.make_pipeline(work / "work"), work / "tiny"))


@pytest.fixture(scope="session")
def server(processes: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One server process, with its store on a small file system of its own where this user may mount one.

    A test calls `server.ensure()` first: it may find the server dead, its store full or its clock wrong.
    """
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        small = stack.enter_context(processes.small_file_system(folder / "small", mib=64))
        store = folder / "small" / "store" if small else folder / "store"
        yield stack.enter_context(processes.ServerProcess(model_folder, folder, store=store, small=small))
