"""The engine: steps 0 .. k-1 of a denoising run with classifier-free guidance, as a handoff.

In: a `RunRequest`. Out: a runtime `Handoff` with `latents` (1, C, h, w) and, for DPM-Solver++(2M) where the device goes
on, `x0_prev`. `run` makes one run alone; `begin`, `encode`, `predict` and `handoff` are its parts, with which the
batcher makes many at once. float32 on the CPU by default; noise is always drawn on the CPU, so a seed is the same
everywhere. The loop is diffusers' own arithmetic, prompt encoding included, without its logging of prompts. A
pipeline distilled to latent consistency (its scheduler is LCM's) runs "lcm" alone: one branch, guidance 1, and fresh
noise at every step but the last, drawn on from the initial noise's generator.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.cloud.cancel import Cancellation
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.latent_preview import PreviewFactors, fit_factors
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.loading import check_supported, load_pipeline, model_digest, model_family
from latentrelay.cloud.openmp import release_workers
from latentrelay.cloud.requests import RunRequest, check_limits, invalid_field, wire_version
from latentrelay.cloud.run_state import RunState, Snapshot
from latentrelay.cloud.schedules import Schedules
from latentrelay.cloud.segment_cache import SegmentCache, read_segment_cache
from latentrelay.runtime.digest import canonical_json
from latentrelay.runtime.handoff import WIRE_VERSIONS, Handoff, HandoffMeta, prompt_digest
from numpy.typing import NDArray

OnStep = Callable[[int, int], None]
STEP_CACHE = "step_cache.json"
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # requests a call, where the network is compiled for fixed shapes
_SALTED = {
    *("seed", "guidance", "height", "width", "num_steps", "split", "dtype"),
    *("sampler", "model_digest", "scheduler_digest"),
}


class Engine:
    """One loaded pipeline. `run` may be called from several threads and takes turns; `predict` belongs to one thread
    at a time. `step_cache`: the schedule for requests that allow one."""

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str,
        limits: Limits | None = None,
        channels_last: bool = False,
        compiled: bool = False,
        step_cache: SegmentCache | None = None,
    ) -> None:
        """channels_last lays the U-Net's weights out anew, in place (faster on the CPU); compiled calls it through
        torch.compile, for the batch sizes in BUCKETS."""
        check_supported(pipeline)
        self.name = name
        self.limits = limits or Limits()
        self.family = model_family(pipeline)
        self.digest = model_digest(pipeline)
        self.schedules = Schedules(pipeline.scheduler)
        self.default_sampler = self.schedules.default
        self._dtype: torch.dtype = pipeline.unet.dtype
        self.prediction_type = self.schedules.prediction_type
        self.compiled = compiled
        self._pipeline = pipeline
        self._lock, self._tokenizing = threading.Lock(), threading.Lock()
        if channels_last:
            pipeline.unet.to(memory_format=torch.channels_last)
        self._unet = torch.compile(pipeline.unet, dynamic=False) if compiled else pipeline.unet
        self._cache = step_cache if step_cache and step_cache.model_digest in (None, self.digest) else None
        self._factors: PreviewFactors | None = None
        vae = pipeline.vae.config
        self.downscale = 2 ** (len(vae.block_out_channels) - 1)
        self.scaling_factor = float(vae.scaling_factor)
        self.shift_factor = float(vae.get("shift_factor") or 0.0)

    @classmethod
    def load(
        cls,
        model: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        config: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        limits: Limits | None = None,
        adapt: Callable[[Any], object] | None = None,
        channels_last: bool | None = None,
        compiled: bool = False,
        step_cache: SegmentCache | None = None,
    ) -> Engine:
        """Load a hub id, folder or .safetensors file (see loading.py). Raises ModelLoadError, ModelRefusedError.

        channels_last: None takes it on the CPU, where it was measured to pay. step_cache: None takes the schedule in
        the model's folder (step_cache.json), where there is one; it is used for requests that allow it.
        """
        pipeline = load_pipeline(model, revision=revision, config=config, device=device, dtype=dtype, adapt=adapt)
        last = pipeline.unet.device.type == "cpu" if channels_last is None else channels_last
        beside = Path(model) / STEP_CACHE
        if step_cache is None and beside.is_file():
            step_cache = read_segment_cache(beside)
        engine = cls(
            pipeline, name=name or model, limits=limits, channels_last=last, compiled=compiled, step_cache=step_cache
        )
        release_workers()  # whoever runs it may be another thread
        return engine

    @property
    def unet(self) -> Any:
        """The network, as loaded."""
        return self._pipeline.unet

    @property
    def step_cache(self) -> SegmentCache | None:
        """The schedule for requests that allow one, or None."""
        return self._cache

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        device: torch.device = next(self._pipeline.unet.parameters()).device  # diffusers' own walks every module
        return device

    @property
    def text_length(self) -> int:
        """T: how many tokens the text states are for."""
        return int(self._pipeline.tokenizer.model_max_length)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the model was made for."""
        side = self._pipeline.unet.config.sample_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        return height * self.downscale, width * self.downscale

    def capabilities(self) -> dict[str, Any]:
        """What this engine serves, as the JSON of `GET /v1/capabilities`."""
        height, width = self.default_size
        samplers = {
            name: {
                "scheduler_class": rule.scheduler_class,
                "scheduler_digest": self.schedules.digests[name],
                "needs_x0_prev": rule.needs_x0_prev,
                "branches": rule.branches,
            }
            for name, rule in self.schedules.rules.items()
        }
        return {
            "wire_versions": list(WIRE_VERSIONS),
            "version": _version(),
            "model": {
                "name": self.name,
                "family": self.family,
                "digest": self.digest,
                "prediction_type": self.prediction_type,
            },
            "samplers": samplers,
            "default_sampler": self.default_sampler,
            "dtypes": ["float16", "float32"],
            "default_height": height,
            "default_width": width,
            "size_multiple": self.downscale,
            "max_steps": self.limits.max_steps,
            "limits": {
                "body_bytes": self.limits.max_body_bytes,
                "prompt_chars": self.limits.max_prompt_chars,
                "side": self.limits.max_side,
                "guidance": self.limits.max_guidance,
                "queue": self.limits.queue,
            },
        }

    def check(self, request: RunRequest) -> str:
        """The sampler the request will get. Raises ProblemError: 409 naming what differs, 422 for what cannot be, 406
        where no handoff version is shared."""
        check_limits(request, self.limits)
        wire_version(request)
        sampler = request.sampler or self.default_sampler
        if request.model_digest not in (None, self.digest):
            raise _mismatch("model_digest", request.model_digest, self.digest)
        if sampler not in self.schedules.rules:
            raise _mismatch("sampler", sampler, ", ".join(self.schedules.rules))
        digest = self.schedules.digests[sampler]
        if request.scheduler_digest not in (None, digest):
            raise _mismatch("scheduler_digest", request.scheduler_digest, digest)
        if self.schedules.rules[sampler].branches == 1:
            _check_one_branch(request)
        for field in ("height", "width"):
            value = getattr(request, field)
            if value % self.downscale:
                detail = f"{field} is {value}, expected a multiple of {self.downscale}."
                raise invalid_field(field, detail, value, f"a multiple of {self.downscale}")
        self.schedules.fork(sampler, request.num_steps)
        return sampler

    def run(
        self, request: RunRequest, *, cancellation: Cancellation | None = None, on_step: OnStep | None = None
    ) -> Handoff:
        """Run steps 0 .. split-1 alone and hand over. Waits for its turn.

        on_step(step, num_steps) follows every step. Raises what `check` raises, RunCancelled between two steps, and
        NonFiniteError naming the step at which the latents stopped being numbers.
        """
        self.check(request)
        flag = cancellation or Cancellation()
        with self._lock, torch.inference_mode():
            state = self.begin(request)
            if not state.done:
                flag.check(0)
                state.embeds = torch.cat([self.encode([text]) for text in self.texts(request)])
            while not state.done:
                flag.check(state.step)
                computed = state.needs_network
                state.advance(self.predict([state]) if computed else state.held(), computed=computed)
                state.check_finite()
                if on_step is not None:
                    on_step(state.step - 1, request.num_steps)
        return self.handoff(state, state.snapshot())

    def begin(self, request: RunRequest) -> RunState:
        """The run before its first step, with its noise and without its text states. Raises what `check` raises, and
        ProblemError 422 where the model's schedule does not have as many steps."""
        sampler = self.check(request)
        scheduler = self.schedules.fork(sampler, request.num_steps)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        noise = torch.randn(self.latent_shape(request), generator=generator).to(self.device, self._dtype)
        cache = self._cache if request.step_cache and self._cache else None
        fitting = cache if cache and cache.fits(sampler, request.num_steps) else None
        return RunState(request, sampler, self.schedules.rules[sampler], scheduler, noise, generator, fitting)

    def latent_shape(self, request: RunRequest) -> tuple[int, int, int, int]:
        """(1, C, h, w) of a request's latents."""
        rows, columns = request.height // self.downscale, request.width // self.downscale
        return 1, self.unet.config.in_channels, rows, columns

    def texts(self, request: RunRequest) -> tuple[str, ...]:
        """The texts of a request's branches: the negative prompt and the prompt, or the prompt alone."""
        rule = self.schedules.rules[request.sampler or self.default_sampler]
        return (request.negative_prompt, request.prompt)[-rule.branches :]

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """(n, T, D): the text encoder's states. Longer prompts are cut silently: diffusers would log what it cut."""
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        with self._tokenizing:
            tokens = tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        states: torch.Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return states.to(self._dtype)

    def predict(self, states: Sequence[RunState], embeds: torch.Tensor | None = None) -> torch.Tensor:
        """(R, C, h, w): the guided noise predictions of R states of one latent size, from one call of the network.

        embeds: `stacked_embeds(states)`, where the caller has kept it from the last call.
        """
        branches = states[0].rule.branches
        filled = [*states, *[states[-1]] * (bucket(len(states)) - len(states))] if self.compiled else list(states)
        sample = torch.cat([each.sample() for each in filled])
        timesteps = torch.stack([each.timestep for each in filled]).to(self.device)
        if embeds is None or self.compiled:
            embeds = stacked_embeds(filled)
        both = self._unet(
            torch.cat([sample] * branches),
            torch.cat([timesteps] * branches),
            encoder_hidden_states=embeds,
            return_dict=False,
        )[0]
        predicted: torch.Tensor = both
        if branches == 2:
            uncond, cond = both.chunk(2)
            guidance = torch.tensor([each.request.guidance for each in filled], dtype=torch.float32, device=both.device)
            # In half precision torch multiplies by a number in float32 and rounds once: so does this.
            predicted = uncond + (guidance.view(-1, 1, 1, 1) * (cond - uncond).float()).to(both.dtype)
        return predicted[: len(states)]

    def handoff(self, state: RunState, snapshot: Snapshot) -> Handoff:
        """A run's handoff at a step it has reached, in the newest schema version that the request reads.

        Raises HandoffFormatError for what is out of float16's range.
        """
        request = state.request
        return Handoff(
            latents=_wire(snapshot.latents, request.dtype),
            x0_prev=None if snapshot.x0_prev is None else _wire(snapshot.x0_prev, request.dtype),
            meta=self._meta(state, snapshot.step),
        )

    def preview(self, latents: torch.Tensor) -> NDArray[np.uint8]:
        """(h, w, 3): a small picture of latents (1, C, h, w) by a linear map to RGB, fitted at the first call."""
        with torch.inference_mode():
            if self._factors is None:
                self._factors = fit_factors(self._pipeline.vae, self.scaling_factor, self.shift_factor)
            return self._factors.picture(latents)

    def _meta(self, state: RunState, next_step: int) -> HandoffMeta:
        request, scheduler = state.request, state.scheduler
        salt = self._salt(request)
        return HandoffMeta(
            model_family=self.family,
            model_digest=self.digest,
            scheduler_class=type(scheduler).__name__,
            scheduler_digest=self.schedules.digests[state.sampler],
            num_steps=request.num_steps,
            timesteps=tuple(float(each) for each in scheduler.timesteps.tolist()),
            next_step=next_step,
            prediction_type=self.prediction_type,
            guidance=float(request.guidance),
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            seed=request.seed,
            init_noise_sigma=float(scheduler.init_noise_sigma),
            height=request.height,
            width=request.width,
            dtype=request.dtype,
            prompt_salt=salt,
            prompt_digest=prompt_digest(salt, request.prompt, request.negative_prompt),
            producer={"name": "latentrelay.cloud", "version": _version()},
            schema_version=wire_version(request),
        )

    def _salt(self, request: RunRequest) -> str:
        """16 bytes in hex from everything but the prompts: equal requests give equal bytes, other seeds other salts."""
        public = request.model_dump(mode="json", include=_SALTED)
        return hashlib.sha256(canonical_json({"model": self.digest, **public})).hexdigest()[:32]


