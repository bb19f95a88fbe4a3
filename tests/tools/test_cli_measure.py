"""`latentrelay devices measure`: a small part of the U-Net really timed here, the file it writes, and what is refused.

The whole measurement takes a minute and runs as a bar (tests/bars/test_measure_here.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.device_profiles import load_profile
from latentrelay.runtime.errors import SessionError
from latentrelay.tools import devices_measure
from latentrelay.tools.time_graphs import chosen_providers, time_parts, time_runs
from latentrelay.tools.unet_parts import Part

Run = Callable[..., Any]
SMALL = (Part("resnet", 8, 64), Part("transformer", 16, 64))


def test_a_profile_of_this_machine(command: Run, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "my-box.toml"
    devices_measure.run(path, runs=5, as_json=True, parts=SMALL, provider=["CPUExecutionProvider"])
    document = json.loads(capfd.readouterr().out)
    assert (document["ok"], document["name"], document["path"]) == (True, "my-box", str(path))
    assert [item.name for item in path.parent.iterdir()] == ["my-box.toml"]
    assert command("devices", "validate", path, "--json").json["ok"]
    assert command("devices", "show", path, "--json").json == document["profile"]
    profile = load_profile(path)
    assert profile.memory.application_ceiling_mib <= 0.75 * profile.memory.total_mib
    assert profile.backend.threads == document["measured"]["machine"]["cores"] <= len(os.sched_getaffinity(0))
    rows = document["measured"]["parts"]
    precisions = {"fp32", "w8a8"} if profile.support.int8 else {"fp32"}
    assert {row["precision"] for row in rows} == precisions
    assert len(rows) == len(SMALL) * len(precisions)
    assert all(0 < row["fastest_ms"] <= row["ms"] <= row["slowest_ms"] and row["runs"] == 5 for row in rows)
    measured = [each for each in profile.latency if each.label == "measured"]
    for anchor in measured:
        total = sum(row["ms"] for row in rows if row["precision"] == anchor.precision)
        assert anchor.ms == pytest.approx(total, abs=0.1)
    assert [each.label for each in profile.latency] == ["estimate"] * len(measured) + ["measured"] * len(measured)
    listed = command("devices", "list", "--profiles", path.parent, "--json").json["profiles"]
    assert "my-box" in {item["name"] for item in listed}


def test_for_people(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    devices_measure.run(tmp_path / "my-box.toml", runs=5, parts=SMALL[:1])
    said = capfd.readouterr().out
    assert "resnet 64 at 8x8, fp32" in said
    assert f"latentrelay build --device {tmp_path / 'my-box.toml'}" in said


def test_a_bundles_graphs_are_timed_too(tiny_bundle: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "my-box.toml"
    devices_measure.run(path, runs=5, as_json=True, parts=SMALL[:1], bundle=tiny_bundle)
    assert json.loads(capfd.readouterr().out)["ok"]
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    anchors = [each for each in load_profile(path).latency if "bundle sha256:" in str(each.conditions)]
    assert [each.component for each in anchors] == ["unet", "vae_decoder", "text_encoder"]
    for each in anchors:
        assert (each.label, each.precision) == ("measured", "fp32")
        assert each.model.endswith(f"{manifest['image']['height']}x{manifest['image']['width']}")
        assert ("divided by 2 branches" in str(each.conditions)) == (each.component != "vae_decoder")


def test_a_build_takes_the_measured_file(capfd: pytest.CaptureFixture[str], command: Run, tmp_path: Path) -> None:
    """As far as the model, which is not there; the bar builds a whole bundle."""
    devices_measure.run(tmp_path / "my-box.toml", runs=5, as_json=True, parts=SMALL[:1])
    done = command("build", "-m", tmp_path / "gone", "-d", tmp_path / "my-box.toml", "-o", tmp_path / "b", "--json")
    assert (done.status, done.json["ok"]) != (0, True)
    assert "gone" in done.json["reason"]


def test_it_needs_the_base_install_only(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'diffusers', 'transformers', 'optimum')))\n"
        "from pathlib import Path; from latentrelay.tools import devices_measure as m\n"
        "from latentrelay.tools.unet_parts import Part\n"
        f"m.run(Path({str(tmp_path / 'my-box.toml')!r}), runs=5, as_json=True, parts=(Part('resnet', 8, 64),))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"]


def test_medians_spread_and_warm_ups() -> None:
    calls: list[int] = []
    timing = time_runs("counted", lambda: calls.append(sum(range(20_000))), runs=5, threads=1)
    assert len(calls) == 7
    assert timing.runs == 5
    assert 0 < timing.fastest_ms <= timing.ms <= timing.slowest_ms
    assert 0 < timing.cpu_share <= 1


def test_a_part_that_cannot_be_run_is_named() -> None:
    with pytest.raises(SessionError, match="transformer 12 at 16x16"):
        time_parts(
            (Part("transformer", 16, 12),),  # 12 channels do not divide into 8 heads
            int8=False,
            providers=("CPUExecutionProvider",),
            threads=1,
            runs=5,
            progress=lambda words: None,
        )


def test_remote_providers_are_never_taken() -> None:
    assert "AzureExecutionProvider" not in chosen_providers([])
    assert chosen_providers([])[-1] == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-o", "My Box.toml"], 2, "my-box.toml"),
        (["-o", "box.json"], 2, "box.toml"),
        (["-o", "."], 2, "is a folder"),
        (["-o", "there.toml"], 2, "--overwrite"),
        (["-o", "box.toml", "--runs", "4"], 2, "5 or more"),
        (["-o", "box.toml", "--provider", "NoSuchExecutionProvider"], 2, "CPUExecutionProvider"),
        (["-o", "box.toml", "--bundle", "nowhere"], 3, "no bundle"),
        (["-o", "there.toml/box.toml"], 1, "there.toml"),
        (["-o", "/proc/no/box.toml"], 1, "/proc/no"),
        (["extra"], 2, "extra"),
    ],
)
def test_what_is_refused_before_anything_is_timed(
    arguments: list[str], status: int, words: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.toml").write_text("precious")
    done = command("devices", "measure", *arguments, "--json")
    assert (done.status, done.json["ok"]) == (status, False), done.out
    assert words in done.json["reason"]
    assert (tmp_path / "there.toml").read_text() == "precious"
    assert [item.name for item in tmp_path.iterdir()] == ["there.toml"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="limits a process as Linux does")
def test_too_small_a_machine_says_what_is_needed(tmp_path: Path) -> None:
    """2000 MiB of address space: a ceiling of 1500, less than the U-Net's largest part needs."""
    command = f"ulimit -v {2000 * 1024} && exec {sys.executable} -m latentrelay.tools.cli devices measure --json"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    document = json.loads(done.stdout)
    assert (done.returncode, document["error"]) == (3, "TooSmallError"), done.stderr
    assert "a ceiling of 1500 MiB" in document["reason"]
    assert list(tmp_path.iterdir()) == []
