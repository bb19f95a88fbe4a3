"""The reference pipeline as a folder: a standard `StableDiffusionPipeline`, float16 on disk, beside its judge.

In: the trained parts. Out: a folder that diffusers, this project and anything else that reads SD 1.x folders opens. The
trained one ships with the package and `reference_path()` says where.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from latentrelay.reference.unet import SCHEDULE
from transformers import CLIPTextModel, CLIPTokenizer

NAME = "reference"
LICENCE = "Apache-2.0"
GUIDANCE = 4.0


def reference_path() -> Path:
    """The folder of the trained pipeline. Raises FileNotFoundError where the package was installed without weights."""
    path = Path(__file__).parent / "weights"
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the reference weights are not in {path}; train them with `python -m latentrelay.reference.train`"
        )
    return path


def assemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scaling_factor: float,
) -> StableDiffusionPipeline:
    """One pipeline of the parts; `scaling_factor` is the inverse of the latents' standard deviation."""
    vae.register_to_config(scaling_factor=scaling_factor)
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in float16; the one in memory stays float32."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)).half() for name in ("unet", "vae", "text_encoder")}
    half = StableDiffusionPipeline(
        **parts,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    half.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):  # diffusers notes where a part was loaded from: a path of this machine
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path | None = None) -> StableDiffusionPipeline:
    """The pipeline in float32 on the CPU, from `folder` or the shipped one."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder or reference_path(),
        torch_dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_steps: int = 25,
    guidance: float = GUIDANCE,
    batch: int = 16,
) -> torch.Tensor:
    """Pictures (N, 3, 128, 128) in [-1, 1]; picture i starts from `torch.randn` of seed i on the CPU."""
    pictures = []
    for i in range(0, len(prompts), batch):
        rows = list(prompts[i : i + batch])
        found = pipeline(
            rows,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch]],
            output_type="pt",
        ).images
        pictures.append(found * 2 - 1)
    return torch.cat(pictures).float()
