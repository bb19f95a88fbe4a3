"""The cloud's side of a plan: how long a step takes there, how long a request waits, and what it costs.

In: a service's address, or milliseconds, or the reference's measured figure. Out: `CloudSpeed` and `Price`. A request
is charged as if it had the machine alone; a batch shares it, so a full service costs less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.errors import REFUSED, LatentRelayError, RequestError

_HOUR_MS = 3_600_000.0


class OtherModelError(LatentRelayError):
    """The cloud serves another model than the one that the bundle was built from."""

    exit_status = REFUSED


@dataclass(frozen=True)
class CloudSpeed:
    """Milliseconds of one step, and of waiting in front of it for every step asked for and as such."""

    step_ms: float
    label: str
    source: str
    queue_ms: float = 0.0
    queue_ms_per_step: float = 0.0
    model_digest: str | None = None
    url: str | None = None

    def steps_ms(self, split: int) -> float:
        """The cloud's own time for `split` steps."""
        return split * self.step_ms

    def waiting_ms(self, split: int) -> float:
        """How long a request of `split` steps waits first."""
        return (self.queue_ms + split * self.queue_ms_per_step) if split else 0.0

    def check(self, model_digest: str | None) -> None:
        """Raise OtherModelError where the service runs another model."""
        if self.model_digest and model_digest and self.model_digest != model_digest:
            raise OtherModelError(
                "the cloud serves another model", got=self.model_digest, expected=model_digest,
                do="Plan with the cloud that serves the bundle's own source.",
            )  # fmt: skip


@dataclass(frozen=True)
class Price:
    """What the cloud takes: `amount` for an hour of its machine, or for a step."""

    amount: float
    per: str

    def of(self, split: int, cloud: CloudSpeed) -> float:
        """The price of one picture's steps in the cloud."""
        return self.amount * (split if self.per == "step" else cloud.steps_ms(split) / _HOUR_MS)


def parse_price(words: str | None) -> Price | None:
    """ "2.5" or "2.5/hour" is an hour of the cloud's machine, "0.0001/step" one step. Raises RequestError."""
    if words is None:
        return None
    amount, _, per = words.partition("/")
    per = {"": "hour", "h": "hour", "hour": "hour", "step": "step"}.get(per.strip(), "")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if not per or not 0 <= value < math.inf:
        raise RequestError("no such price", got=words, expected="a number >= 0, or NUMBER/hour, or NUMBER/step")
    return Price(value, per)


def asked(url: str, token: str | None, otherwise: CloudSpeed) -> CloudSpeed:
    """What a service says of itself now; `otherwise` stands for a step's time that it does not know yet.

    Raises CloudError.
    """
    with CloudClient(url, token=token, insecure=token is None) as client:  # no prompt is sent
        told = client.capabilities()
    own, queue = told.get("step_ms"), told.get("queue")
    digest = told["model"].get("digest") if isinstance(told.get("model"), Mapping) else None
    known = isinstance(own, (int, float)) and own > 0
    step_ms = float(own) if known else otherwise.step_ms  # type: ignore[arg-type]
    source = f"{url}: its median step now" if known else f"{url} has made no step yet; {otherwise.source}"
    return CloudSpeed(
        step_ms,
        "measured" if known else otherwise.label,
        source,
        queue_ms_per_step=_queue_ms(queue, told.get("max_batch"), step_ms),
        model_digest=digest,
        url=url,
    )


def of_sweeps(sweeps: Sequence[Mapping[str, Any]]) -> CloudSpeed:
    """The quickest step that a sweep timed, at its longest run: one request alone on that machine."""
    timed = [(sweep["cloud_latents_decoded_on_device"], sweep) for sweep in sweeps]
    row, sweep = min(timed, key=lambda each: float(each[0]["cloud_seconds"]) / int(each[0]["split"]))
    machine = sweep.get("machine") or {}
    where = ", ".join(str(machine[key]) for key in ("processor",) if key in machine) or "the sweep's machine"
    return CloudSpeed(
        1e3 * row["cloud_seconds"] / row["split"],
        "measured",
        f"{sweep['file']}: {where}, {sweep.get('threads', '?')} thread(s), the reference, float32; another machine "
        "differs",
    )


def _queue_ms(queue: Any, max_batch: Any, step_ms: float) -> float:
    """Waiting for each step asked for: those that wait ask for as much as we do, and go `max_batch` at a time."""
    waiting = queue.get("waiting") if isinstance(queue, Mapping) else None
    width = max_batch if isinstance(max_batch, int) and max_batch > 0 else 1
    return step_ms * math.ceil(waiting / width) if isinstance(waiting, int) and waiting > 0 else 0.0
