"""A session: the graphs of one bundle, opened when first used, and the step loop.

prompt -> `encode` (2, T, D) -> `run_steps` yields latents (1, C, h, w) after every step -> `decode` (H, W, 3) in 0..1.
One call of the step graph is one whole sampler step, so there is no scheduler here. What comes out of each stage is
checked for NaN and Inf. A session is for one thread at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from latentrelay.runtime.backend import Backend, Graph, open_backend
from latentrelay.runtime.bundle import Bundle
from latentrelay.runtime.errors import NonFiniteError, RequestError, SessionError
from latentrelay.runtime.manifest import Component, Manifest
from latentrelay.runtime.noise import NoiseStream, initial_noise
from latentrelay.runtime.selftest import SelftestReport, run_selftest
from latentrelay.runtime.tokenizer import PromptTokenizer
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StepEvent:
    """One finished step: its index in the whole run, the run's length, the network's timestep, the arrays it made
    (the next step's input; copy before changing them), milliseconds, and which graph ran ("full")."""

    step: int
    num_steps: int
    timestep: float
    latents: Float32
    x0_prev: Float32 | None
    ms: float
    kind: str = "full"


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
        """Free a component's memory; it is loaded again when used again."""
        self._graphs.pop(component, None)

    def is_open(self, component: str) -> bool:
        """Whether a component is loaded."""
        return component in self._graphs

    def close(self) -> None:
        """Free everything. The session may be used again afterwards and loads anew."""
        self._graphs.clear()
        self._tokenizer = None

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The bundle's tokenizer."""
        if self._tokenizer is None:
            spec = self.manifest.tokenizer
            self._tokenizer = PromptTokenizer(self.bundle.file(spec.path), spec)
        return self._tokenizer

    def run_component(self, component: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one graph by port names; for tools and tests. Raises SessionError, RequestError."""
        self.open(component)
        return self._graphs[component].run(inputs)

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
            rows.append(_finite(outputs[spec.outputs[0].name], "text_encoder"))
        return np.concatenate(rows, axis=0)

    def initial_latents(self, seed: int) -> Float32:
        """The latents (1, C, h, w) that a run of `seed` starts from: noise times the initial sigma."""
        latent = self.manifest.latent
        noise = initial_noise(seed, (1, latent.channels, latent.height, latent.width))
        return noise * np.float32(self.manifest.schedule.init_noise_sigma)

    def run_steps(
        self,
        latents: NDArray[Any],
        x0_prev: NDArray[Any] | None,
        first_step: int,
        prompt_embeds: NDArray[Any],
        guidance: float,
        seed: int | None = None,
    ) -> Iterator[StepEvent]:
        """Run steps first_step .. N-1 and yield an event after each; stop iterating to stop the run.

        latents (1, C, h, w); x0_prev the same or None where no step was made yet (or the solver has no memory);
        prompt_embeds (2, T, D), or (1, T, D) with one guidance branch; seed of the whole run, needed where the sampler
        adds noise at each step. Raises RequestError at once on arguments that do not fit, NonFiniteError naming the
        step.
        """
        schedule, spec = self.manifest.schedule, self._component("step_full")
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
        return self._steps(spec, latents, memory, first_step, prompt_embeds, guidance, noise)

    def _steps(
        self,
        spec: Component,
        latents: NDArray[Any],
        x0_prev: NDArray[Any],
        first_step: int,
        prompt_embeds: NDArray[Any],
        guidance: float,
        noise: NoiseStream | None,
    ) -> Iterator[StepEvent]:
        schedule = self.manifest.schedule
        state = {"latents": latents, "x0_prev": x0_prev, "prompt_embeds": prompt_embeds, "guidance": np.array(guidance)}
        for step in range(first_step, schedule.num_steps):
            self.open("step_full")
            if noise is not None:  # the last step adds none, and its draw is not made: as diffusers does
                state["noise"] = noise.draw() if step < schedule.num_steps - 1 else np.zeros_like(state["latents"])
            started = time.perf_counter()
            outputs = self.run_component("step_full", _by_name(spec, {**state, "step": np.array(step)}))
            ms = (time.perf_counter() - started) * 1e3
            for port in spec.outputs:
                state[port.role] = _finite(outputs[port.name], "step_full", step)
            memory = state["x0_prev"] if schedule.needs_x0_prev else None
            yield StepEvent(step, schedule.num_steps, schedule.timesteps[step], state["latents"], memory, ms)

    def decode(self, latents: NDArray[Any]) -> Float32:
        """The picture (H, W, 3) float32 in 0..1 of latents (1, C, h, w)."""
        spec, (scaling, shift) = self._component("vae_decoder"), self.manifest.decoder_scaling
        unscaled = np.asarray(latents, np.float32) / np.float32(scaling) + np.float32(shift)
        outputs = self.run_component("vae_decoder", {spec.inputs[0].name: unscaled})
        sample = _finite(outputs[spec.outputs[0].name], "vae_decoder")
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


def _by_name(spec: Component, roles: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    unknown = [port.role for port in spec.inputs if port.role not in roles]
    if unknown:
        raise SessionError(
            f"{spec.path} wants an input that this runtime does not know",
            got=unknown[0],
            expected=list(roles),
            do="Update latentrelay.",
        )
    return {port.name: roles[port.role] for port in spec.inputs}


def _finite(array: NDArray[Any], stage: str, step: int | None = None) -> Float32:
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise NonFiniteError(stage, step=step, count=bad)
    return array.astype(np.float32, copy=False)
