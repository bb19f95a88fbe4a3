"""OpenMP's workers, in processes of their own: the threads of this one have long computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from latentrelay.cloud.openmp import release_workers

pytestmark = pytest.mark.skipif(not release_workers(), reason="torch was built without GNU's OpenMP")

COUNTED = """
import os, sys, torch
from latentrelay.cloud.openmp import release_workers
torch.set_num_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
"""
COMPUTED = """
before = threads()
one = torch.linspace(-1, 1, 2**20)
first = one.exp()
assert threads() == before + 1, (before, threads())
assert release_workers()
assert threads() == before
assert torch.equal(one.exp(), first)
assert threads() == before + 1
"""
SERVED = """
from latentrelay.cloud.batcher import Batcher
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
engine = Engine.load(sys.argv[1], name="tiny")
batcher = Batcher(engine)
batcher.warm_up()
torch.linspace(-1, 1, 2**20).exp()  # whatever the thread that starts it has computed
batcher.start()
for num_steps in (2, 5, 6):  # 2: prepared by the warm-up
    request = RunRequest(prompt="a", seed=1, height=16, width=16, num_steps=num_steps, split=1)
    batcher.submit(request).future.result(60)
    left = threads()
    assert release_workers()
    assert threads() == left, f"the thread that asks for {num_steps} steps has kept workers"
torch.linspace(-1, 1, 2**20).exp()
assert threads() == left + 1, "workers are not counted"
batcher.close()
"""


def passes(*words: str) -> None:
    done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_workers_end_and_come_again() -> None:
    passes(COUNTED + COMPUTED)


def test_only_the_thread_that_runs_the_network_has_workers(tiny: Any, tmp_path: Path) -> None:
    """Two pools on two processors and both wait asleep: a call of the reference network then took twice as long."""
    model = tmp_path / "model"
    tiny.save_pipeline(tiny.make_pipeline(tmp_path / "made"), model)
    passes(COUNTED + SERVED, str(model))
