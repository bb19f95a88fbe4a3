"""What may come in: by the length of the queue, by memory and by deadline, and how long a run would take.

Memory is predicted from the latents' size (activation_memory.py) and held against what is free; time from the calls
measured so far (forecast.py) and what is queued. Both decide how many runs share a call and which are refused, each
with when to ask again. Used under the batcher's lock.
"""

from __future__ import annotations

import time

from latentrelay.cloud.activation_memory import ActivationMemory, free_bytes
from latentrelay.cloud.engine import BUCKETS, Engine
from latentrelay.cloud.errors import DeadlineRefusedError, MemoryRefusedError, QueueFullError
from latentrelay.cloud.forecast import Size, StepTimes, steps_until_done
from latentrelay.cloud.places import ALONE, Job, Places
from latentrelay.cloud.ticket import Ticket

MAX_BATCH = {"cpu": 16, "cuda": 32}
_LOWERED_S = 300.0
_ON_THE_WAY_S = 1.0  # of the service's limit may have passed when a request comes to be judged
_LARGEST = 2048  # latents of a side, as many as a handoff may have
_MEMORY_SHARE = 0.8  # of what is free, where the operator does not say how much memory there is


class Admission:
    """The rules of one batcher: `capacity` runs of a size share a call, `check` refuses what cannot be taken on."""

    def __init__(self, engine: Engine, places: Places, max_batch: int | None, memory_mib: float | None) -> None:
        self.max_batch = max_batch or MAX_BATCH.get(engine.device.type, MAX_BATCH["cuda"])
        self.times = StepTimes()
        branches = next(iter(engine.schedules.rules.values())).branches
        usual = tuple(side // engine.downscale for side in engine.default_size)
        largest = min(_LARGEST, max(1, engine.limits.max_side // engine.downscale))
        self.memory = ActivationMemory(
            engine.unet, engine.text_length, branches, sizes=((usual[0], usual[1]), (largest, largest))
        )
        self._engine, self._places = engine, places
        self._fixed_bytes = None if memory_mib is None else memory_mib * 2**20
        self._free_bytes, self._looked = free_bytes(engine.device), time.monotonic()
        self._lowered: dict[Size, tuple[int, float]] = {}  # requests, until when

    def look_again(self) -> None:
        """Read how much memory is free, at most once a second. To be called between two calls of the network, when
        nothing is in use."""
        now = time.monotonic()
        if self._fixed_bytes is None and now - self._looked > 1.0:
            self._free_bytes, self._looked = free_bytes(self._engine.device), now

    def lower(self, size: Size, fitted: int) -> None:
        """A call for more runs of this size ran out of memory: no more than `fitted` for some minutes."""
        self._lowered[size] = (fitted, time.monotonic() + _LOWERED_S)

    def capacity(self, job: Job) -> int:
        """How many runs like this one go into one call; 0 if none fits the memory. The first call that needs the
        memory's forecast waits for it, some seconds."""
        if not job.request.split:
            return self.max_batch  # no call is made for it
        fits = self.memory.most(self.activation_bytes, *job.size)
        lowered, until = self._lowered.get(job.size, (self.max_batch, 0.0))
        most = min(self.max_batch, fits, lowered if time.monotonic() < until else fits)
        if self._engine.compiled:  # a call is filled up to the next fixed batch size, which must fit too
            return max((each for each in BUCKETS if each <= most), default=0)
        return most

    def places(self, job: Job) -> int:
        """How many of its group have a place at a time: at least one, so that what was let in does run."""
        return 1 if job.group == ALONE else max(1, self.capacity(job))

    @property
    def activation_bytes(self) -> float:
        """The memory for one call's activations."""
        return _MEMORY_SHARE * self._free_bytes if self._fixed_bytes is None else self._fixed_bytes

    def check(self, job: Job, ticket: Ticket, left_s: float, *, shared: bool) -> None:
        """Raise a RefusedError where there is no room, no memory or no time for a run, or, `shared`, no time for
        another ticket of a run that is held already. What is only guessed from other sizes' times refuses no request
        that named no deadline."""
        if not shared:
            self._check_room(job)
        steps = job.calls_left(ticket.request.splits()[0])
        if shared and job.state is not None:
            seconds = self.remaining_s(job, steps)
        else:
            seconds = self.estimate_s(job, steps, ticket.deadline)
        if ticket.request.deadline_ms is None and not self.times.known(job.size):
            seconds = None
        if left_s <= 0 or (seconds is not None and seconds > left_s):
            limit_s = self._engine.limits.deadline_s
            own = ticket.request.deadline_ms is not None or left_s < limit_s - _ON_THE_WAY_S
            raise DeadlineRefusedError(
                "the deadline cannot be met",
                got=f"{max(0.0, 1000 * left_s):.0f} ms" if own else f"the service's limit of {limit_s:.0f} s",
                expected=None if seconds is None else f"about {1000 * seconds:.0f} ms",
                retry_after_s=self.free_place_s() if seconds is None else seconds - left_s,
            )

    def _check_room(self, job: Job) -> None:
        held = len(self._places.waiting) + self._places.running
        if held >= self._engine.limits.queue:
            raise QueueFullError(held, self.free_place_s())
        if self.capacity(job) < 1:
            need, have = self.memory.bytes(1, *job.size) / 2**20, self.activation_bytes / 2**20
            raise MemoryRefusedError(
                f"a run of {job.request.height}x{job.request.width} pixels does not fit the memory",
                got=f"{have:.0f} MiB for activations",
                expected=f"{need:.0f} MiB",
                retry_after_s=30,
            )

    def estimate_s(self, job: Job, steps: int, deadline: float | None = None) -> float | None:
        """Seconds until a run that has no place yet has made `steps` calls, by its deadline's rank among those that
        wait; None before anything was measured."""
        if self.times.median_s is None:
            return None
        places = self.places(job)
        running = [each.calls_left() for each in self._places.in_group(job.group)]
        queue = [each for each in self._places.queue() if each.group == job.group and each is not job]
        before = [each.calls_left() for each in queue if deadline is None or each.rank[0] <= deadline]
        call_s = self.times.seconds(job.size, min(places, len(running) + len(before) + 1))
        if call_s is None:
            return None
        turns = len(self._places.groups() | {job.group})
        return steps_until_done(running, before, places, steps) * call_s * turns

    def remaining_s(self, job: Job, steps: int) -> float | None:
        """Seconds until a run that has a place has made `steps` more calls."""
        together = min(self.places(job), max(1, len(self._places.in_group(job.group))))
        call_s = self.times.seconds(job.size, together)
        return None if call_s is None else steps * call_s * max(1, len(self._places.groups()))

    def free_place_s(self) -> float:
        """About when there is room again: half of what is held is done, at the pace of the last calls."""
        calls = sum(each.calls_left() for each in self._places)
        return calls * (self.times.median_s or 1.0) / self.max_batch / 2
