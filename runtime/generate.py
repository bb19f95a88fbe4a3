"""Prompt in, picture out: the first steps from a cloud or a handoff where there is one, the rest here.

One call makes one picture. For several pictures of a prompt, open one `Session` and one `CloudClient` and call
`generate` once for each seed: the graphs stay loaded, and a cloud that failed just now is not waited for again. If the
cloud cannot be reached the device runs all steps, and more of them predicted where it is hot; the result says so
(degrade.py). If the cloud refuses, the refusal is raised.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import RequestError, RunCancelledError
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.picture import save_png, to_image
from latentrelay.runtime.prediction_check import FULL, PREDICTED, STEP_FULL
from latentrelay.runtime.session import Session, check_guidance
from latentrelay.runtime.step_loop import RECOMPUTED, StepEvent
from numpy.typing import NDArray

if TYPE_CHECKING:  # what belongs to clouds, ladders and previews is imported when it is used
    from latentrelay.runtime.cloud_client import CloudClient
    from latentrelay.runtime.cloud_protocol import OnPreview, OnProgress
    from latentrelay.runtime.degrade import Degradation, DevicePart, DeviceState
    from latentrelay.runtime.start import Start, Wish
    from PIL.Image import Image

STAGES = ("handoff", "load", "text_encoder", "steps", "first_step", "decode", "total")


@dataclass(frozen=True, eq=False)
class Result:
    """One picture and how it came about.

    pixels (H, W, 3) float32 in 0..1; latents (1, C, h, w) float32; `path_taken` "cloud" (all steps there), "hybrid",
    "device" or "device-fallback"; `steps` {"cloud", "device"}; `kinds` how many of the device's steps were "full",
    "predicted" and "recomputed"; `ms` per stage, 0 where a stage did not run; `providers` really used; `digest` of the
    bundle; `fallback_reason` where there was one; `degraded` what was given up and why, in the order in which it
    happened; `attempts` how often the cloud was asked, 0 where it was not.
    """

    pixels: NDArray[np.float32]
    latents: NDArray[np.float32]
    path_taken: str
    steps: dict[str, int]
    handoff_bytes: int
    ms: dict[str, float]
    providers: tuple[str, ...]
    digest: str
    seed: int
    guidance: float
    fallback_reason: str | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    degraded: tuple[Degradation, ...] = ()
    attempts: int = 0

    @property
    def computed_steps(self) -> int:
        """How many of the device's steps ran the network, the recomputed ones among them."""
        return self.kinds.get(FULL, 0) + self.kinds.get(RECOMPUTED, 0)

    @property
    def predicted_steps(self) -> int:
        """How many of the device's steps were predicted, and stayed so."""
        return self.kinds.get(PREDICTED, 0)

    @property
    def image(self) -> Image:
        """The picture as an 8-bit RGB pillow image."""
        return to_image(self.pixels)

    def save_png(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture as a PNG, all or nothing; returns the path."""
        return save_png(self.image, path)


@dataclass
class _Clock:
    """Milliseconds per stage."""

    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] += (time.perf_counter() - started) * 1e3


def generate(
    source: Session | Bundle | str | os.PathLike[str],
    prompt: str,
    *,
    negative_prompt: str = "",
    seed: int = 0,
    guidance: float | None = None,
    split: int | None = None,
    cloud: CloudClient | str | None = None,
    handoff: Handoff | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    fallback: bool = True,
    cancel: Callable[[], bool] | None = None,
    wire_dtype: str = "float16",
    predict: bool = True,
    fallback_threshold: float | None = None,
    cloud_deadline_s: float | None = None,
    device_state: Callable[[], DeviceState] | None = None,
    on_progress: OnProgress | None = None,
    on_preview: OnPreview | None = None,
) -> Result:
    """Make one picture.

    `source` is a session (stays open), a bundle, or a bundle's folder (verified first). `guidance` None is the bundle's
    default. `split` is the first step that the device runs: None is 0 without a cloud, and with one half the run or the
    nearest split from which the bundle predicts steps; 0 never asks the cloud. A ready `handoff` stands for the cloud;
    its seed, guidance and split hold. `cancel` is asked before every stage and step, and from another thread while the
    cloud runs. `predict` and `fallback_threshold` are `Session.run_steps`'s: whether the bundle's predicted steps are
    predicted, and when one is computed after all.

    `cloud_deadline_s` bounds everything asked of the cloud (None: the client's own time-out); to keep it, a slow cloud
    may hand over at a smaller split. `device_state()` is read when the device's part begins. `on_progress` gets the
    cloud's progress; `on_preview` small pictures after steps, the cloud's where it makes them, the device's where the
    bundle can. Raises RequestError, BundleError, HandoffError, SessionError, CloudError (a cloud out of reach only with
    `fallback=False`), RunCancelledError.
    """
    from latentrelay.runtime.start import Wish

    clock = _Clock()
    with clock.stage("total"):
        if isinstance(source, Session):
            session = source
        else:
            with clock.stage("load"):
                session = Session(source if isinstance(source, Bundle) else Bundle.open(source))
        run = _Run(
            session,
            clock,
            prompt,
            negative_prompt,
            cancel or (lambda: False),
            predict,
            fallback_threshold,
            device_state,
            on_preview,
        )
        wish = Wish(
            prompt,
            negative_prompt,
            seed,
            guidance,
            wire_dtype,
            fallback,
            cloud_deadline_s,
            cancel,
            on_progress,
            on_preview,
        )
        try:
            start = run.begin(wish, split, cloud, handoff)
            latents, kinds, hot = run.denoise(start, on_step, keep=session is source)
            pixels = run.decode(latents)
        finally:
            if session is not source:
                session.close()
    return Result(
        pixels=pixels,
        latents=latents,
        path_taken=start.path_taken,
        steps={"cloud": start.step, "device": session.manifest.schedule.num_steps - start.step},
        handoff_bytes=start.handoff_bytes,
        ms=clock.ms,
        providers=session.providers_used,
        digest=session.bundle.digest,
        seed=start.seed,
        guidance=start.guidance,
        fallback_reason=start.fallback_reason,
        kinds=kinds,
        degraded=(*start.degraded, *hot),
        attempts=start.attempts,
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """One picture's arguments; the three stages as methods."""

    session: Session
    clock: _Clock
    prompt: str
    negative_prompt: str
    cancel: Callable[[], bool]
    predict: bool
    fallback_threshold: float | None
    device_state: Callable[[], DeviceState] | None
    on_preview: OnPreview | None

    def begin(self, wish: Wish, split: int | None, cloud: CloudClient | str | None, handoff: Handoff | None) -> Start:
        """Where the device's part begins; time spent on a cloud is the stage "handoff"."""
        from latentrelay.runtime.start import begin

        if wish.guidance is not None and not 1.0 <= wish.guidance < math.inf:
            raise RequestError(
                "guidance is out of range", got=wish.guidance, expected="a finite number >= 1", do="1 is no guidance."
            )
        if wish.guidance is not None:
            check_guidance(self.session.manifest, wish.guidance)
        self._stop_if_cancelled()
        started = time.perf_counter()
        start = begin(self.session, wish, split, cloud, handoff)
        if cloud is not None and (start.attempts or start.fallback_reason):
            self.clock.ms["handoff"] += (time.perf_counter() - started) * 1e3
        return start

    def denoise(
        self, start: Start, on_step: Callable[[StepEvent], None] | None, *, keep: bool
    ) -> tuple[NDArray[np.float32], dict[str, int], tuple[Degradation, ...]]:
        """Run the device's steps; the final latents, how many steps of each kind they took, and what the device's state
        had it give up. Graphs no longer needed are freed unless `keep`."""
        latents, kinds = np.asarray(start.latents, np.float32), dict.fromkeys((FULL, PREDICTED, RECOMPUTED), 0)
        if start.step == self.session.manifest.schedule.num_steps:
            return latents, kinds, ()
        part = self._part(start.step)
        self._open("text_encoder")
        with self.clock.stage("text_encoder"):
            prompt_embeds = self.session.encode(self.prompt, self.negative_prompt)
        if not keep:
            self.session.release("text_encoder")
        steps = self.session.run_steps(
            latents,
            start.x0_prev,
            start.step,
            prompt_embeds,
            start.guidance,
            start.seed,
            predict=part.predict,
            fallback_threshold=self.fallback_threshold,
            level=part.level,
        )
        for graph in self.session.step_graphs(start.step, part.predict, level=part.level):
            self._open(graph)
        with closing(steps):  # a cancelled run gives back what it holds now, not when its error is forgotten
            for event in steps:
                latents = event.latents
                kinds[event.kind] += 1
                self.clock.ms["steps"] += event.ms
                if event.step == start.step:
                    self.clock.ms["first_step"] = event.ms
                if on_step is not None:
                    on_step(event)
                self._show(event)
                self._stop_if_cancelled()
        if not keep:
            self.session.release(STEP_FULL)
        return latents, kinds, part.degraded

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents to pixels."""
        self._open("vae_decoder")
        with self.clock.stage("decode"):
            return self.session.decode(latents)

    def _part(self, first_step: int) -> DevicePart:
        """How the device's steps run, by its state now."""
        from latentrelay.runtime.degrade import DevicePart, device_part

        if self.device_state is None:
            return DevicePart(self.predict)
        return device_part(
            self.session.manifest,
            self.device_state(),
            lambda predict, level: self.session.mask(first_step, predict, level=level),
            predict=self.predict,
        )

    def _show(self, event: StepEvent) -> None:
        """A small picture of a step: of its x0 where the solver keeps that, which is nearer to the end's latents."""
        spec = self.session.manifest.preview
        if self.on_preview is None or spec is None:
            return
        from latentrelay.runtime.preview import Preview, project

        latents = event.latents if event.x0_prev is None else event.x0_prev
        rgb = project(latents, spec.factors, spec.bias)
        self.on_preview(Preview(rgb, event.step + 1, event.num_steps, "device"))

    def _open(self, component: str) -> None:
        self._stop_if_cancelled()
        with self.clock.stage("load"):
            self.session.open(component)

    def _stop_if_cancelled(self) -> None:
        if self.cancel():
            raise RunCancelledError("the run was cancelled")
