"""Train the reference pipeline from nothing: `python -m latentrelay.reference.train --recipe cpu --out
runs/reference`.

Stages, in order: tokenizer, text, vae, cache, unet, judge, light_vae, assemble. Each resumes where it was killed and is
skipped once done; name stages to run only those. The `cpu` recipe is what made the committed weights (one pinned
thread); `gpu` is the same code with a wider U-Net and larger batches. The folder that `assemble` writes is what ships
as reference/weights/.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from latentrelay.compress.light_vae import load_light_vae
from latentrelay.compress.training import Recipe
from latentrelay.reference import judge, light_vae, pipeline, text_encoder, unet, vae
from latentrelay.reference.captions import write_tokenizer
from rich.console import Console
from transformers import CLIPTextModel, CLIPTokenizer

STAGES = ("tokenizer", "text", "vae", "cache", "unet", "judge", "light_vae", "assemble")


@dataclass(frozen=True)
class Recipes:
    """One recipe a stage, the U-Net's widths, and how many scenes are cached at 64 and at 128 pixels
    (and, of the latter, decoded for the light autoencoder)."""

    widths: tuple[int, ...]
    scenes: tuple[int, int]
    decoded: int
    text: Recipe
    vae: Recipe
    unet_64: Recipe
    unet_128: Recipe
    judge: Recipe
    light_decoder: Recipe
    light_encoder: Recipe


LIGHT_DECODER = Recipe(
    steps=3000,
    batch=8,
    learning_rate=2e-3,
    warmup=100,
    decay=0.7,
    weight_decay=0.0,
    ema_decay=0.995,
    mixed_precision="bf16",
)
LIGHT_ENCODER = replace(LIGHT_DECODER, steps=1500, warmup=50, ema_decay=0.99, seed=1)
CPU = Recipes(
    widths=unet.WIDTHS["cpu"],
    scenes=(60_000, 18_000),
    decoded=4000,
    text=Recipe(steps=2500, batch=64, learning_rate=1e-3, warmup=100, ema_decay=0.99, checkpoint_every=500),
    vae=Recipe(
        steps=2800, batch=16, learning_rate=1e-3, warmup=100, decay=0.6, ema_decay=0.995, mixed_precision="bf16"
    ),
    unet_64=Recipe(steps=3250, batch=64, learning_rate=1e-3, decay=0.0),
    unet_128=Recipe(steps=2600, batch=32, learning_rate=7e-4, warmup=50, decay=0.65, checkpoint_every=200, seed=1),
    judge=Recipe(
        steps=1700, batch=48, learning_rate=1.5e-3, warmup=100, decay=0.6, ema_decay=0.995, mixed_precision="bf16"
    ),
    light_decoder=LIGHT_DECODER,
    light_encoder=LIGHT_ENCODER,
)
GPU = replace(
    CPU,
    widths=unet.WIDTHS["gpu"],
    scenes=(200_000, 100_000),
    vae=replace(CPU.vae, steps=12_000, batch=64),
    unet_64=replace(CPU.unet_64, steps=20_000, batch=256, mixed_precision="bf16"),
    unet_128=replace(CPU.unet_128, steps=30_000, batch=256, mixed_precision="bf16"),
    judge=replace(CPU.judge, steps=4000, batch=128),
    decoded=20_000,
    light_decoder=replace(LIGHT_DECODER, steps=12_000, batch=32),
    light_encoder=replace(LIGHT_ENCODER, steps=4000, batch=32),
)
RECIPES = {"cpu": CPU, "gpu": GPU}
CAPTIONS_A_SCENE = 2


@dataclass(frozen=True)
class Training:
    """One training folder and what is in it."""

    folder: Path
    recipes: Recipes
    console: Console

    def run(self, stage: str) -> None:
        """One stage, unless it is done already."""
        done = self.folder / f"{stage}.done"
        if done.exists():
            self.console.print(f"{stage}: done already")
            return
        self.console.print(f"[bold]{stage}[/]")
        getattr(self, stage)()
        done.touch()

    def tokenizer(self) -> None:
        """Write vocabulary and merges."""
        write_tokenizer(self.folder / "tokenizer")

    def text(self) -> None:
        """Train the text encoder to read captions back."""
        encoder = text_encoder.train(self._tokenizer(), self.recipes.text, self.folder / "text")
        encoder.save_pretrained(self.folder / "text_encoder")

    def vae(self) -> None:
        """Train the autoencoder and measure its latents' scale."""
        trained = vae.train(self.recipes.vae, self.folder / "vae")
        trained.save_pretrained(self.folder / "vae" / "vae")
        figures = {
            "scaling_factor": 1 / vae.latent_std(trained),
            "psnr_db_128": vae.reconstruction_psnr(trained, "gate"),
            "psnr_db_64": vae.reconstruction_psnr(trained, "gate", size=64),
        }
        (self.folder / "vae.json").write_text(json.dumps(figures, indent=2))

    def cache(self) -> None:
        """Encode training scenes and captions once."""
        encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder").eval()
        for size, count in zip((64, 128), self.recipes.scenes, strict=True):
            unet.cache_latents(self._vae(), self._scaling_factor(), self.folder / "cache", size, count)
            unet.cache_embeddings(self._tokenizer(), encoder, self.folder / "cache", size, count, CAPTIONS_A_SCENE)

    def unet(self) -> None:
        """Most steps at 64 pixels, the last part at 128."""
        small, large = self.folder / "unet-64", self.folder / "unet-128"
        cache = self.folder / "cache"
        unet.train(unet.new_unet(self.recipes.widths), unet.load_cache(cache, 64), self.recipes.unet_64, small)
        begun = UNet2DConditionModel.from_pretrained(small / "unet")
        unet.train(begun, unet.load_cache(cache, 128), self.recipes.unet_128, large)

    def judge(self) -> None:
        """Train the judge on renderings, degraded and autoencoded ones among them."""
        trained = judge.train(self.recipes.judge, self.folder / "judge", vae.autoencoder(self._vae()))
        judge.save_judge(trained, self.folder / "judge")
        judge.save_statistics(judge.load_judge(self.folder / "judge"), self.folder / "judge")

    def light_vae(self) -> None:
        """Distil the light autoencoder from the trained one."""
        cache = self.folder / "cache"
        light_vae.cache_pictures(self._vae(), self._scaling_factor(), cache, self.recipes.decoded)
        layers = judge.load_judge(self.folder / "judge")
        recipes = self.recipes.light_decoder, self.recipes.light_encoder
        light_vae.train(cache, layers, *recipes, self.folder / "light_vae")

    def assemble(self) -> None:
        """Write the pipeline folder, with the judge beside it, to `weights/`."""
        folder = self.folder / "weights"
        whole = pipeline.assemble(
            UNet2DConditionModel.from_pretrained(self.folder / "unet-128" / "unet"),
            self._vae(),
            CLIPTextModel.from_pretrained(self.folder / "text_encoder"),
            self._tokenizer(),
            self._scaling_factor(),
        )
        pipeline.save(whole, folder)
        for name in ("judge.safetensors", "judge_statistics.safetensors"):
            shutil.copyfile(self.folder / "judge" / name, folder / name)
        light_vae.save(load_light_vae(self.folder / "light_vae" / "light_vae"), folder / "light_vae")
        self.console.print(f"wrote {folder}")

    def _tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")

    def _vae(self) -> AutoencoderKL:
        found = AutoencoderKL.from_pretrained(self.folder / "vae" / "vae")
        return found.eval().to(memory_format=torch.channels_last)

    def _scaling_factor(self) -> float:
        return float(json.loads((self.folder / "vae.json").read_text())["scaling_factor"])


def main(
    stages: Annotated[
        list[str] | None, typer.Argument(help=f"Some of: {', '.join(STAGES)}; all if none is named.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    out: Annotated[Path, typer.Option(help="The training folder; run again to resume.")] = Path("runs/reference"),
    threads: Annotated[int, typer.Option(help="Torch threads; one pinned thread beats two on a busy machine.")] = 1,
) -> None:
    """Train the reference pipeline, or some stages of it."""
    unknown = sorted(set(stages or ()) - set(STAGES))
    if unknown or recipe not in RECIPES:
        got = f"got stages {unknown or stages}, recipe {recipe!r}"
        raise typer.BadParameter(f"{got}; expected some of {', '.join(STAGES)} and one of {', '.join(RECIPES)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    training = Training(out, RECIPES[recipe], Console(stderr=True))
    for stage in stages or STAGES:
        training.run(stage)


if __name__ == "__main__":
    typer.run(main)
