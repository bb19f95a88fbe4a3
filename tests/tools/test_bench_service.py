"""`bench --service` for real: both servers as processes, a few requests, every key of its JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
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


def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    words = "from latentrelay.tools.service_process import end_with_parent; import time; end_with_parent(0.1); "
    child = f"{words}open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(120)"
    parent = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", f"{parent}import time; time.sleep(120)", child], stdout=subprocess.PIPE, text=True
    ) as started:
        pid = int(started.stdout.readline()) if started.stdout else 0
        _wait(lambda: (tmp_path / "up").exists())
        started.kill()
    _wait(lambda: not _runs(pid))


def _wait(met: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie, which nobody may have collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
