"""The engine: steps 0 .. k-1 of a denoising run with classifier-free guidance, as a handoff.

In: a `RunRequest`. Out: a runtime `Handoff` with `latents` (1, C, h, w) and, for DPM-Solver++(2M) where the device goes
on, `x0_prev`. float32 on the CPU by default; noise is always drawn on the CPU, so a seed is the same everywhere. The
loop is diffusers' own arithmetic, prompt encoding included, without its logging of prompts. One run at a time. A
pipeline distilled to latent consistency (its scheduler is LCM's) runs "lcm" alone: one branch, guidance 1, and fresh
noise at every step but the last, drawn on from the initial noise's generator.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from latentrelay.cloud.cancel import Cancellation
from latentrelay.cloud.errors import ProblemError
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.loading import check_supported, load_pipeline, model_digest, model_family
from latentrelay.cloud.requests import RunRequest, check_limits, invalid_field
from latentrelay.runtime.digest import canonical_json
from latentrelay.runtime.errors import NonFiniteError
from latentrelay.runtime.handoff import SCHEMA_VERSION, Handoff, HandoffMeta, prompt_digest
from latentrelay.runtime.samplers import SAMPLERS, SamplerRule, is_few_step, sampler_for, scheduler_digest

OnStep = Callable[[int, int], None]


class Engine:
    """One loaded pipeline that starts runs. Safe to call from several threads; runs take turns."""

    def __init__(self, pipeline: Any, *, name: str, limits: Limits | None = None) -> None:
        check_supported(pipeline)
        self.name = name
        self.limits = limits or Limits()
        self.family = model_family(pipeline)
        self.digest = model_digest(pipeline)
        self.default_sampler = sampler_for(type(pipeline.scheduler).__name__)
        self._pipeline = pipeline
        self._lock = threading.Lock()
        few_step = is_few_step(type(pipeline.scheduler).__name__)
        self._samplers = {name: rule for name, rule in SAMPLERS.items() if (name == "lcm") == few_step}
        self._digests = {each: _digest(self._scheduler(each)) for each in self._samplers}
        vae = pipeline.vae.config
        self.downscale = 2 ** (len(vae.block_out_channels) - 1)
        self.scaling_factor = float(vae.scaling_factor)
        self.shift_factor = float(vae.get("shift_factor") or 0.0)
        self.prediction_type = str(self._scheduler(self.default_sampler).config.prediction_type)

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
    ) -> Engine:
        """Load a hub id, folder or .safetensors file (see loading.py). Raises ModelLoadError, ModelRefusedError."""
        pipeline = load_pipeline(model, revision=revision, config=config, device=device, dtype=dtype, adapt=adapt)
        return cls(pipeline, name=name or model, limits=limits)

    def capabilities(self) -> dict[str, Any]:
        """What this engine serves, as the JSON of `GET /v1/capabilities`."""
        side = self._pipeline.unet.config.sample_size
        height, width = side if isinstance(side, (tuple, list)) else (side, side)
        samplers = {
            name: {
                "scheduler_class": rule.scheduler_class,
                "scheduler_digest": self._digests[name],
                "needs_x0_prev": rule.needs_x0_prev,
                "branches": rule.branches,
            }
            for name, rule in self._samplers.items()
        }
        return {
            "wire_versions": [SCHEMA_VERSION],
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
            "default_height": height * self.downscale,
            "default_width": width * self.downscale,
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
        """The sampler the request will get. Raises ProblemError: 409 naming what differs, 422 for what cannot be."""
        check_limits(request, self.limits)
        sampler = request.sampler or self.default_sampler
        if request.model_digest not in (None, self.digest):
            raise _mismatch("model_digest", request.model_digest, self.digest)
        if sampler not in self._samplers:
            raise _mismatch("sampler", sampler, ", ".join(self._samplers))
        if request.scheduler_digest not in (None, self._digests[sampler]):
            raise _mismatch("scheduler_digest", request.scheduler_digest, self._digests[sampler])
        if self._samplers[sampler].branches == 1:
            _check_one_branch(request)
        for field in ("height", "width"):
            value = getattr(request, field)
            if value % self.downscale:
                detail = f"{field} is {value}, expected a multiple of {self.downscale}."
                raise invalid_field(field, detail, value, f"a multiple of {self.downscale}")
        return sampler

    def run(
        self, request: RunRequest, *, cancellation: Cancellation | None = None, on_step: OnStep | None = None
    ) -> Handoff:
        """Run steps 0 .. split-1 and hand over. Waits for its turn.

        on_step(step, num_steps) follows every step. Raises what `check` raises, RunCancelled between two steps, and
        NonFiniteError naming the step at which the latents stopped being numbers.
        """
        sampler = self.check(request)
        with self._lock, torch.inference_mode():
            scheduler = self._scheduler(sampler)
            try:
                scheduler.set_timesteps(request.num_steps)
            except ValueError as error:  # LCM has no more steps than its training schedule had
                detail = f"The model's schedule has no {request.num_steps} steps: {error}"
                raise invalid_field("num_steps", detail, request.num_steps, "fewer steps") from error
            if len(scheduler.timesteps) != request.num_steps:
                count = len(scheduler.timesteps)
                detail = f"The model's schedule has {count} steps for num_steps = {request.num_steps}."
                raise invalid_field("num_steps", detail, request.num_steps, "another number of steps")
            rule = self._samplers[sampler]
            latents, x0_prev = self._steps(request, scheduler, rule, cancellation or Cancellation(), on_step)
        keeps_x0 = rule.needs_x0_prev and 0 < request.split < request.num_steps
        return Handoff(
            latents=_wire(latents, request.dtype),
            x0_prev=_wire(x0_prev, request.dtype) if keeps_x0 and x0_prev is not None else None,
            meta=self._meta(request, scheduler, self._digests[sampler]),
        )

    def _steps(
        self,
        request: RunRequest,
        scheduler: Any,
        rule: SamplerRule,
        cancellation: Cancellation,
        on_step: OnStep | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (1, C, h, w) in float32 after `split` steps, and the last x0 of a multistep solver."""
        unet = self._pipeline.unet
        shape = (1, unet.config.in_channels, request.height // self.downscale, request.width // self.downscale)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        latents = torch.randn(shape, generator=generator).to(unet.device, unet.dtype) * scheduler.init_noise_sigma
        if request.split == 0:
            return latents, None
        cancellation.check(0)
        texts = (request.negative_prompt, request.prompt)[-rule.branches :]
        prompt_embeds = torch.cat([self._encode(text) for text in texts])
        for step, timestep in enumerate(scheduler.timesteps[: request.split]):
            cancellation.check(step)
            sample = scheduler.scale_model_input(torch.cat([latents] * rule.branches), timestep)
            noise_pred = unet(sample, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
            if rule.branches == 2:
                uncond, cond = noise_pred.chunk(2)
                noise_pred = uncond + request.guidance * (cond - uncond)
            if rule.needs_noise:  # in float32, so that half precision draws the same noise
                arguments = (noise_pred.float(), timestep, latents.float(), generator)
                latents = scheduler.step(*arguments, return_dict=False)[0].to(unet.dtype)
            else:
                latents = scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
            bad = int(latents.numel() - torch.isfinite(latents).sum())
            if bad:
                raise NonFiniteError("the cloud's U-Net", step=step, count=bad)
            if on_step is not None:
                on_step(step, request.num_steps)
        history = getattr(scheduler, "model_outputs", None)
        return latents, history[-1] if history else None

    def _encode(self, prompt: str) -> torch.Tensor:
        """(1, T, D): the text encoder's states. Longer prompts are cut silently: diffusers would log what it cut."""
        tokenizer, encoder = self._pipeline.tokenizer, self._pipeline.text_encoder
        tokens = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        states: torch.Tensor = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]
        return states.to(self._pipeline.unet.dtype)

    def _scheduler(self, sampler: str) -> Any:
        rule = SAMPLERS[sampler]
        kind = getattr(diffusers, rule.scheduler_class)
        return kind.from_config(self._pipeline.scheduler.config, **rule.overrides)

    def _meta(self, request: RunRequest, scheduler: Any, digest: str) -> HandoffMeta:
        salt = self._salt(request)
        return HandoffMeta(
            model_family=self.family,
            model_digest=self.digest,
            scheduler_class=type(scheduler).__name__,
            scheduler_digest=digest,
            num_steps=request.num_steps,
            timesteps=tuple(float(each) for each in scheduler.timesteps.tolist()),
            next_step=request.split,
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
        )

    def _salt(self, request: RunRequest) -> str:
        """16 bytes in hex from everything but the prompts: equal requests give equal bytes, other seeds other salts."""
        public = request.model_dump(mode="json", exclude={"prompt", "negative_prompt"})
        return hashlib.sha256(canonical_json({"model": self.digest, **public})).hexdigest()[:32]


def _wire(tensor: torch.Tensor, dtype: str) -> Any:
    return np.asarray(tensor.float().cpu()).astype(np.float16 if dtype == "float16" else np.float32)


def _digest(scheduler: Any) -> str:
    return scheduler_digest(type(scheduler).__name__, scheduler.config)


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


def _version() -> str:
    return importlib.metadata.version("latentrelay")
