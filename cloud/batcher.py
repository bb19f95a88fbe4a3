"""Step-level continuous batching: many requests' denoising runs through one network, a step at a time.

In: `RunRequest`s from any thread. Out: a `Ticket` each, whose future is the `Handoff`. One thread runs the network;
between two of its calls requests join and leave, whatever their step, split, sampler, guidance or prompt. A second one
keeps deadlines, so that a call that hangs holds up nobody's answer. Equal requests of one owner share one run. What is
computed for a request is diffusers' own arithmetic; who shared its calls changes it by floating-point noise only, and
nothing at all where it asks to be deterministic.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from latentrelay.cloud.admission import Admission
from latentrelay.cloud.batch_steps import BatchSteps
from latentrelay.cloud.content_cache import ContentCache, content_key
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import DeadlinePassedError, DrainingError, RunCancelled, RunFailedError
from latentrelay.cloud.network_call import where
from latentrelay.cloud.openmp import release_workers
from latentrelay.cloud.places import Job, Places
from latentrelay.cloud.requests import RunRequest, wire_version
from latentrelay.cloud.run_state import Snapshot
from latentrelay.cloud.text_states import TextStates
from latentrelay.cloud.ticket import BatchObserver, OnStep, SilentObserver, StepReport, Ticket
from latentrelay.runtime.errors import LatentRelayError
from latentrelay.runtime.handoff import Handoff

__all__ = ["BatchObserver", "Batcher", "Load", "StepReport", "Ticket"]

DEFAULT_STEPS = 25  # of the request that `Load.estimate_ms` is for
_RESULT_BYTES, _TEXT_BYTES = 32 * 2**20, 128 * 2**20
_log = logging.getLogger("latentrelay.cloud")
Outcome = Callable[[], Handoff] | Exception
Ended = list[tuple[Ticket, Outcome, str]]  # settled once the lock is released: futures call back


@dataclass(frozen=True)
class Load:
    """What the batcher holds now: runs that wait and run, how many it takes on, the median time of a network call,
    the mean share of a call's places that were used (0..1), and how long a new default-size request of half the default
    steps would take; the last three are None before the first call."""

    waiting: int
    running: int
    limit: int
    step_ms: float | None
    occupancy: float | None
    estimate_ms: float | None


class Batcher:
    """Runs requests together on one engine. Every method may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int | None = None,
        memory_mib: float | None = None,
        cache: bool = True,
        result_ttl_s: float = 600.0,
        observer: BatchObserver | None = None,
    ) -> None:
        """max_batch: requests a call (16 on the CPU, 32 elsewhere); memory_mib: for activations (a share of what is
        free); cache: whether text states and results are kept and equal requests in flight share a run; result_ttl_s:
        how long a result is kept."""
        self.engine = engine
        self._observer: BatchObserver = observer or SilentObserver()
        self._places = Places()
        self.admission = Admission(engine, self._places, max_batch, memory_mib)
        texts = TextStates(engine, _TEXT_BYTES if cache else 0, self._observer)
        self._steps = BatchSteps(engine, texts, self._stepped, lambda job, error: self._fail([job], _clean(error)))
        self._results: ContentCache[Handoff] | None = ContentCache(_RESULT_BYTES, result_ttl_s) if cache else None
        self._shared: dict[bytes, Job] = {}
        self._lock = threading.RLock()
        self._work, self._due = threading.Condition(self._lock), threading.Condition(self._lock)
        self._closing = self._draining = False
        self._count = 0
        self._threads: tuple[threading.Thread, ...] = ()

    def start(self) -> None:
        """Start the threads; requests submitted before wait for it. torch's thread count is the caller's, who gives up
        OpenMP's workers: the batcher's thread has its own."""
        count = torch.get_num_threads()
        release_workers()
        self._threads = (
            threading.Thread(target=self._run, args=(count,), name="latentrelay-batcher", daemon=True),
            threading.Thread(target=self._keep_deadlines, name="latentrelay-deadlines", daemon=True),
        )
        for each in self._threads:
            each.start()

    def warm_up(self) -> None:
        """Forecast the memory and make a step of the default size now, so that the first request need not wait."""
        height, width = self.engine.default_size
        branches = next(iter(self.engine.schedules.rules.values())).branches
        request = RunRequest(
            prompt="", seed=0, guidance=7.5 if branches == 2 else 1.0, height=height, width=width, num_steps=2, split=1
        )
        self.admission.memory.measure()
        self.engine.run(request)

    def drain(self) -> None:
        """Take nothing new from now on; what is held goes on."""
        with self._lock:
            self._draining = True

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel everything and end the threads. A call that hangs is left behind after `timeout_s`."""
        ended: Ended = []
        with self._lock:
            self._closing = True
            for ticket in [each for job in self._places for each in job.tickets]:
                self._end(ticket, RunCancelled("the service is ending"), "cancelled", ended)
            self._work.notify_all()
            self._due.notify_all()
        self._settle(ended)
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
                if thread.is_alive():
                    _log.error("the thread %s hangs in a network call and is left behind", thread.name)

    def submit(
        self,
        request: RunRequest,
        *,
        deadline_s: float | None = None,
        on_step: OnStep | None = None,
        owner: str = "",
    ) -> Ticket:
        """Queue a request. deadline_s: seconds left; None takes the request's own, or the service's limit. owner: whose
        it is; runs and results are shared with requests of the same owner only.

        on_step follows every step, on the batcher's thread. Raises ProblemError for what the engine cannot run, and a
        RefusedError for what it cannot run now: QueueFullError, MemoryRefusedError, DeadlineRefusedError,
        DrainingError.
        """
        self.engine.check(request)
        own_s = self.engine.limits.deadline_s if request.deadline_ms is None else request.deadline_ms / 1000
        left_s = own_s if deadline_s is None else deadline_s
        ticket = Ticket(
            request, time.monotonic() + left_s, wire_version(request), on_step, self._cancel, self._position
        )
        key = None if self._results is None else _of(owner) + content_key([self.engine.digest, request.content()])
        job = Job(request, self.engine.latent_shape(request)[2:], 0, key)
        try:
            self.admission.capacity(job)  # without warm_up the first waits for the forecast: not under the lock
            found = self._take(job, ticket, left_s)
        except LatentRelayError:
            self._observer.left("refused")
            raise
        if self._results is not None:
            self._observer.cache("result", found)
        return ticket

    def forget(self, owner: str) -> None:
        """Keep none of the results that were made for this owner until now."""
        if self._results is not None:
            self._results.drop(_of(owner))

    def load(self) -> Load:
        """What is held now, and the measured times."""
        height, width = self.engine.default_size
        usual = RunRequest(prompt="", seed=0, height=height, width=width, num_steps=DEFAULT_STEPS, split=1)
        job = Job(usual, self.engine.latent_shape(usual)[2:], 0, None)
        with self._lock:
            waiting, running = len(self._places.waiting), self._places.running
            median, occupancy = self.admission.times.median_s, self.admission.times.occupancy
            estimate = self.admission.estimate_s(job, DEFAULT_STEPS // 2)
        return Load(waiting, running, self.engine.limits.queue, _ms(median), occupancy, _ms(estimate))

    # Under the lock, from the caller's thread.

    def _take(self, job: Job, ticket: Ticket, left_s: float) -> bool:
        """Answer from a result, join an equal run, or queue; whether the first or the second."""
        with self._lock:
            if self._closing or self._draining:
                raise DrainingError("the service is ending", retry_after_s=5)
            kept = self._results.get(job.key) if self._results is not None and job.key is not None else None
            if kept is None:
                shared = self._shared.get(job.key) if job.key is not None else None
                self.admission.check(shared or job, ticket, left_s, shared=shared is not None)
                ticket.job = shared or job
                ticket.job.tickets.append(ticket)
                if shared is None:
                    self._count += 1
                    job.order = self._count
                    self._places.waiting.append(job)
                    if job.key is not None:
                        self._shared[job.key] = job
                self._work.notify_all()
                self._due.notify_all()
                return shared is not None
            ticket.ended = True
        self._settle([(ticket, lambda: kept, "cached")])
        return True

    def _end(self, ticket: Ticket, outcome: Outcome, reason: str, ended: Ended) -> None:
        """Take a ticket off its run; a run without tickets gives up its place. The first to call it wins."""
        if ticket.ended:
            return
        ticket.ended = True
        ended.append((ticket, outcome, reason))
        job = ticket.job
        if job is None:
            return
        ticket.job = None  # whoever keeps the ticket does not keep the run's tensors
        job.tickets.remove(ticket)
        if not job.tickets:
            self._places.remove(job)
            if job.key is not None and self._shared.get(job.key) is job:
                del self._shared[job.key]

    def _cancel(self, ticket: Ticket) -> None:
        ended: Ended = []
        with self._lock:
            self._end(ticket, RunCancelled("the run was cancelled"), "cancelled", ended)
            self._work.notify_all()
        self._settle(ended)

    def _position(self, ticket: Ticket) -> int | None:
        with self._lock:
            queue = self._places.queue()
            return queue.index(ticket.job) if not ticket.ended and ticket.job in queue else None

    def _settle(self, ended: Ended) -> None:
        """Outside the lock: give futures what they wait for."""
        for ticket, outcome, reason in ended:
            try:
                if isinstance(outcome, Exception):
                    ticket.future.set_exception(outcome)
                else:
                    ticket.future.set_result(_in_version(outcome(), ticket.wire_version))
            except LatentRelayError as error:  # out of float16's range
                ticket.future.set_exception(error)
                reason = "failed"
            except Exception as error:
                _log.error("a handoff could not be made: %s", where(error))
                ticket.future.set_exception(RunFailedError("the handoff could not be made"))
                reason = "failed"
            self._observer.left(reason)

    # On the thread that keeps deadlines, of tickets and of results.

    def _keep_deadlines(self) -> None:
        while True:
            ended: Ended = []
            with self._lock:
                if self._closing:
                    return
                tickets = [each for job in self._places for each in job.tickets]
                now = time.monotonic()
                for ticket in tickets:
                    if ticket.deadline <= now:
                        self._expire(ticket, ended)
                aged_s = None if self._results is None else self._results.drop_old()
                if not ended:
                    waits = [each.deadline - now for each in tickets] + ([] if aged_s is None else [aged_s])
                    self._due.wait(min((*waits, threading.TIMEOUT_MAX)))
            self._settle(ended)

    def _expire(self, ticket: Ticket, ended: Ended) -> None:
        """The deadline is here: the largest acceptable split that was reached, or none."""
        job = ticket.job
        if job is not None and job.reached is not None:
            self._end(ticket, self._made(job, job.reached), "early", ended)
        else:
            error = DeadlinePassedError(
                "the run did not reach a split it may be handed over at before its deadline",
                do="Ask for a smaller split, a later deadline, or run all steps on the device.",
            )
            self._end(ticket, error, "deadline", ended)

    def _made(self, job: Job, snapshot: Snapshot) -> Callable[[], Handoff]:
        state = job.state
        if state is None:
            raise ValueError("a run that has not begun has nothing to hand over")
        return lambda: self.engine.handoff(state, snapshot)

    # On the thread that runs the network.

    def _run(self, torch_threads: int) -> None:
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)
        with torch.inference_mode():
            while True:
                with self._lock:
                    while not self._closing and not self._places.groups():
                        self._work.wait()
                    if self._closing:
                        return
                self._round_or_fail()

    def _round_or_fail(self) -> None:
        """One round. An error of the batcher's own ends the runs that have a place, never the thread."""
        try:
            self._round()
        except Exception as error:
            _log.error("a round failed: %s", where(error))
            with self._lock:
                jobs = [job for job in self._places if job not in self._places.waiting]
            self._fail(jobs, RunFailedError("the run could not go on"))

    def _round(self) -> None:
        """Let runs join, and make one call for those whose turn it is."""
        with self._lock:
            self.admission.look_again()
            joined = self._places.fill(self.admission.places)
            waits = [time.monotonic() - ticket.submitted for job in joined for ticket in job.tickets]
        for wait_s in waits:
            self._observer.joined(wait_s)
        for job in self._steps.begin(joined):
            self._finish(job)
        with self._lock:
            jobs = self._places.turn(self.admission.places)
            self._steps.forget(self._places.groups())
        if jobs:
            self._step(jobs)

    def _step(self, jobs: list[Job]) -> None:
        group, places, started = jobs[0].group, self.admission.places(jobs[0]), time.perf_counter()
        call = self._steps.step(jobs)
        with self._lock:
            self._places.charge(group, time.perf_counter() - started)
        if call is None:
            return
        places = max(places, call.requests)
        self._observer.step(call.requests, places, call.seconds)
        with self._lock:
            if call.fitted < call.requests:
                self.admission.lower(call.size, call.fitted)
            self.admission.times.record(call.size, call.requests, call.seconds, places)

    def _stepped(self, job: Job) -> None:
        """After a step: tell, keep what may be handed over, hand over what is done or will not get further in time."""
        state = job.state
        if state is None:
            return
        self._report(job)
        if state.done:
            self._finish(job)
            return
        if state.step in job.request.accept_splits:
            job.reached = state.snapshot()
        if job.reached is None:
            return
        ended: Ended = []
        following = next(each for each in job.request.splits() if each > state.step)
        with self._lock:
            known = self.admission.times.known(job.size)  # it is, from the second step on
            seconds = self.admission.remaining_s(job, job.calls_left(following)) if known else None
            for ticket in list(job.tickets):
                if seconds is not None and time.monotonic() + seconds > ticket.deadline:
                    self._end(ticket, self._made(job, job.reached), "early", ended)
        self._settle(ended)

    def _report(self, job: Job) -> None:
        state, request = job.state, job.request
        if state is None:
            return
        with self._lock:
            tickets = list(job.tickets)
        picture = None
        if any(ticket.request.preview for ticket in tickets):
            picture = self._picture(state.latents if state.x0 is None else state.x0)
        for ticket in tickets:
            shown = picture if ticket.request.preview else None
            ticket.report(StepReport(state.step, request.split, request.num_steps, shown))

    def _picture(self, latents: torch.Tensor) -> tuple[int, int, bytes] | None:
        """A preview; one that cannot be made is left out."""
        try:
            rgb = self.engine.preview(latents)
        except Exception as error:
            _log.error("a preview failed: %s", where(error))
            return None
        return rgb.shape[0], rgb.shape[1], rgb.tobytes()

    def _finish(self, job: Job) -> None:
        """The split is reached: everyone gets the handoff, and it is kept for those who ask for the same again."""
        state, ended = job.state, Ended()
        if state is None:
            return
        try:
            handoff = self.engine.handoff(state, state.snapshot())
        except Exception as error:
            self._fail([job], _clean(error))
            return
        with self._lock:
            if self._results is not None and job.key is not None and job.tickets:  # nobody's any more is not kept
                size = handoff.latents.nbytes + (0 if handoff.x0_prev is None else handoff.x0_prev.nbytes)
                self._results.put(job.key, handoff, size + 4096)
                self._due.notify_all()
            for ticket in list(job.tickets):
                self._end(ticket, lambda: handoff, "done", ended)
        self._settle(ended)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        ended: Ended = []
        with self._lock:
            for ticket in [each for job in jobs for each in job.tickets]:
                self._end(ticket, error, "failed", ended)
        self._settle(ended)


_NOBODY = RunRequest(prompt="", seed=0, height=1, width=1, num_steps=1, split=0)


def _clean(error: Exception) -> Exception:
    """What a client may be told: our own errors as they are, nothing of anybody else's."""
    if isinstance(error, LatentRelayError):
        return error
    _log.error("a run failed: %s", where(error))
    return RunFailedError("the run could not go on", do="Ask again, or run all steps on the device.")


def _in_version(handoff: Handoff, version: str) -> Handoff:
    """The same handoff in the wire version that this client reads: results are shared between versions."""
    if handoff.meta.schema_version == version:
        return handoff
    return dataclasses.replace(handoff, meta=dataclasses.replace(handoff.meta, schema_version=version))


def _of(owner: str) -> bytes:
    """What the keys of an owner's results begin with."""
    return content_key(["owner", owner])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
