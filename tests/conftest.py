"""Fixtures shared by the folders, and the named list of third-party warnings that are not ours to fix.

`tiny` is tests/tiny_pipeline.py as a module; `tiny_bundle` is one fp32 bundle exported once for the whole session.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

THIRD_PARTY_WARNINGS = (
    # diffusers 0.39's DPM-Solver++ calls np.array() on a tensor; torch 2.13 and numpy 2 disagree about `copy`
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    # torch.onnx of torch 2.13 pickles its own deprecated LeafSpec
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    # optimum reads configuration entries as attributes
    "ignore:Accessing config attribute:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in THIRD_PARTY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def load_tiny_pipeline() -> ModuleType:
    """tests/tiny_pipeline.py, imported once under its own name."""
    if "tiny_pipeline" not in sys.modules:
        spec = importlib.util.spec_from_file_location("tiny_pipeline", Path(__file__).with_name("tiny_pipeline.py"))
        if spec is None or spec.loader is None:
            raise ImportError("tests/tiny_pipeline.py is missing")
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_pipeline"] = module
        spec.loader.exec_module(module)
    return sys.modules["tiny_pipeline"]


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The factory module: `tiny.make_pipeline(folder, ...)`, `tiny.save_pipeline(pipeline, folder)`."""
    return load_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pipeline behind `tiny_bundle`: epsilon prediction, 16x16 pixels. Read only."""
    return tiny.make_pipeline(tmp_path_factory.mktemp("tiny-pipeline"))


@pytest.fixture(scope="session")
def tiny_export(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One fp32 export of `tiny_pipeline` (DPM-Solver++(2M), 25 steps, static shapes), made once: an ExportResult."""
    from latentrelay.export import export

    return export(tiny_pipeline, "pixel-8", tmp_path_factory.mktemp("tiny-export") / "bundle")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Any) -> Path:
    """The folder of `tiny_export`. Read only: copy it before changing anything."""
    return Path(tiny_export.bundle)
