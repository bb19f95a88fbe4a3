"""The source pipeline's own run in torch: what every graph of the bundle is compared with.

Runs diffusers' StableDiffusionPipeline from a seed with the bundle's scheduler and records, per step, the latents and
the solver's memory. Nothing here knows ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from latentrelay.runtime.noise import NoiseStream
from latentrelay.runtime.samplers import SamplerRule
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PROMPT, NEGATIVE_PROMPT, SEED = "a red cat sitting on the grass", "blurred", 20261123


@dataclass(frozen=True)
class ReferenceRun:
    """One recorded run. `latents[i]` (1,C,h,w) is what step i starts from, the last entry the result;

    `x0_prev[i]` (1,C,h,w) is the memory step i starts with, zeros where there is none; `prompt_embeds` (2,T,D);
    `input_ids` i64 (2,T), negative prompt first. `noise[i]` (1,C,h,w) is what step i adds, zeros where it adds none;
    with one guidance branch `prompt_embeds` is (1,T,D), the conditional alone.
    """

    latents: tuple[Floats, ...]
    x0_prev: tuple[Floats, ...]
    prompt_embeds: Floats
    input_ids: NDArray[np.int64]
    guidance: float
    noise: tuple[Floats, ...]


def record_run(
    pipeline: Any, scheduler: Any, num_steps: int, height: int, width: int, guidance: float, rule: SamplerRule
) -> ReferenceRun:
    """Run `num_steps` steps at `height` x `width` pixels; the pipeline given is left as it was."""
    pipeline_class: Any = StableDiffusionPipeline
    runner = pipeline_class(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    runner.set_progress_bar_config(disable=True)
    latents: list[Floats] = []
    memory: list[Floats] = []

    def start_from(module: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not latents:  # the U-Net's first input is the initial latent, doubled and scaled
            sample = arguments[0] if arguments else kwargs["sample"]
            latents.append(_array(sample[:1]) / np.float32(start_scale))
            memory.append(np.zeros_like(latents[0]))

    def remember(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(_array(values["latents"]))
        x0 = scheduler.model_outputs[-1] if hasattr(scheduler, "model_outputs") else None
        memory.append(np.zeros_like(latents[0]) if x0 is None else _array(x0))
        return {}

    input_ids = encode_ids(pipeline.tokenizer, [NEGATIVE_PROMPT, PROMPT])
    with torch.no_grad():
        states = pipeline.text_encoder(torch.from_numpy(input_ids)).last_hidden_state
    scheduler.set_timesteps(num_steps)
    start_scale = float(scheduler.scale_model_input(torch.ones(1), scheduler.timesteps[0])[0])
    hook = pipeline.unet.register_forward_pre_hook(start_from, with_kwargs=True)
    try:
        with torch.no_grad():
            runner(
                prompt_embeds=states[1:],
                negative_prompt_embeds=states[:1],
                height=height,
                width=width,
                num_inference_steps=num_steps,
                guidance_scale=guidance,
                generator=torch.Generator("cpu").manual_seed(SEED),
                output_type="latent",
                callback_on_step_end=remember,
            )
    finally:
        hook.remove()
    embeds = _array(states)[-rule.branches :]
    noise = _noise(latents[0].shape, num_steps, rule.needs_noise)
    return ReferenceRun(tuple(latents), tuple(memory), embeds, input_ids, guidance, noise)


def _noise(shape: tuple[int, ...], num_steps: int, needed: bool) -> tuple[Floats, ...]:
    """What diffusers' scheduler drew: the run's generator went on after the initial noise, but for the last step."""
    stream = NoiseStream(SEED, shape)
    stream.skip(1)
    none = np.zeros(shape, dtype=np.float32)
    return tuple(stream.draw() if needed and step < num_steps - 1 else none for step in range(num_steps))


def encode_ids(tokenizer: Any, prompts: list[str]) -> NDArray[np.int64]:
    """Token ids (len(prompts), max_length), padded and cut as StableDiffusionPipeline does."""
    length = tokenizer.model_max_length
    ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True).input_ids
    return np.array(ids, dtype=np.int64)


def _array(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.detach().to(torch.float32).cpu().numpy().copy()
    return array
