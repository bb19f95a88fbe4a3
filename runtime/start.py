"""Where the device's part of a run begins: from noise, from a ready handoff, or from what a cloud handed over.

In: a session and a `Wish`. Out: a `Start`, latents (1, C, h, w) with the solver's memory and the first step to run
here, and what was given up on the way: the cloud's half of the degrade ladder. The device's half is `device_part`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.cloud_protocol import OnPreview, OnProgress
from latentrelay.runtime.degrade import Degradation, affordable_split, lowered, smaller_splits, without_cloud
from latentrelay.runtime.errors import CloudUnavailableError, RequestError
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.session import Session
from numpy.typing import NDArray

PROBE_S = 2.0  # how long a cloud that failed lately may take to say that it is back


@dataclass(frozen=True)
class Wish:
    """What is to be begun: the picture's arguments, and how the cloud is to be asked. `cancel` None: never."""

    prompt: str
    negative_prompt: str
    seed: int
    guidance: float | None
    wire_dtype: str = "float16"
    fallback: bool = True
    deadline_s: float | None = None
    cancel: Callable[[], bool] | None = None
    on_progress: OnProgress | None = None
    on_preview: OnPreview | None = None


@dataclass(frozen=True, eq=False)
class Start:
    """The device's first step, the arrays there, and how they came. `attempts`: how often the cloud was asked."""

    latents: NDArray[Any]
    x0_prev: NDArray[Any] | None
    step: int
    seed: int
    guidance: float
    path_taken: str
    handoff_bytes: int = 0
    fallback_reason: str | None = None
    degraded: tuple[Degradation, ...] = ()
    attempts: int = 0


def default_split(manifest: Manifest) -> int:
    """Half the run; of a bundle that predicts steps from some splits on, the one of them that is nearest to it."""
    half = manifest.schedule.num_steps // 2
    masks = manifest.prediction.masks if manifest.prediction is not None else ()
    found = (mask.split for mask in masks if mask.split > 0 and mask.level == "normal")
    return min(found, key=lambda split: abs(split - half), default=half)


def from_noise(session: Session, wish: Wish, path_taken: str = "device") -> Start:
    """All steps here."""
    guidance = session.manifest.guidance.default if wish.guidance is None else wish.guidance
    return Start(session.initial_latents(wish.seed), None, 0, wish.seed, guidance, path_taken)


def from_handoff(session: Session, wish: Wish, handoff: Handoff, *, split: int | None = None) -> Start:
    """A ready handoff, whose seed, guidance and split hold. Raises HandoffMismatchError where it does not fit."""
    handoff.check(
        session.manifest,
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        guidance=wish.guidance,
        split=split,
    )
    return _taken(handoff)


def from_cloud(session: Session, wish: Wish, cloud: CloudClient | str, split: int) -> Start:
    """The cloud's first `split` steps, or fewer where it was slow, or none where it is out of reach and falling back
    is allowed. Raises CloudError, HandoffError, RunCancelledError."""
    client = CloudClient(cloud) if isinstance(cloud, str) else cloud
    try:
        return _asked(session, wish, client, split)
    except CloudUnavailableError as error:
        if not wish.fallback:
            raise
        start, given_up = from_noise(session, wish, "device-fallback"), without_cloud(error)
        asked = 0 if error.kind == "failed-recently" else max(1, client.attempts)
        return Start(
            **{**vars(start), "fallback_reason": str(error), "degraded": (given_up,), "attempts": asked},
        )
    finally:
        if client is not cloud:
            client.close()


def _asked(session: Session, wish: Wish, client: CloudClient, split: int) -> Start:
    """Ask, within the deadline, unless the cloud has failed just now."""
    seconds = client.timeout_s if wish.deadline_s is None else wish.deadline_s
    end, memory = time.monotonic() + seconds, client.memory
    if wish.fallback and memory.rest_s() > 0:
        raise CloudUnavailableError(
            f"{client.url} failed {memory.failures} times in a row, the last time just now",
            kind="failed-recently",
            do=f"It is asked again in {memory.rest_s():.0f} s.",
        )
    try:
        again = wish.fallback and memory.failures > 0
        probe_s = min(PROBE_S, seconds) if again else seconds
        served = client.served(deadline_s=probe_s, anew=again, cancel=wish.cancel)
        manifest, smaller = session.manifest, smaller_splits(session.manifest, split) if wish.fallback else ()
        first = split
        if smaller and not served.has("accept_splits"):
            first = affordable_split(served, (split, *smaller), manifest.schedule.num_steps, end - time.monotonic())
            smaller = ()
        request = HandoffRequest.for_bundle(
            manifest,
            wish.prompt,
            split=first,
            negative_prompt=wish.negative_prompt,
            seed=wish.seed,
            guidance=wish.guidance,
            dtype=wish.wire_dtype,
            accept_splits=smaller or None,
        )
        handoff = client.handoff(
            request,
            deadline_s=max(0.001, end - time.monotonic()),
            on_progress=wish.on_progress,
            on_preview=wish.on_preview,
            cancel=wish.cancel,
        )
    except CloudUnavailableError as error:
        if error.kind != "slow":  # that is about this deadline
            memory.failed(error.retry_after_s)
        raise
    memory.worked()
    reached = handoff.meta.next_step
    handoff.check(
        manifest,
        prompt=wish.prompt,
        negative_prompt=wish.negative_prompt,
        seed=wish.seed,
        guidance=request.guidance,
        split=reached if reached in smaller else first,
    )
    degraded = (lowered(split, reached),) if reached < split else ()
    return Start(**{**vars(_taken(handoff)), "degraded": degraded, "attempts": client.attempts})


def _taken(handoff: Handoff) -> Start:
    """A handoff that was checked, as a start."""
    meta = handoff.meta
    path = "cloud" if meta.next_step == meta.num_steps else "hybrid" if meta.next_step else "device"
    size = len(handoff.to_bytes())
    return Start(handoff.latents, handoff.x0_prev, meta.next_step, meta.seed, meta.guidance, path, size)


def begin(
    session: Session, wish: Wish, split: int | None, cloud: CloudClient | str | None, handoff: Handoff | None
) -> Start:
    """Take the handoff, ask the cloud, or start from noise. Raises RequestError for arguments that contradict each
    other, and what the three raise."""
    steps = session.manifest.schedule.num_steps
    if handoff is not None:
        if cloud is not None:
            raise RequestError("both a cloud and a handoff were given", do="Give one of them.")
        return from_handoff(session, wish, handoff, split=split)
    first = split if split is not None else (default_split(session.manifest) if cloud is not None else 0)
    if not 0 <= first <= steps:
        raise RequestError("split is out of range", got=first, expected=f"0 .. {steps}")
    if first == 0:
        return from_noise(session, wish)
    if cloud is None:
        raise RequestError(f"split {first} needs a cloud or a handoff", do="Give one, or split 0.")
    return from_cloud(session, wish, cloud, first)
