"""Boards with different models on one store: each finishes its own jobs alone, and a job whose model is gone ends."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.folder_store import FolderStore
from latentrelay.cloud.job_ledger import JobLedger
from latentrelay.cloud.job_record import JobRecord
from latentrelay.cloud.jobs import JobBoard

ME = "me"
Boards = Callable[..., tuple[JobBoard, Any]]


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def record(store: FolderStore, id: str) -> JobRecord:
    entry = JobLedger(store).read(id)
    assert entry is not None
    return entry.record


def rewrite(store: FolderStore, id: str, **facts: Any) -> None:
    """Change the record of a job that nobody runs."""
    ledger = JobLedger(store)
    entry = ledger.read(id)
    assert entry is not None
    assert ledger.swap(entry, dataclasses.replace(entry.record, **facts)) is not None


def kinds(problem: Any) -> tuple[int, str]:
    return problem["status"], problem["type"].rpartition(":")[2]


def test_a_job_left_by_one_model_is_finished_by_that_model(
    store: FolderStore, boards: Boards, accept: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    first, first_runs = boards("a", paused=True)
    jobs = [accept(first, str(each), key=str(each)) for each in range(2)]
    until(lambda: first.status(jobs[0], ME).state == "running")
    first.close()
    first_runs.close()
    with caplog.at_level(logging.WARNING, "latentrelay.cloud"):
        other, runs = boards("b", ttl_s=0.5)  # it sweeps often
        until(lambda: other.open_jobs(ME) == 2)
        time.sleep(0.3)
    assert [each.message for each in caplog.records].count(
        "unfinished jobs of another model are left to a replica of that model"
    ) == 1
    assert not runs.submitted
    assert [record(store, id).state for id in jobs] == ["queued"] * 2
    same, again = boards("a")
    until(lambda: all(other.status(id, ME).state == "done" for id in jobs))
    assert [each.request.prompt for each in again.submitted] == ["0", "1"]
    assert not runs.submitted
    assert same.blob(jobs[0], ME) == other.blob(jobs[0], ME), "who knows the id reads it anywhere"


def test_draining_gives_nothing_to_another_model(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    first, first_runs = boards("a", paused=True)
    running, waiting = accept(first, "runs"), accept(first, "waits")
    until(lambda: first.status(running, ME).state == "running")
    other, foreign = boards("b")
    first.drain()
    until(lambda: other.open_jobs(ME) >= 1 and record(store, waiting).runner == "")
    first_runs.gate.set()
    first.close(drain_s=60)
    same, again = boards("a")
    until(lambda: same.status(waiting, ME).state == "done")
    assert other.status(running, ME).state == "done"
    assert [each.request.prompt for each in again.submitted] == ["waits"]
    assert not foreign.submitted


@pytest.mark.parametrize("lasts_s", [60.0, None])
def test_a_job_whose_model_never_returns_fails_when_its_time_is_over(
    store: FolderStore, boards: Boards, accept: Callable[..., str], lasts_s: float | None
) -> None:
    first, first_runs = boards("a", paused=True)
    job = accept(first, "late")
    first.close()
    first_runs.close()
    then = record(store, job).accepted
    rewrite(
        store, job, deadline_s=lasts_s, accepted=dataclasses.replace(then, boot_s=then.boot_s - (59 if lasts_s else 61))
    )
    other, runs = boards("b", tombstone_s=60.0)
    until(lambda: other.status(job, ME).state == "failed")
    expected = (504, "deadline-passed") if lasts_s else (503, "run-interrupted")
    assert kinds(other.status(job, ME).problem) == expected
    assert record(store, job).request is None, "the prompt is gone"
    assert not runs.submitted


@pytest.mark.parametrize("done", [False, True])
def test_a_key_of_another_models_job_is_refused(boards: Boards, accept: Callable[..., str], done: bool) -> None:
    first, runs = boards("a", paused=True)
    job = accept(first, "a fox", key="k")
    if done:
        runs.gate.set()
        until(lambda: first.status(job, ME).state == "done")
    else:
        until(lambda: first.status(job, ME).state == "running")
        first.close()
    other, foreign = boards("b")
    with pytest.raises(ProblemError) as caught:
        accept(other, "a fox", key="k")
    assert (caught.value.status, caught.value.kind) == (409, "other-model")
    with pytest.raises(ProblemError) as caught:
        accept(other, "another", key="k")
    assert caught.value.kind == "idempotency-key-reused", "that it is another body is said first"
    assert not foreign.submitted
    fresh = accept(other, "a fox", key="l")
    until(lambda: other.status(fresh, ME).state == "done")


def test_a_record_from_before_models_were_noted_is_adopted_by_any(
    store: FolderStore, boards: Boards, accept: Callable[..., str]
) -> None:
    first, runs = boards("a", paused=True)
    job = accept(first, "old", key="k")
    first.close()
    runs.close()
    rewrite(store, job, model="", schema_version="1.0")
    assert b'"model"' not in record(store, job).to_bytes(), "an older version reads it still"
    other, _ = boards("b")
    until(lambda: other.status(job, ME).state == "done")
    assert accept(other, "old", key="k") == job


def test_a_killed_server_and_one_with_another_model(store: FolderStore, thread_runs: Any) -> None:
    def start(model: str, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, thread_runs.__file__, str(store.folder), "--model", model, *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == "ready"
        return process

    def ask(process: subprocess.Popen[str], name: str, **arguments: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([name, arguments]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait(60)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()

    text = thread_runs.body("a fox").decode()
    first = start("a", "--step-s", "60")
    job = ask(first, "accept", text=text, key="k")["id"]
    end(first)
    other = start("b")
    try:
        mine = ask(other, "accept", text=thread_runs.body("mine").decode(), key="l")["id"]
        until(lambda: ask(other, "status", id=mine)["state"] == "done")
        assert ask(other, "accept", text=text, key="k") == {"error": "other-model"}
        same = start("a")
        try:
            until(lambda: ask(other, "status", id=job)["state"] == "done")
            assert ask(same, "prompts") == ["a fox"]
            assert ask(other, "prompts") == ["mine"]
        finally:
            end(same)
    finally:
        end(other)
