"""Bars of the split: a small student with the light VAE against the all-cloud run, 512 captions of the report split.

The whole sweep, for every released student, goes to docs/measured/sweep.json and docs/images/sweep.png before any of it
is judged. A sweep killed by the system, as a process of its own, goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CAPTIONS, SEED = 512, 0
PARAMETERS, SAVING, POINTS, RATIO = 0.27, 0.66, 0.02, 1.125
PER_STUDENT_S = 15 * 60
IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


@pytest.fixture(scope="module")
def students() -> list[str]:
    from latentrelay.reference.pipeline import reference_path
    from latentrelay.tools.students import released

    found = list(released(reference_path()))
    if not found:
        pytest.skip("no student is in the checkout")
    return found


@pytest.fixture(scope="module")
def document(
    students: list[str],
    measured: Callable[[str, dict[str, Any]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("sweep")
    arguments = ["evaluate", "--sweep", "--captions", str(CAPTIONS), "--seed", str(SEED), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "latentrelay.tools.cli", *arguments, "-o", str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    measured("sweep", {**found, "command": f"latentrelay {' '.join(arguments)}"})
    shutil.copyfile(output / "sweep.png", IMAGES / "sweep.png")
    return found


def test_a_small_student_ends_near_the_cloud_at_a_third_of_its_cost(document: dict[str, Any]) -> None:
    small = {name for name, each in document["students"].items() if each["parameters_ratio"] <= PARAMETERS}
    assert small
    assert document["device_decoder"] == "light"
    cheap = [row for row in document["rows"] if row["student"] in small and 1 > row["cloud_flops_saving"] >= SAVING]
    good = [
        (row["student"], row["split"])
        for row in cheap
        if row["attribute_accuracy_difference_95"][0] >= -POINTS and row["frechet_ratio"] <= RATIO
    ]
    assert good, [
        (row["student"], row["split"], row["attribute_accuracy_difference_95"], row["frechet_ratio"]) for row in cheap
    ]


def test_device_only_stands_beside_it_and_the_smallest_is_not_the_teachers_equal(document: dict[str, Any]) -> None:
    alone = {row["student"]: row for row in document["rows"] if row["split"] == 0}
    assert set(alone) == set(document["students"])
    assert len(alone) >= 3
    smallest = min(alone, key=lambda name: document["students"][name]["parameters"])
    assert alone[smallest]["attribute_accuracy_difference_95"][1] < 0


def test_it_takes_minutes(document: dict[str, Any]) -> None:
    assert document["seconds"] < PER_STUDENT_S * len(document["students"])


def test_a_sweep_killed_by_the_system_goes_on(students: list[str], tmp_path: Path) -> None:
    arguments = ["evaluate", "--sweep", "--captions", "34", "--num-steps", "5", "--splits", "0,2", "--split", "gate"]
    command = [sys.executable, "-m", "latentrelay.tools.cli", *arguments, "--student", students[0], "--json", "-o"]
    killed = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    entries = tmp_path / "killed" / "cache"
    deadline = time.monotonic() + 600
    while len(list(entries.glob("device/*.safetensors"))) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in entries.glob("*/*.safetensors")}
    rows = {}
    for name in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / name)], capture_output=True, text=True, check=True)
        rows[name] = [
            {key: value for key, value in row.items() if not key.endswith("seconds")}
            for row in json.loads(done.stdout)["rows"]
        ]
    for row, other in zip(rows["killed"], rows["whole"], strict=True):  # floats: the last bits of two computations
        assert row == {
            key: pytest.approx(value, rel=1e-3, abs=1e-6) if isinstance(value, (float, list)) else value
            for key, value in other.items()
        }
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
