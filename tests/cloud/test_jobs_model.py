"""The job board against a model of five lines a rule: any order of accepting, running, cancelling, dying and wiping."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.job_ledger import JobLedger
from latentrelay.cloud.jobs import JobBoard, JobOptions
from latentrelay.runtime.handoff import Handoff

ME = "me"
KEYS, PROMPTS = st.sampled_from("abcd"), st.sampled_from(["fox", "owl"])


def machine(module: Any) -> type[RuleBasedStateMachine]:
    """The state machine on the runner of thread_runs.py."""

    class Boards(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.folder = Path(tempfile.mkdtemp())
            self.expected: dict[str, str] = {}  # key -> open, done, cancelled or deleted
            self.prompts: dict[str, str] = {}
            self.ids: dict[str, str] = {}
            self._open_board()

        def _open_board(self) -> None:
            self.runs = module.ThreadRuns()
            self.runs.gate.clear()
            options = JobOptions(poll_s=0.01, cache=False, max_attempts=1000)
            self.board = JobBoard(FolderStore(self.folder), self.runs, options=options)
            self.board.start()

        def _close_board(self) -> None:
            self.board.close()
            self.runs.close()

        def teardown(self) -> None:
            self._close_board()
            shutil.rmtree(self.folder)

        @rule(key=KEYS, prompt=PROMPTS)
        def accept(self, key: str, prompt: str) -> None:
            document = module.body(prompt)
            known = self.prompts.get(key)
            request = module.parsed(document)
            if known not in (None, prompt):
                with pytest.raises(ProblemError, match="another body"):
                    self.board.accept(request, document, owner=ME, key=key)
                return
            job = self.board.accept(request, document, owner=ME, key=key)
            assert job.replayed == (known is not None)
            assert self.ids.setdefault(key, job.id) == job.id
            self.prompts[key] = prompt
            self.expected.setdefault(key, "open")

        @rule(key=KEYS)
        def cancel(self, key: str) -> None:
            if key not in self.ids:
                return
            after = {"open": "cancelled", "done": "deleted"}
            self.expected[key] = after.get(self.expected[key], self.expected[key])
            assert self.board.cancel(self.ids[key], ME).state == self.expected[key]

        @rule()
        def run_all(self) -> None:
            self.runs.gate.set()
            for key, id in self.ids.items():
                if self.expected[key] == "open":
                    assert asyncio.run(self.board.wait(id, ME, timeout_s=60)).state == "done"
                    self.expected[key] = "done"
            self.runs.gate.clear()

        @rule()
        def die_and_come_back(self) -> None:
            """Ends may be in memory alone when a process dies; then the job is open again, and done in the end."""
            self._close_board()
            self._open_board()

        @rule()
        def another_replica_looks(self) -> None:
            runs = module.ThreadRuns()
            other = JobBoard(FolderStore(self.folder), runs, options=JobOptions(poll_s=0.01, cache=False))
            other.start()
            self._wait_until_written()
            for key, id in self.ids.items():
                state = other.status(id, ME).state
                assert state == self.expected[key] or (self.expected[key] == "open" and state in ("queued", "running"))
            other.close()
            assert runs.submitted == []
            runs.close()

        @invariant()
        def says_what_is_expected(self) -> None:
            for key, id in self.ids.items():
                status = self.board.status(id, ME)
                state = "open" if status.state in ("queued", "running") else status.state
                assert state == self.expected[key]
                if state == "done":
                    etag, blob = self.board.blob(id, ME)
                    assert Handoff.from_bytes(blob).digest() == etag == status.etag
                else:
                    with pytest.raises(ProblemError):
                        self.board.blob(id, ME)
            until = time.monotonic() + 60
            while self.board.open_jobs(ME) != list(self.expected.values()).count("open"):  # they are being adopted
                assert time.monotonic() < until
                time.sleep(0.002)

        @invariant()
        def prompts_are_on_disk_of_open_jobs_alone(self) -> None:
            self._wait_until_written()
            held = set()
            for path in (self.folder / "job").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    held |= {word for word in ("fox", "owl") if word.encode() in path.read_bytes()}
            assert held == {self.prompts[key] for key, state in self.expected.items() if state == "open"}

        def _wait_until_written(self) -> None:
            """Until the store knows every end."""
            ledger, until = JobLedger(FolderStore(self.folder)), time.monotonic() + 60
            for key, id in self.ids.items():
                while (entry := ledger.read(id)) is None or entry.record.open != (self.expected[key] == "open"):
                    assert time.monotonic() < until
                    time.sleep(0.002)

    return Boards


def test_the_board_does_what_its_model_says(thread_runs: Any) -> None:
    run_state_machine_as_test(
        machine(thread_runs),
        settings=settings(
            max_examples=25,
            stateful_step_count=12,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
