"""The judge: a small network that reads a picture back into attributes, and the scores made from its readings.

In: pictures (N, 3, 128, 128) in [-1, 1]. Out: a `Reading` a picture (layout, background, the attributes of each
object by place), 64 features a picture for a Frechet distance, and scores against captions. Trained on rendered truth
under blur, noise, resampling and autoencoding, so that it reads content and does not reward one rendering style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from latentrelay.compress.training import BatchRng, Losses, Recipe, device_of, fit
from latentrelay.reference.captions import Caption
from latentrelay.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    LAYOUTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    bucket,
    render,
    sample_scene,
)
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "texture": TEXTURES}
READ_LAYOUTS = ("none", *LAYOUTS)
FEATURES = 64
SIZE = 128

# What each read-out chooses from: layout, background, then four attributes of the first and of the second place.
READOUTS: dict[str, tuple[str, ...]] = {
    "layout": READ_LAYOUTS,
    "background": BACKGROUNDS,
    **{f"{name}_{place}": values for place in (0, 1) for name, values in ATTRIBUTES.items()},
}


class Judge(nn.Module):
    """Seven convolutions, a 64-feature bottleneck and one linear read-out an attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside, stride in (
            (3, 24, 2),
            (24, 48, 2),
            (48, 48, 1),
            (48, 96, 2),
            (96, 96, 1),
            (96, 128, 2),
            (128, 128, 1),
        ):
            layers += [nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten())
        self.neck = nn.Sequential(nn.Linear(128 * 16, 256), nn.SiLU(), nn.Linear(256, FEATURES))
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in READOUTS.items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 128, 128) in [-1, 1] to (N, 64)."""
        return cast(torch.Tensor, self.neck(self.trunk(pictures)))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, classes) by read-out name."""
        features = self.features(pictures)
        return {name: head(F.silu(features)) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Reading:
    """What the judge sees: up to two objects, left to right (`horizontal`) or top to bottom (`vertical`)."""

    layout: str
    background: str
    objects: tuple[dict[str, str], ...]


@torch.no_grad()
def read(judge: Judge, pictures: torch.Tensor, batch: int = 64) -> tuple[list[Reading], NDArray[np.float64]]:
    """Readings of (N, 3, 128, 128) pictures in [-1, 1], and their features (N, 64)."""
    if pictures.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"the judge reads pictures of shape (N, 3, {SIZE}, {SIZE}), got {tuple(pictures.shape)}")
    readings: list[Reading] = []
    features = []
    for part in torch.split(pictures, batch):
        found = judge.features(part)
        features.append(found.double().numpy())
        chosen = {name: head(F.silu(found)).argmax(1).tolist() for name, head in judge.heads.items()}
        readings += [_reading({name: READOUTS[name][chosen[name][i]] for name in READOUTS}) for i in range(len(part))]
    return readings, np.concatenate(features)


def _reading(values: dict[str, str]) -> Reading:
    count = {"none": 0, "single": 1}.get(values["layout"], 2)
    objects = tuple({name: values[f"{name}_{place}"] for name in ATTRIBUTES} for place in range(count))
    return Reading(values["layout"], values["background"], objects)


