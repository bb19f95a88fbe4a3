"""`latentrelay evaluate --few-step`: hybrid runs of 4 and 8 consistency steps beside the hybrid of 25, by the judge.

The teacher makes the first half of every few-step run and the student the rest, both with their consistency adapters;
the 25-step runs are the plain teacher's and student's, guided. Same captions, same seeds. Batches of pictures in torch:
what the cloud's engine and a bundle's graphs compute, to rounding (the chain's tests say so), several at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.samplers import sampler_for, sampler_rule
from latentrelay.tools.console import counting, emit, extra, table
from latentrelay.tools.evaluate import SPLITS, bootstrap_interval, evaluate_pictures, score_each
from latentrelay.tools.few_step import NUMBERS_OF_STEPS
from latentrelay.tools.models import FEW_STEP, REFERENCE, few_step_adapters, merging, resolve

RUNS = ((25, 10), (4, 2), (8, 4), (4, 0), (8, 0), (4, 4), (8, 8))  # (num_steps, split): first step on the device
_BATCH = 16


@dataclass(frozen=True, eq=False)
class Networks:
    """A pipeline that starts runs and the U-Net that ends them."""

    pipeline: Any
    student: Any


def run(
    captions: int,
    seed: int,
    *,
    student: str,
    folder: Path | None,
    adapters: Path | None,
    data_split: str,
    runs: Sequence[tuple[int, int]] = RUNS,
    as_json: bool,
) -> None:
    """Score and print. `student`: the released name; `folder`, `adapters`: another U-Net's folder and file instead."""
    if data_split not in SPLITS:
        raise RequestError("unknown data split", got=data_split, expected=" or ".join(SPLITS))
    with extra("compress", "evaluating a model"):
        from latentrelay.reference import captions as grammar
    pairs = grammar.sample_captions(data_split, captions, seed)  # type: ignore[arg-type]
    prompts = [caption.text for _, caption in pairs]
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
    rows: list[dict[str, Any]] = []
    loaded: dict[bool, Networks] = {}
    for num_steps, split in runs:
        started = time.perf_counter()
        few = num_steps <= max(NUMBERS_OF_STEPS)
        if few not in loaded:
            loaded[few] = few_step_networks(student, folder, adapters) if few else networks(student, folder)
        chosen = loaded[few]
        words = f"{num_steps} steps, {split} in the cloud"
        pictures = hybrid_pictures(chosen, prompts, seeds, num_steps=num_steps, split=split, words=words)
        found = evaluate_pictures(pictures, pairs)
        rows.append(
            {
                "num_steps": num_steps,
                "split": split,
                **found.document(),
                "each": score_each(pictures, pairs),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    first = rows[0].pop("each")
    rows[0]["behind_points"] = [0.0, 0.0, 0.0]
    for row in rows[1:]:
        apart = 100 * (np.asarray(first) - np.asarray(row.pop("each")))
        low, high = bootstrap_interval(apart)
        row["behind_points"] = [round(float(value), 2) for value in (low, apart.mean(), high)]
    document = {
        "student": str(folder or student),
        "split": data_split,
        "captions": captions,
        "seed": seed,
        "rows": rows,
    }

    def show(console: Any) -> None:
        lines = [
            [
                str(row["num_steps"]),
                str(row["split"]),
                f"{row['attribute_accuracy']:.1%}",
                f"{row['exact_scene_rate']:.1%}",
                f"{row['frechet_distance']:.0f}",
                "{:.1f} ({:.1f}..{:.1f})".format(*(row["behind_points"][i] for i in (1, 0, 2))),
            ]
            for row in rows
        ]
        heads = ["steps", "in the cloud", "attribute accuracy", "exact scenes", "Frechet", "points behind the first"]
        console.print(table(heads, lines))

    emit(document, as_json, show)


def networks(student: str, folder: Path | None = None) -> Networks:
    """The plain pair: the reference and a released student of it, or the U-Net in `folder`."""
    return Networks(_reference(REFERENCE), _student(folder or Path(resolve(REFERENCE)) / "students" / student / "unet"))


def few_step_networks(student: str, folder: Path | None = None, adapters: Path | None = None) -> Networks:
    """The same pair with consistency adapters merged: the shipped ones, or the file `adapters` for the student."""
    from latentrelay.compress.lora import Adapter, merge

    ending = _reference(REFERENCE)
    ending.unet = networks(student, folder).student
    merge(ending, [Adapter(adapters or few_step_adapters(student))])
    return Networks(_reference(FEW_STEP), ending.unet)


def _reference(model: str) -> Any:
    import torch
    from latentrelay.reference import pipeline as reference

    pipeline = reference.load(Path(resolve(model)))
    if (adapt := merging(model)) is not None:
        adapt(pipeline)
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def _student(folder: Path) -> Any:
    import torch
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    unet = StudentUNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    return unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def hybrid_pictures(
    networks: Networks,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int,
    split: int,
    guidance: float | None = None,
    words: str = "pictures",
) -> Any:
    """Pictures (N, 3, H, W) in [-1, 1]: `split` steps of the pipeline's U-Net, then the student's, decoded by the
    pipeline's own VAE. `guidance` None is the reference's; it is not used with one branch."""
    import torch

    parts = []
    with counting(words, len(prompts)) as advance:
        for i in range(0, len(prompts), _BATCH):
            rows, chosen = list(prompts[i : i + _BATCH]), list(seeds[i : i + _BATCH])
            latents = hybrid_latents(networks, rows, chosen, num_steps, split, guidance)
            vae = networks.pipeline.vae
            with torch.inference_mode():
                parts.append(vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1))
            advance(words, len(rows))
    return torch.cat(parts)


def hybrid_latents(
    networks: Networks,
    prompts: list[str],
    seeds: list[int],
    num_steps: int,
    split: int,
    guidance: float | None = None,
) -> Any:
    """Latents (B, C, h, w) after all steps; `guidance` as in `hybrid_pictures`."""
    import diffusers
    import torch
    from latentrelay.reference.pipeline import GUIDANCE

    pipeline = networks.pipeline
    name = sampler_for(type(pipeline.scheduler).__name__)
    rule = sampler_rule(name)
    scheduler = getattr(diffusers, rule.scheduler_class).from_config(pipeline.scheduler.config, **rule.overrides)
    scheduler.set_timesteps(num_steps)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    scale = GUIDANCE if guidance is None else guidance
    side, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = [torch.randn(1, channels, side, side, generator=generator) for generator in generators]
    latents = torch.cat(noise) * scheduler.init_noise_sigma
    more = {"generator": generators} if rule.needs_noise else {}
    with torch.inference_mode():
        texts = [""] * len(prompts) + prompts if rule.branches == 2 else prompts
        ids = pipeline.tokenizer(
            texts, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True
        ).input_ids
        states = pipeline.text_encoder(torch.tensor(ids))[0]
        for step, timestep in enumerate(scheduler.timesteps):
            unet = pipeline.unet if step < split else networks.student
            sample = scheduler.scale_model_input(torch.cat([latents] * rule.branches), timestep)
            predicted = unet(sample, timestep, encoder_hidden_states=states, return_dict=False)[0]
            if rule.branches == 2:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + scale * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False, **more)[0]
    return latents
