"""Bar: the whole of `latentrelay devices measure` on this machine, as a user runs it, twice: do the two agree?"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.device_profiles import load_profile

pytestmark = pytest.mark.slow


def measure(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "latentrelay.tools.cli", "devices", "measure", "-o", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_two_measurements_agree(tmp_path: Path, measured: Callable[[str, dict[str, Any]], Path]) -> None:
    started = time.perf_counter()
    first = measure(tmp_path / "first.toml")
    seconds = time.perf_counter() - started
    second = measure(tmp_path / "second.toml")
    one, two = load_profile(tmp_path / "first.toml"), load_profile(tmp_path / "second.toml")
    figures = {
        "seconds": round(seconds, 1),
        "busy": [run["measured"]["busy"] for run in (first, second)],
        "cpu_share": [run["measured"]["cpu_share"] for run in (first, second)],
        "unet_ms": [run["measured"]["unet_ms"] for run in (first, second)],
        "target_parameters": [each.target_unet_parameters.parameters for each in (one, two)],
        "parts": first["measured"]["parts"],
    }
    measured("measure_here", figures)
    assert one.target_precision == two.target_precision
    ratio = one.target_unet_parameters.parameters / two.target_unet_parameters.parameters
    assert 0.75 < ratio < 1.33  # quiet repeats spread by a quarter


def test_a_bundle_is_built_for_the_measured_machine(tiny: Any, tmp_path: Path) -> None:
    from latentrelay.export import export
    from latentrelay.runtime import Bundle
    from latentrelay.tools import devices_measure
    from latentrelay.tools.unet_parts import Part

    path = tmp_path / "my-box.toml"
    devices_measure.run(path, runs=5, parts=(Part("resnet", 8, 64),))
    pipeline = tiny.make_pipeline(tmp_path / "work")
    built = export(pipeline, load_profile(path), tmp_path / "bundle", num_steps=2)
    manifest = Bundle.open(built.bundle).manifest
    assert manifest.profile["name"] == "my-box"
    assert manifest.backend.session_options["intra_op_threads"] == load_profile(path).backend.threads
