"""What a predicted step of the 224M geometry costs, in w8a8 graphs, interleaved in one process and on one thread.

Random weights: nothing here depends on what was learnt. A quarter of an hour of a free core and 12 GiB; figures go to
docs/measured/predicted_224m.json. The command on a tiny network is here too: it exports and quantises for a minute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.tools import bench_predicted
from latentrelay.tools.predicted_graphs import VARIANTS

ROUNDS = 7


def run(geometry: str, work: Path) -> dict[str, Any]:
    output = work / "predicted.json"
    status = bench_predicted.run(
        geometry=geometry, threads=1, rounds=ROUNDS, work=work / "graphs", output=output, as_json=True
    )
    assert status == 0
    document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return document


@pytest.mark.slow
def test_the_command_on_a_tiny_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run("tiny", tmp_path)
    assert json.loads(capsys.readouterr().out) == document
    assert [row["name"] for row in document["rows"]] == [each.name for each in VARIANTS]
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "graphs").iterdir()} == {
        "network", "ours-fp32-onnxruntime", "ours-w8a8-onnxruntime", "predicted"
    }  # fmt: skip


@pytest.mark.full_size
def test_predicted_steps_of_the_224m_geometry(measured: Callable[[str, dict[str, Any]], Path], tmp_path: Path) -> None:
    document = run("hybrid-sd-224m", tmp_path)
    measured("predicted_224m", {name: value for name, value in document.items() if name not in ("machine", "versions")})
    deep, whole = document["targets"]["deep_feature"], document["targets"]["whole_output"]
    assert deep["time_ratio"] <= 0.25
    assert whole["time_ratio"] <= 0.05
    assert document["selection_over_full"] <= 0.02
    assert deep["flop_share"] == pytest.approx(0.1726, abs=0.001)  # what pruning left of the deep layers is less
    assert whole["flop_share"] == 0.0