# ---- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One picture against its caption: which named attributes were right, and whether all of them and the number of
    objects were."""

    right: dict[str, list[bool]]
    exact: bool

    @property
    def accuracy(self) -> float:
        """Share of the named attributes that are right."""
        flat = [value for values in self.right.values() for value in values]
        return sum(flat) / len(flat)


def score(reading: Reading, caption: Caption) -> Score:
    """Only what the caption names counts. Objects are matched by the assignment that agrees best with the caption's
    relation, then with its attributes; an object that is missing is wrong in everything."""
    best: tuple[tuple[int, int], dict[str, list[bool]]] | None = None
    for order in _assignments(reading, len(caption.objects)):
        right: dict[str, list[bool]] = {}
        for wanted, place in zip(caption.objects, order, strict=True):
            seen = reading.objects[place] if place is not None else {}
            for name, value in wanted.named().items():
                right.setdefault(name, []).append(seen.get(name) == value)
        related = caption.relation is not None and _relation(reading, order) == caption.relation
        if caption.relation is not None:
            right["relation"] = [related]
        rank = (int(related), sum(sum(values) for values in right.values()))
        if best is None or rank > best[0]:
            best = (rank, right)
    if best is None:
        raise ValueError("a caption names at least one object; got none")
    right = best[1]
    if caption.background is not None:
        right["background"] = [reading.background == caption.background]
    exact = all(all(values) for values in right.values()) and len(reading.objects) == len(caption.objects)
    return Score(right, exact)


def _assignments(reading: Reading, wanted: int) -> list[tuple[int | None, ...]]:
    places: list[int | None] = [*range(len(reading.objects))]
    if wanted == 1:
        return [(place,) for place in places] or [(None,)]
    if len(places) == 2:
        return [(0, 1), (1, 0)]
    only = places[0] if places else None
    return [(only, None), (None, only)]


def _relation(reading: Reading, order: tuple[int | None, ...]) -> str | None:
    names = {"horizontal": ("left of", "right of"), "vertical": ("above", "below")}.get(reading.layout)
    return None if names is None else names[0 if order == (0, 1) else 1]


@dataclass(frozen=True)
class Summary:
    """Means over pictures, and the pooled share right of each attribute."""

    attribute_accuracy: float
    exact_scene_rate: float
    by_attribute: dict[str, float]


def summarise(scores: Sequence[Score]) -> Summary:
    """One summary of many pictures' scores."""
    pooled: dict[str, list[bool]] = {}
    for item in scores:
        for name, values in item.right.items():
            pooled.setdefault(name, []).extend(values)
    return Summary(
        attribute_accuracy=float(np.mean([item.accuracy for item in scores])),
        exact_scene_rate=float(np.mean([item.exact for item in scores])),
        by_attribute={name: float(np.mean(values)) for name, values in sorted(pooled.items())},
    )


def chance_accuracy(readings: Sequence[Reading], captions: Sequence[Caption]) -> float:
    """Attribute accuracy when every caption is scored against another caption's picture: the floor of the measure."""
    shifted = [*readings[1:], readings[0]]
    return float(
        np.mean([score(reading, caption).accuracy for reading, caption in zip(shifted, captions, strict=True)])
    )


