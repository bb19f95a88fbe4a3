"""The 224M geometry through every library in one interleaved run: what w8a8 is worth in bytes and time.

Random weights: nothing here depends on what was learnt. Half an hour of free cores and 12 GiB; figures go to
docs/measured/bench_224m.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.tools import bench
from latentrelay.tools.bench_rows import BASELINE, NNCF_ROW

ROUNDS = 9


@pytest.mark.full_size
def test_w8a8_on_the_224m_geometry(measured: Callable[[str, dict[str, Any]], Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    output = tmp_path / "bench.json"
    status = bench.run(
        geometry="hybrid-sd-224m",
        model=None,
        student=None,
        bundle=None,
        rows=[],
        threads=None,
        rounds=ROUNDS,
        work=None,
        output=output,
        as_json=True,
    )
    document = json.loads(output.read_text(encoding="utf-8"))
    measured("bench_224m", {name: value for name, value in document.items() if name not in ("machine", "versions")})
    rows = {row["name"]: row for row in document["rows"]}
    ours, float_ = rows["latentrelay-onnxruntime-w8a8"], rows["latentrelay-onnxruntime-fp32"]
    assert status == 0, {name: row["reason"] for name, row in rows.items() if row["reason"]}
    assert ours["bytes"] <= 0.30 * float_["bytes"]
    assert ours["times_faster_than"][BASELINE] >= 1.6
    assert rows["latentrelay-openvino-w8a8"]["times_faster_than"][NNCF_ROW] >= 1 / 1.1
    assert document["float_list"]["mac_share"] <= 0.05
    assert document["integer_kernels"]["convolutions"] > 0
    assert float_["snr_db"] > 80
