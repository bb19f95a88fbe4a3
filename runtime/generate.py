"""Prompt in, picture out: the first steps from a cloud or a handoff where there is one, the rest here.

One call makes one picture. For several pictures of a prompt, open one `Session` and call `generate` once for each seed:
the graphs stay loaded. If the cloud cannot be reached the device runs all steps and the result says so; if it refuses,
the refusal is raised.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.errors import CloudUnavailableError, RequestError, RunCancelledError
from latentrelay.runtime.handoff import Handoff
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.runtime.manifest import Manifest
from latentrelay.runtime.picture import save_png, to_image
from latentrelay.runtime.prediction_check import FULL, PREDICTED, STEP_FULL
from latentrelay.runtime.session import Session, check_guidance
from latentrelay.runtime.step_loop import RECOMPUTED, StepEvent
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

STAGES = ("handoff", "load", "text_encoder", "steps", "first_step", "decode", "total")


@dataclass(frozen=True, eq=False)
class Result:
    """One picture and how it came about.

    pixels (H, W, 3) float32 in 0..1; latents (1, C, h, w) float32; `path_taken` "cloud" (all steps there), "hybrid",
    "device" or "device-fallback"; `steps` {"cloud", "device"}; `kinds` how many of the device's steps were "full",
    "predicted" and "recomputed"; `ms` per stage, 0 where a stage did not run; `providers` really used; `digest` of the
    bundle; `fallback_reason` where there was one.
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
) -> Result:
    """Make one picture.

    `source` is a session (stays open), a bundle, or a bundle's folder (verified first). `guidance` None is the bundle's
    default. `split` is the first step that the device runs: None is 0 without a cloud, and with one half the run or the
    nearest split from which the bundle predicts steps; 0
    never asks the cloud. A ready `handoff` stands for the cloud; its seed, guidance and split hold. `cancel` is asked
    before every stage and step. `predict` and `fallback_threshold` are `Session.run_steps`'s: whether the bundle's
    predicted steps are predicted, and when one is computed after all. Raises RequestError, BundleError, HandoffError,
    SessionError, CloudError (a cloud out of reach only with `fallback=False`), RunCancelledError.
    """
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
            seed,
            guidance,
            wire_dtype,
            cancel or (lambda: False),
            predict,
            fallback_threshold,
        )
        try:
            start = run.begin(split, cloud, handoff, fallback)
            latents, kinds = run.denoise(start, on_step, keep=session is source)
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
    )


def _default_split(manifest: Manifest) -> int:
    """Half the run; of a bundle that predicts steps from some splits on, the one of them that is nearest to it."""
    half = manifest.schedule.num_steps // 2
    masks = manifest.prediction.masks if manifest.prediction is not None else ()
    return min((mask.split for mask in masks if mask.split > 0), key=lambda split: abs(split - half), default=half)


@dataclass(frozen=True, eq=False)
class _Start:
    """Where the device begins: its first step, the arrays there, and how they came."""

    latents: NDArray[Any]
    x0_prev: NDArray[Any] | None
    step: int
    seed: int
    guidance: float
    path_taken: str
    handoff_bytes: int = 0
    fallback_reason: str | None = None


@dataclass(frozen=True, eq=False)
class _Run:
    """One picture's arguments; the three stages as methods."""

    session: Session
    clock: _Clock
    prompt: str
    negative_prompt: str
    seed: int
    guidance: float | None
    wire_dtype: str
    cancel: Callable[[], bool]
    predict: bool
    fallback_threshold: float | None

    def begin(
        self, split: int | None, cloud: CloudClient | str | None, handoff: Handoff | None, fallback: bool
    ) -> _Start:
        """Ask the cloud, take the handoff, or start from noise."""
        steps = self.session.manifest.schedule.num_steps
        if self.guidance is not None and not 1.0 <= self.guidance < math.inf:
            raise RequestError(
                "guidance is out of range", got=self.guidance, expected="a finite number >= 1", do="1 is no guidance."
            )
        if self.guidance is not None:
            check_guidance(self.session.manifest, self.guidance)
        if handoff is not None:
            if cloud is not None:
                raise RequestError("both a cloud and a handoff were given", do="Give one of them.")
            return self._from_handoff(handoff, guidance=self.guidance, split=split)
        first = split if split is not None else (_default_split(self.session.manifest) if cloud is not None else 0)
        if not 0 <= first <= steps:
            raise RequestError("split is out of range", got=first, expected=f"0 .. {steps}")
        if first == 0:
            return self._from_noise("device")
        if cloud is None:
            raise RequestError(f"split {first} needs a cloud or a handoff", do="Give one, or split 0.")
        self._stop_if_cancelled()
        try:
            return self._from_cloud(cloud, first)
        except CloudUnavailableError as error:
            if not fallback:
                raise
            return self._from_noise("device-fallback", reason=str(error))

    def denoise(
        self, start: _Start, on_step: Callable[[StepEvent], None] | None, *, keep: bool
    ) -> tuple[NDArray[np.float32], dict[str, int]]:
        """Run the device's steps; the final latents, and how many steps of each kind they took. Graphs no longer needed
        are freed unless `keep`."""
        latents, kinds = np.asarray(start.latents, np.float32), dict.fromkeys((FULL, PREDICTED, RECOMPUTED), 0)
        if start.step == self.session.manifest.schedule.num_steps:
            return latents, kinds
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
            predict=self.predict,
            fallback_threshold=self.fallback_threshold,
        )
        for graph in self.session.step_graphs(start.step, self.predict):
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
                self._stop_if_cancelled()
        if not keep:
            self.session.release(STEP_FULL)
        return latents, kinds

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Latents to pixels."""
        self._open("vae_decoder")
        with self.clock.stage("decode"):
            return self.session.decode(latents)

    def _from_noise(self, path_taken: str, reason: str | None = None) -> _Start:
        guidance = self.session.manifest.guidance.default if self.guidance is None else self.guidance
        latents = self.session.initial_latents(self.seed)
        return _Start(latents, None, 0, self.seed, guidance, path_taken, fallback_reason=reason)

    def _from_cloud(self, cloud: CloudClient | str, split: int) -> _Start:
        request = HandoffRequest.for_bundle(
            self.session.manifest,
            self.prompt,
            split=split,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            guidance=self.guidance,
            dtype=self.wire_dtype,
        )
        client = CloudClient(cloud) if isinstance(cloud, str) else cloud
        try:
            with self.clock.stage("handoff"):
                handoff = client.handoff(request)
        finally:
            if client is not cloud:
                client.close()
        return self._from_handoff(handoff, seed=self.seed, guidance=request.guidance, split=split)

    def _from_handoff(
        self, handoff: Handoff, *, seed: int | None = None, guidance: float | None = None, split: int | None = None
    ) -> _Start:
        handoff.check(
            self.session.manifest,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=seed,
            guidance=guidance,
            split=split,
        )
        meta = handoff.meta
        whole = meta.next_step == meta.num_steps
        path = "cloud" if whole else "hybrid" if meta.next_step else "device"
        size = len(handoff.to_bytes())
        return _Start(handoff.latents, handoff.x0_prev, meta.next_step, meta.seed, meta.guidance, path, size)

    def _open(self, component: str) -> None:
        self._stop_if_cancelled()
        with self.clock.stage("load"):
            self.session.open(component)

    def _stop_if_cancelled(self) -> None:
        if self.cancel():
            raise RunCancelledError("the run was cancelled")
