"""A session: the graphs of one bundle, opened when first used, and the step loop.

prompt -> `encode` (2, T, D) -> `run_steps` yields latents (1, C, h, w) after every step -> `decode` (H, W, 3) in 0..1.
One call of a step graph is one whole sampler step, so there is no scheduler here: the loop knows the mask of the split,
which says whether a step is computed or predicted, and keeps the ladders between steps. What comes out of each stage
is checked for NaN and Inf. A session is for one thread at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Arrays, Backend, Graph, open_backend
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import RequestError, SessionError
from latentrelay.runtime.ladders import Ladders
from latentrelay.runtime.manifest import Component, Manifest, StepMask
from latentrelay.runtime.noise import NoiseStream, initial_noise
from latentrelay.runtime.prediction_check import FULL, LEVELS, NORMAL, PREDICTED, STEP_FULL, STEP_PREDICTED
from latentrelay.runtime.selftest import SelftestReport, run_selftest
from latentrelay.runtime.step_loop import Float32, Route, StepEvent, finite, loop
from latentrelay.runtime.tokenizer import PromptTokenizer
from numpy.typing import NDArray


class Session:
    """Graphs of one bundle. Use it in a `with` block, or call `close`.

    `providers` and `threads` override the manifest's. `backend`: another one by name ("onnxruntime", "openvino",
    "coreml"; the plain graphs run with the first two), or an object that stands for it altogether.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.load_ms = 0.0
        if backend is None or isinstance(backend, str):
            backend = open_backend(
                self.manifest.backend,
                providers=providers,
                threads=threads,
                name=backend,
                packages=self.manifest.coreml,
                root=bundle.path,
            )
        self._backend = backend
        self._graphs: dict[str, Graph] = {}
        self._ladders: Ladders | None = None  # of no run at the moment
        self._tokenizer: PromptTokenizer | None = None
        self._providers: dict[str, tuple[str, ...]] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def providers_used(self) -> tuple[str, ...]:
        """The providers that the graphs opened so far were really set up with, without repetition."""
        return tuple(dict.fromkeys(name for names in self._providers.values() for name in names))

    @property
    def providers_by_component(self) -> dict[str, tuple[str, ...]]:
        """The same for each component."""
        return dict(self._providers)

    def open(self, component: str) -> None:
        """Load a component now instead of at its first use; the time is added to `load_ms`."""
        if component in self._graphs:
            return
        started = time.perf_counter()
        spec = self._component(component)
        self._graphs[component] = self._backend.load(self.bundle.file(spec.path), spec)
        self._providers[component] = self._graphs[component].providers
        self.load_ms += (time.perf_counter() - started) * 1e3

    def can_run(self, component: str) -> bool:
        """Whether the backend has a graph for a component: Core ML has packages for some only."""
        roles = getattr(self._backend, "roles", None)
        return roles is None or component in roles

    def release(self, component: str) -> None:
        """Free a component's memory; it is loaded again when used again. The step graphs go together."""
        self._graphs.pop(component, None)
        if component == STEP_FULL:
            self._graphs.pop(STEP_PREDICTED, None)
            self._ladders = None

    def is_open(self, component: str) -> bool:
        """Whether a component is loaded."""
        return component in self._graphs

    def close(self) -> None:
        """Free everything. The session may be used again afterwards and loads anew."""
        self._graphs.clear()
        self._tokenizer = self._ladders = None

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The bundle's tokenizer."""
        if self._tokenizer is None:
            spec = self.manifest.tokenizer
            self._tokenizer = PromptTokenizer(self.bundle.file(spec.path), spec)
        return self._tokenizer

    def run_component(self, component: str, inputs: Arrays, outputs: Arrays | None = None) -> dict[str, NDArray[Any]]:
        """Run one graph by port names, `outputs` as in `Graph`; for tools and tests. Raises as it does."""
        self.open(component)
        return self._graphs[component].run(inputs, outputs)

    def encode(self, prompt: str, negative_prompt: str = "") -> Float32:
        """Prompt embeddings (2, T, D) float32: unconditional (the negative prompt) first, then conditional.

        (1, T, D), the conditional alone, where the bundle has one guidance branch; a negative prompt is a RequestError.
        """
        spec = self._component("text_encoder")
        if self.manifest.guidance.branches == 1 and negative_prompt:
            raise RequestError(
                "the bundle has no branch for a negative prompt", do="Leave it out: guidance is in its network."
            )
        rows = []
        for text in (negative_prompt, prompt)[-self.manifest.guidance.branches :]:
            outputs = self.run_component("text_encoder", {spec.inputs[0].name: self.tokenizer.ids(text)})
            rows.append(finite(outputs[spec.outputs[0].name], "text_encoder"))
        return np.concatenate(rows, axis=0)

    def initial_latents(self, seed: int) -> Float32:
        """The latents (1, C, h, w) that a run of `seed` starts from: noise times the initial sigma."""
        latent = self.manifest.latent
        noise = initial_noise(seed, (1, latent.channels, latent.height, latent.width))
        return noise * np.float32(self.manifest.schedule.init_noise_sigma)

    def step_graphs(self, first_step: int, predict: bool = True, *, level: str = NORMAL) -> tuple[str, ...]:
        """The step graphs that a run from `first_step` at `level` uses."""
        mask = self.mask(first_step, predict, level=level)
        return (STEP_FULL, STEP_PREDICTED) if mask is not None and PREDICTED in mask.mask else (STEP_FULL,)

    def mask(self, first_step: int, predict: bool = True, *, level: str = NORMAL) -> StepMask | None:
        """The mask that a run from `first_step` at `level` follows, the normal one where the split has no hot one (its
        `level` says which); None where every step is computed. Raises RequestError for an unknown level."""
        if level not in LEVELS:
            raise RequestError("unknown level of prediction", got=level, expected=" | ".join(LEVELS))
        prediction = self.manifest.prediction if predict else None
        return prediction.mask(first_step, level) if prediction is not None else None

    def run_steps(
        self,
        latents: NDArray[Any],
        x0_prev: NDArray[Any] | None,
        first_step: int,
        prompt_embeds: NDArray[Any],
        guidance: float,
        seed: int | None = None,
        *,
        predict: bool = True,
        fallback_threshold: float | None = None,
        level: str = NORMAL,
    ) -> Generator[StepEvent]:
        """Run steps first_step .. N-1 and yield an event after each; stop iterating to stop the run.

        latents (1, C, h, w); x0_prev the same or None where no step was made yet (or the solver has no memory);
        prompt_embeds (2, T, D), or (1, T, D) with one guidance branch; seed of the whole run, needed where the sampler
        adds noise at each step. `predict=False` computes every step. `fallback_threshold`: the probe error above which
        a predicted step is computed after all, in the place of the manifest's (inf: never). `level` "normal", or "hot"
        for the mask with fewer computed steps where the bundle has one for this split. Raises RequestError at once on
        arguments that do not fit, NonFiniteError naming the step.
        """
        schedule, spec = self.manifest.schedule, self._component(STEP_FULL)
        if not 0 <= first_step <= schedule.num_steps:
            raise RequestError("first_step is out of range", got=first_step, expected=f"0 .. {schedule.num_steps}")
        needs_memory = any(port.role == "x0_prev" for port in spec.inputs)
        if needs_memory and x0_prev is None and 0 < first_step < schedule.num_steps:
            raise RequestError("the solver needs x0_prev of the step before", got="None", expected="(1, C, h, w)")
        memory = np.zeros_like(latents, dtype=np.float32) if x0_prev is None else x0_prev
        check_guidance(self.manifest, guidance)
        noise = None
        if any(port.role == "noise" for port in spec.inputs):
            if seed is None:
                raise RequestError("this sampler adds noise at each step", expected="the seed of the run")
            noise = NoiseStream(seed, latents.shape)
            noise.skip(1 + first_step)  # the initial noise, and one draw for each step made elsewhere
        mask, limit = self.mask(first_step, predict, level=level), self._limit(fallback_threshold)
        kinds = mask.mask if mask is not None else (FULL,) * (schedule.num_steps - first_step)
        route = Route(first_step, kinds, mask.row if mask is not None else 0, limit, noise)
        state = {"latents": latents, "x0_prev": memory, "prompt_embeds": prompt_embeds, "guidance": np.array(guidance)}
        return self._steps(route, state)

    def _steps(self, route: Route, state: dict[str, NDArray[Any]]) -> Generator[StepEvent]:
        """The loop with its graphs opened first and ladders that no other run has; they come back however it ends."""
        for graph in dict.fromkeys(STEP_FULL if kind == FULL else STEP_PREDICTED for kind in route.mask):
            self.open(graph)
        ladders, self._ladders = self._ladders or Ladders(self._component(STEP_FULL).inputs), None
        try:
            yield from loop(self.run_component, self.manifest, route, state, ladders)
        finally:
            self._ladders = ladders

    def _limit(self, asked: float | None) -> float:
        prediction = self.manifest.prediction
        if asked is None:
            own = prediction.fallback_threshold if prediction is not None else None
            return math.inf if own is None else own
        if prediction is None or prediction.probe is None:
            raise RequestError("the bundle's predicted steps report no probe error", do="Leave the threshold out.")
        if not asked >= 0:
            raise RequestError("fallback_threshold is out of range", got=asked, expected="0 or more")
        return asked

    def decode(self, latents: NDArray[Any]) -> Float32:
        """The picture (H, W, 3) float32 in 0..1 of latents (1, C, h, w)."""
        spec, (scaling, shift) = self._component("vae_decoder"), self.manifest.decoder_scaling
        unscaled = np.asarray(latents, np.float32) / np.float32(scaling) + np.float32(shift)
        outputs = self.run_component("vae_decoder", {spec.inputs[0].name: unscaled})
        sample = finite(outputs[spec.outputs[0].name], "vae_decoder")
        pixels: Float32 = np.clip(sample[0].transpose(1, 2, 0) / 2 + 0.5, 0.0, 1.0)
        return pixels

    def selftest(self) -> SelftestReport:
        """Run the bundle's sample inputs here and compare with its expected outputs, in dB per component."""
        return run_selftest(self)

    def _component(self, name: str) -> Component:
        component = self.manifest.components.get(name)
        if component is None:
            raise SessionError("the bundle has no such component", got=name, expected=list(self.manifest.components))
        return component


def check_guidance(manifest: Manifest, guidance: float) -> None:
    """Raise RequestError for a scale that the bundle's one guidance branch cannot follow."""
    if manifest.guidance.branches == 1 and guidance != 1.0:
        raise RequestError(
            "the bundle's guidance is in its network and cannot be changed",
            got=guidance,
            expected=1.0,
            do="Leave guidance out.",
        )
