"""Seconds and bytes of a sweep: a few pictures through the real cloud engine and the deployed graphs, in turn.

One picture at a time on both sides, on this machine, each split's cloud part right before its device part, so that
what else the machine does falls on both. It also says how far the sweep's batched teacher runs are from the engine's.
"""

from __future__ import annotations

import io
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime import Handoff, Session, generate
from latentrelay.runtime.errors import REFUSED, LatentRelayError
from latentrelay.tools.sweep_device import Captions
from latentrelay.tools.teacher_runs import Teacher, TeacherBatch
from numpy.typing import NDArray
from PIL import Image

PICTURES = 5
AGREEMENT_DB = 40.0
_EQUAL_DB = 300.0


class TeacherDiffersError(LatentRelayError):
    """The batched teacher runs are not what the cloud's engine makes, so figures made from them would not hold."""

    exit_status = REFUSED


@dataclass(frozen=True)
class Clock:
    """Medians over `pictures`, by split: seconds of the cloud's steps (its decode apart), of each student's device with
    its decode (`device_decode` says how much that is), and bytes of the handoff; bytes of the all-cloud picture as a
    PNG. `agreement_db` is the worst SNR of a batched run's handoff against the engine's, both in float16."""

    pictures: int
    cloud: Mapping[int, float]
    cloud_decode: float
    device: Mapping[str, Mapping[int, float]]
    device_decode: Mapping[str, float]
    handoff_bytes: Mapping[int, int]
    png_bytes: int
    agreement_db: float


class _Watch:
    """What is read off the clock while pictures are made."""

    def __init__(self, names: Sequence[str]) -> None:
        self.cloud: dict[int, list[float]] = defaultdict(list)
        self.device: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in names}
        self.decode: dict[str, list[float]] = defaultdict(list)
        self.cloud_decode: list[float] = []
        self.bytes: dict[int, list[int]] = defaultdict(list)
        self.png: list[int] = []
        self.agreement_db: list[float] = [_EQUAL_DB]


def measure(
    teacher: Teacher, engine: Engine, sessions: Mapping[str, Session], part: Captions, splits: Sequence[int]
) -> Clock:
    """Time the first PICTURES captions of `part`. Raises TeacherDiffersError."""
    batch, watch = teacher.batch(part.prompts, part.seeds), _Watch(list(sessions))
    count = min(PICTURES, len(part.seeds))
    for row in range(count):
        for split in splits:
            blob = _cloud_part(watch, teacher, engine, part, batch, row, split) if split else None
            for name, session in sessions.items():
                _device_part(watch, teacher, name, session, part, row, blob)
        started = time.perf_counter()
        teacher.decode(torch.from_numpy(batch.latents[-1, row : row + 1]).float())
        watch.cloud_decode.append(time.perf_counter() - started)
        watch.png.append(_png_bytes(batch.pictures[row]))
    if min(watch.agreement_db) < AGREEMENT_DB:
        raise TeacherDiffersError(
            "the batched teacher runs differ from the engine's",
            got=f"{min(watch.agreement_db):.1f} dB",
            expected=f"at least {AGREEMENT_DB:g} dB",
            do="Delete the sweep's cache folder; if that does not help, this is a fault worth reporting.",
        )
    return Clock(
        pictures=count,
        cloud={split: statistics.median(watch.cloud[split]) if split else 0.0 for split in splits},
        cloud_decode=statistics.median(watch.cloud_decode),
        device={
            name: {split: statistics.median(values) for split, values in found.items()}
            for name, found in watch.device.items()
        },
        device_decode={name: statistics.median(values) for name, values in watch.decode.items()},
        handoff_bytes={split: int(statistics.median(watch.bytes[split])) if split else 0 for split in splits},
        png_bytes=int(statistics.median(watch.png)),
        agreement_db=min(watch.agreement_db),
    )


def _cloud_part(
    watch: _Watch, teacher: Teacher, engine: Engine, part: Captions, batch: TeacherBatch, row: int, split: int
) -> bytes:
    height, width = batch.pictures.shape[1:3]
    request = RunRequest(
        prompt=part.prompts[row],
        seed=part.seeds[row],
        guidance=teacher.guidance,
        height=height,
        width=width,
        num_steps=teacher.num_steps,
        split=split,
    )
    started = time.perf_counter()
    handoff = engine.run(request)
    watch.cloud[split].append(time.perf_counter() - started)
    blob = handoff.to_bytes()
    watch.bytes[split].append(len(blob))
    for mine, theirs in zip(batch.handoff(row, split), (handoff.latents, handoff.x0_prev), strict=True):
        if mine is not None and theirs is not None:
            watch.agreement_db.append(_snr_db(np.asarray(theirs, np.float64), np.asarray(mine, np.float64)))
    return blob


def _device_part(
    watch: _Watch, teacher: Teacher, name: str, session: Session, part: Captions, row: int, blob: bytes | None
) -> None:
    """What a device does with the blob it was sent: check it, encode the prompt, run its steps, decode."""
    started = time.perf_counter()
    handoff = None if blob is None else Handoff.from_bytes(blob)
    result = generate(
        session,
        part.prompts[row],
        seed=part.seeds[row],
        guidance=teacher.guidance,
        split=None if handoff is None else handoff.meta.next_step,
        handoff=handoff,
    )
    watch.device[name][result.steps["cloud"]].append(time.perf_counter() - started - result.ms["load"] / 1e3)
    watch.decode[name].append(result.ms["decode"] / 1e3)


def _png_bytes(picture: NDArray[np.uint8]) -> int:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.tell()


def _snr_db(reference: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    error = float(np.square(got - reference).sum())
    signal = float(np.square(reference).sum())
    return _EQUAL_DB if error == 0 else min(_EQUAL_DB, 10 * float(np.log10(max(signal, 1e-300) / error)))