def bucket(requests: int) -> int:
    """The fixed batch size that a call for so many requests is filled up to, where the network is compiled."""
    return next((each for each in BUCKETS if each >= requests), requests)


def stacked_embeds(states: Sequence[RunState]) -> torch.Tensor:
    """(branches * R, T, D): the text states of R runs, all of one branch before the next."""
    texts = [each.embeds for each in states if each.embeds is not None]
    if len(texts) < len(states):
        raise ValueError("a run has no text states yet")
    return torch.stack(texts, dim=1).flatten(0, 1)


def _wire(tensor: torch.Tensor, dtype: str) -> Any:
    single = np.asarray(tensor.float().cpu().contiguous())
    with np.errstate(over="ignore"):  # what is out of float16's range becomes infinite, which the handoff refuses
        return single.astype(np.float16 if dtype == "float16" else np.float32)


def _check_one_branch(request: RunRequest) -> None:
    """422 for what a network with its guidance built in cannot follow."""
    if request.guidance != 1.0:
        detail = "This model's guidance is in its network and cannot be changed; send 1."
        raise invalid_field("guidance", detail, request.guidance, "1")
    if request.negative_prompt:
        raise invalid_field("negative_prompt", "This model has no branch for a negative prompt.", "str", "an empty one")


def _mismatch(field: str, got: object, expected: object) -> ProblemError:
    return ProblemError(
        409,
        "handoff-mismatch",
        f"{field} is not what this service runs; build the bundle from this model, or ask another service.",
        field=field,
        received=got,
        wanted=expected,
    )


@functools.cache  # reading it takes milliseconds, and every handoff names it
def _version() -> str:
    return importlib.metadata.version("latentrelay")
