"""A runner for the job board's tests: real threads and real handoffs, no network. Also a program: a board in a process.

`python thread_runs.py <store> [--places N] [--limit N] [--step-s S] [--poll-s S] [--model M]` reads one JSON command a
line and answers one JSON line each: accept, status, blob, cancel, close.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.cloud.errors import DeadlinePassedError, ProblemError, QueueFullError, RefusedError, RunCancelled
from latentrelay.cloud.requests import RunRequest, parse_request
from latentrelay.runtime.handoff import Handoff, HandoffMeta, prompt_digest


def body(prompt: str = "a fox", **facts: Any) -> bytes:
    """A request document."""
    document = {"prompt": prompt, "seed": 1, "height": 16, "width": 16, "num_steps": 8, "split": 4, **facts}
    return json.dumps(document).encode()


def parsed(document: bytes) -> RunRequest:
    """The request in a document."""
    from latentrelay.cloud.limits import Limits

    return parse_request(document, Limits())


def handoff(request: RunRequest, steps: int | None = None) -> Handoff:
    """Latents that depend on the request alone."""
    noise = np.random.default_rng([request.seed, len(request.prompt)])
    meta = HandoffMeta(
        model_family="sd1",
        model_digest="sha256:" + "0" * 64,
        scheduler_class="DDIMScheduler",
        scheduler_digest="sha256:" + "1" * 64,
        num_steps=request.num_steps,
        timesteps=tuple(float(each) for each in range(request.num_steps, 0, -1)),
        next_step=request.split if steps is None else steps,
        prediction_type="epsilon",
        guidance=request.guidance,
        scaling_factor=0.18215,
        shift_factor=0.0,
        seed=request.seed,
        init_noise_sigma=1.0,
        height=request.height,
        width=request.width,
        dtype=request.dtype,
        prompt_salt="00" * 16,
        prompt_digest=prompt_digest("00" * 16, request.prompt, request.negative_prompt),
        producer={"name": "thread_runs"},
    )
    return Handoff(noise.standard_normal((1, 4, 64, 64)).astype(request.dtype), None, meta)


class TooLarge(Handoff):
    """A result for whose bytes there is no memory."""

    def to_bytes(self) -> bytes:
        raise MemoryError


@dataclass(frozen=True)
class Step:
    step: int
    preview: tuple[int, int, bytes] | None = None


class Ticket:
    def __init__(self, runs: ThreadRuns, request: RunRequest, deadline_s: float | None, on_step: Any) -> None:
        self.future: Future[Handoff] = Future()
        self.request, self.deadline_s, self.on_step = request, deadline_s, on_step
        self.cancelled = threading.Event()
        self._runs = runs

    def cancel(self) -> None:
        self.cancelled.set()
        self._runs.leave(self)

    def queue_position(self) -> int | None:
        waiting = list(self._runs.waiting)
        return waiting.index(self) if self in waiting else None


class ThreadRuns:
    """`places` threads; a step takes step_s, or waits for `gate` where that is clear. A prompt may ask for trouble."""

    def __init__(self, *, places: int = 1, limit: int = 64, step_s: float = 0.0) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.waiting: list[Ticket] = []
        self.submitted: list[Ticket] = []
        self.finished = 0
        self.refusal: Exception | None = None
        self._limit, self._step_s = limit, step_s
        self._changed = threading.Condition()
        self._running = 0
        self._ends = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(places)]
        for thread in self._threads:
            thread.start()

    def forget(self, owner: str) -> None:
        """Nothing: it keeps no results."""

    def submit(
        self, request: RunRequest, *, deadline_s: float | None = None, on_step: Any = None, owner: str = ""
    ) -> Ticket:
        if self.refusal is not None:
            raise self.refusal
        with self._changed:
            if len(self.waiting) + self._running >= self._limit:
                raise QueueFullError(len(self.waiting), 1)
            ticket = Ticket(self, request, deadline_s, on_step)
            self.waiting.append(ticket)
            self.submitted.append(ticket)
            self._changed.notify()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        with self._changed:
            waits = ticket in self.waiting
            if waits:
                self.waiting.remove(ticket)
        if waits:
            ticket.future.set_exception(RunCancelled("cancelled while it waited"))

    def close(self) -> None:
        self._ends = True
        self.gate.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(30)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self.waiting and not self._ends:
                    self._changed.wait()
                if self._ends:
                    return
                ticket = self.waiting.pop(0)
                self._running += 1
            try:
                ticket.future.set_result(self._made(ticket))
            except Exception as error:
                ticket.future.set_exception(error)
            finally:
                with self._changed:
                    self._running -= 1

    def _made(self, ticket: Ticket) -> Handoff:
        request, since = ticket.request, time.monotonic()
        for step in range(1, request.split + 1):
            while not self.gate.wait(0.01) and not ticket.cancelled.is_set():
                pass
            time.sleep(self._step_s)
            if ticket.cancelled.is_set() or self._ends:
                raise RunCancelled(f"before step {step}")
            if ticket.deadline_s is not None and time.monotonic() - since > ticket.deadline_s:
                raise DeadlinePassedError("too late")
            if request.prompt == "break":
                raise RuntimeError("a secret of the host")
            if request.prompt == "die":
                import os
                import signal

                ticket.on_step(Step(step))
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            ticket.on_step(Step(step, (1, 1, bytes(3)) if request.preview else None))
        self.finished += 1
        made = handoff(request)
        return TooLarge(made.latents, None, made.meta) if request.prompt == "too large" else made


def main() -> None:
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.jobs import JobBoard, JobOptions

    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--places", type=int, default=1)
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--poll-s", type=float, default=0.05)
    parser.add_argument("--model", default="m")
    options = parser.parse_args()
    runs = ThreadRuns(places=options.places, limit=options.limit, step_s=options.step_s)
    board = JobBoard(FolderStore(options.store), runs, options=JobOptions(poll_s=options.poll_s), model=options.model)
    board.start()
    commands: dict[str, Callable[..., Any]] = {
        "accept": lambda text, key: board.accept(parsed(text.encode()), text.encode(), owner="me", key=key).__dict__,
        "status": lambda id: board.status(id, "me").to_dict(),
        "blob": lambda id: board.blob(id, "me")[0],
        "cancel": lambda id: board.cancel(id, "me").to_dict(),
        "prompts": lambda: [each.request.prompt for each in runs.submitted],
        "close": lambda drain_s=0.0: board.close(drain_s=drain_s),
    }
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: Any = commands[name](**arguments)
        except ProblemError as error:
            answer = {"error": error.kind}
        except RefusedError as error:
            answer = {"error": error.kind}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
