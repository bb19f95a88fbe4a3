"""`bench --service` for real: both servers as processes, a few requests, every key of its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import bench_service
from latentrelay.tools.service_process import ServerEndedError, ServerProcess

KEYS = {
    "throughput_ratio", "p50_ms", "p95_ms", "p95_ratio", "lost", "duplicated", "rss_growth_mib", "overhead_p50_ms",
    "static_batch_ratio", "cpu_share", "config",
}  # fmt: skip


def test_both_servers_do_the_same_work_and_nothing_is_lost(
    tiny: Any, tiny_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save_pipeline(tiny_pipeline, tmp_path / "model")
    written = tmp_path / "bench.json"
    status = bench_service.run(
        clients=2, seconds=0.4, model=str(model), num_steps=6, split=3, threads=1, rounds=1, output=written,
        static=False,
        as_json=True,
    )  # fmt: skip
    document = json.loads(capsys.readouterr().out)
    assert status == 0
    assert document == json.loads(written.read_text())
    assert set(document) >= KEYS
    assert (document["lost"], document["duplicated"], document["damaged"]) == (0, 0, 0)
    assert document["steps_more_than_asked"] == 0
    assert document["agreement_db"] > 50
    assert document["answers"] >= 2
    assert document["throughput_ratio"] > 0
    assert document["config"]["threads"] == 1


def test_sizes_that_make_no_sense_are_refused() -> None:
    for wrong in ({"split": 0}, {"split": 26}, {"clients": 0}, {"rounds": 0}, {"seconds": 0.0}):
        with pytest.raises(RequestError, match="make no sense"):
            bench_service.run(**wrong)


def test_a_server_that_ends_at_once_says_what_it_printed() -> None:
    with (
        pytest.raises(ServerEndedError, match="this is why"),
        ServerProcess("broken", ["-c", "raise SystemExit('this is why')"], threads=1),
    ):
        pass