@dataclass(frozen=True)
class Statistics:
    """Mean (64,) and covariance (64, 64) of judge features."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: NDArray[np.float64]) -> Statistics:
        """From features (N, 64); N well above 64 makes the distance mean something."""
        return cls(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared 2-Wasserstein distance between the two Gaussians; not comparable across judges."""
    gap = first.mean - second.mean
    roots = np.linalg.eigvals(first.covariance @ second.covariance)
    cross = np.sqrt(np.clip(roots.real, 0, None)).sum()
    return float(gap @ gap + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def save_statistics(judge: Judge, folder: Path, count: int = 10_000) -> None:
    """Features of `count` held-back renderings, as `judge_statistics.safetensors`: what distances are measured to."""
    rng = np.random.Generator(np.random.PCG64([11, count]))
    features = []
    for _ in range(0, count, 100):
        scenes = [scene for scene in judge_scenes(rng, 100, held_back=True) if scene.objects]
        features.append(read(judge, pictures_of(scenes))[1])
    found = Statistics.of(np.concatenate(features))
    arrays = {"mean": torch.from_numpy(found.mean), "covariance": torch.from_numpy(found.covariance)}
    save_file(arrays, folder / "judge_statistics.safetensors")


def load_statistics(folder: Path) -> Statistics:
    """What `save_statistics` wrote."""
    arrays = load_file(folder / "judge_statistics.safetensors")
    return Statistics(arrays["mean"].numpy(), arrays["covariance"].numpy())


# ---- training ------------------------------------------------------------------------------------------------------

Autoencode = Callable[[torch.Tensor], torch.Tensor]


def truth(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Class indices (N,) by read-out name; -100 (not scored) for the places that a scene leaves empty."""
    rows: dict[str, list[int]] = {name: [] for name in READOUTS}
    for scene in scenes:
        placed = scene.spatial_order() if scene.objects else (None, None)
        rows["layout"].append(READ_LAYOUTS.index(scene.layout) if scene.objects else 0)
        rows["background"].append(BACKGROUNDS.index(scene.background))
        for place, item in enumerate(placed):
            for name, values in ATTRIBUTES.items():
                rows[f"{name}_{place}"].append(values.index(getattr(item, name)) if item else -100)
    return {name: torch.tensor(values) for name, values in rows.items()}


def judge_scenes(rng: np.random.Generator, count: int, *, held_back: bool = False) -> list[Scene]:
    """Scenes for the judge: every attribute pair (it is the instrument, not the model), one in twenty empty. The last
    five buckets of a hundred are held back from its training and are what `held_back=True` draws."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if (bucket(scene) >= 95) == held_back:
            if rng.random() < 0.05:
                scene = Scene((), None, scene.background, scene.light)
            scenes.append(scene)
    return scenes


def degrade(pictures: torch.Tensor, rng: BatchRng, autoencode: Autoencode | None = None) -> torch.Tensor:
    """A copy of the pictures: most as they are, the rest blurred, resampled or autoencoded, some with noise and
    other contrast."""
    count = len(pictures)
    kind = rng.numpy.random(count)
    out = pictures.clone()
    blurred = np.flatnonzero((kind > 0.7) & (kind < 0.85))
    if blurred.size:
        out[blurred] = blur(pictures[blurred], float(rng.numpy.uniform(0.4, 2.2))).to(out.dtype)
    resampled = np.flatnonzero((kind >= 0.85) & (kind < 0.94))
    if resampled.size:
        side = int(rng.numpy.integers(44, 110))
        small = F.interpolate(pictures[resampled], size=(side, side), mode="bilinear", antialias=True)
        out[resampled] = F.interpolate(small, size=pictures.shape[-2:], mode="bilinear").to(out.dtype)
    coded = np.flatnonzero(kind >= 0.94)
    if coded.size and autoencode is not None:
        out[coded] = autoencode(pictures[coded]).to(out.dtype)
    noisy = torch.from_numpy((rng.numpy.random(count) < 0.4) * rng.numpy.uniform(0, 0.24, count)).float()
    contrast = torch.from_numpy(
        np.where(rng.numpy.random(count) < 0.4, rng.numpy.uniform(0.8, 1.2, count), 1.0)
    ).float()
    noise = torch.randn(out.shape, generator=rng.torch)
    return (out * contrast[:, None, None, None] + noise * noisy[:, None, None, None]).clamp(-1, 1)


def blur(pictures: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (N, 3, H, W), sigma in pixels, edges replicated."""
    reach = max(1, round(3 * sigma))
    taps = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float32) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).repeat(3, 1)
    padded = F.pad(pictures, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, taps[:, None, :, None], groups=3), taps[:, None, None, :], groups=3)


def pictures_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """Rendered scenes as (N, 3, 128, 128) in [-1, 1]."""
    return torch.from_numpy(render(scenes, SIZE)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def train(recipe: Recipe, folder: Path, autoencode: Autoencode | None = None) -> Judge:
    """Resumable; see `training.fit`. `autoencode` maps pictures to their reconstructions by the VAE."""
    torch.manual_seed(recipe.seed)
    judge: Any = Judge()
    judge = judge.to(memory_format=torch.channels_last)

    def loss_of(module: nn.Module, rng: BatchRng) -> Losses:
        scenes = judge_scenes(rng.numpy, recipe.batch)
        with torch.no_grad():
            pictures = degrade(pictures_of(scenes), rng, autoencode).contiguous(memory_format=torch.channels_last)
        device = device_of(module)
        logits = module(pictures.to(device))
        wanted = {name: values.to(device) for name, values in truth(scenes).items()}
        losses = [F.cross_entropy(logits[name].float(), wanted[name]) for name in READOUTS]
        right = [(logits[name].argmax(1) == wanted[name])[wanted[name] >= 0].float().mean() for name in READOUTS]
        return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(right).mean()}

    return cast(
        Judge, fit(judge, loss_of, recipe, folder, on_checkpoint=lambda _step, module: save_judge(module, folder))
    )


def save_judge(judge: nn.Module, folder: Path) -> None:
    """`judge.safetensors` in float16."""
    save_file(
        {name: value.half().contiguous() for name, value in judge.state_dict().items()}, folder / "judge.safetensors"
    )


def load_judge(folder: Path) -> Judge:
    """The judge in float32, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(folder / "judge.safetensors").items()})
    return judge.eval()


@torch.no_grad()
def accuracy(
    judge: Judge, scenes: Sequence[Scene], change: Autoencode | None = None, batch: int = 64
) -> dict[str, float]:
    """Share read right, by read-out, on renderings that `change` has altered. Empty places are not scored."""
    right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in READOUTS}
    for i in range(0, len(scenes), batch):
        part = scenes[i : i + batch]
        pictures = pictures_of(part)
        logits, wanted = judge(pictures if change is None else change(pictures)), truth(part)
        for name in READOUTS:
            hit = logits[name].argmax(1) == wanted[name]
            right[name].append(hit[wanted[name] >= 0].numpy())
    return {name: float(np.concatenate(values).mean()) for name, values in right.items()}
