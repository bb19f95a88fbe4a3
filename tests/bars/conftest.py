"""What the bars share: the reference pipeline and its fp32 bundles, made once, and the writer of docs/measured/.

The bars run by name (`make bars`); they skip where the reference weights are not in the checkout.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "latentrelay",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "optimum-onnx",
    "coremltools",
    "openvino",
    "nncf",
    "numpy",
)


@pytest.fixture(scope="session")
def reference_pipeline() -> Any:
    """The shipped pipeline in float32 on the CPU. Read only."""
    from latentrelay.reference import pipeline as reference

    try:
        folder = reference.reference_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return reference.load(folder)


@pytest.fixture(scope="session")
def reference_bundle(reference_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`reference_bundle(sampler)`: the fp32 bundle of the reference pipeline, 25 steps, exported at the first call."""
    from latentrelay.export import export, load_source
    from latentrelay.reference.pipeline import GUIDANCE, NAME

    built: dict[str, Path] = {}

    def bundle(sampler: str) -> Path:
        if sampler not in built:
            folder = tmp_path_factory.mktemp("reference") / sampler.replace("+", "p")
            source = load_source(reference_pipeline, name=NAME)
            built[sampler] = export(source, "x86-laptop-vnni", folder, sampler=sampler, guidance=GUIDANCE).bundle
        return built[sampler]

    return bundle


@pytest.fixture(scope="session")
def measured() -> Callable[[str, dict[str, Any]], Path]:
    """`measured(name, figures)` writes docs/measured/<name>.json with the date, the versions and the machine."""

    def write(name: str, figures: dict[str, Any]) -> Path:
        folder = ROOT / "docs" / "measured"
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": "make bars",
            "versions": {"python": platform.python_version(), **{item: _version(item) for item in PACKAGES}},
            "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
            **figures,
        }
        path = folder / f"{name}.json"
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
        return path

    return write


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
