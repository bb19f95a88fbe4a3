"""`latentrelay evaluate`: a model's pictures of held-out Scenes captions, read by the judge.

Pictures come from the torch pipeline (the full-size model). Captions come from the report split, and, apart, from the
(shape, colour) pairs that no training split contains. The chance level and the accuracy on true renderings stand beside
the score, so that a figure says where it lies between the two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.console import counting, emit, extra, table
from latentrelay.tools.models import merging, resolve

SPLITS = ("report", "gate")
_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of captions: means, a bootstrap 95 % interval of the mean accuracy, chance and ceiling."""

    attribute_accuracy: float
    interval: tuple[float, float]
    exact_scene_rate: float
    by_attribute: dict[str, float]
    chance: float
    true_renderings: float
    frechet_distance: float
    frechet_floor: float
    captions: int

    def document(self) -> dict[str, Any]:
        """As printed with `--json`."""
        return {
            "attribute_accuracy": self.attribute_accuracy,
            "attribute_accuracy_95": list(self.interval),
            "exact_scene_rate": self.exact_scene_rate,
            "frechet_distance": self.frechet_distance,
            "true_renderings_frechet_distance": self.frechet_floor,
            "by_attribute": self.by_attribute,
            "chance_accuracy": self.chance,
            "true_renderings_accuracy": self.true_renderings,
            "captions": self.captions,
        }


def run(
    model: str,
    captions: int,
    seed: int,
    *,
    num_steps: int,
    guidance: float | None,
    held_out: int | None,
    split: str,
    sheet: Path | None,
    as_json: bool,
    loras: Sequence[str] = (),
) -> None:
    """Generate, read, score and print."""
    if split not in SPLITS:
        raise RequestError("unknown data split", got=split, expected=" or ".join(SPLITS))
    with extra("compress", "evaluating a model"):
        from latentrelay.reference import captions as grammar
        from latentrelay.reference import pipeline as reference
    pipeline = reference.load(Path(resolve(model)))
    if (adapt := merging(model, loras)) is not None:
        adapt(pipeline)
    few_step = type(pipeline.scheduler).__name__ == "LCMScheduler"
    if few_step and guidance not in (None, 1.0):
        raise RequestError("the model's guidance is in its network", got=guidance, expected=1.0, do="Leave it out.")
    scale = (1.0 if few_step else reference.GUIDANCE) if guidance is None else guidance
    started = time.perf_counter()
    wanted = {split: captions, "held_out": held_out or max(1, captions // 4)}
    results: dict[str, Evaluation] = {}
    for name, count in wanted.items():
        pairs = grammar.sample_captions(name, count, seed)  # type: ignore[arg-type]
        pictures = _pictures(pipeline, [caption.text for _, caption in pairs], seed, num_steps, scale, name)
        results[name] = evaluate_pictures(pictures, pairs)
        if sheet is not None and name == split:
            write_sheet(pictures, [caption.text for _, caption in pairs], sheet)
    document = {
        **results[split].document(),
        "heldout_combinations": results["held_out"].document(),
        "model": model,
        "split": split,
        "num_steps": num_steps,
        "guidance": scale,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    emit(document, as_json, lambda console: _show(console, results, split))


def _pictures(pipeline: Any, prompts: list[str], seed: int, num_steps: int, guidance: float, words: str) -> Any:
    import torch
    from latentrelay.reference.pipeline import generate

    out = []
    with counting(f"{words}: {len(prompts)} pictures", len(prompts)) as advance:
        for i in range(0, len(prompts), _BATCH):
            rows = prompts[i : i + _BATCH]
            seeds = [seed * 1_000_003 + i + j for j in range(len(rows))]
            out.append(generate(pipeline, rows, seeds, num_steps=num_steps, guidance=guidance, batch=_BATCH))
            advance(f"{words}: {len(prompts)} pictures", len(rows))
    return torch.cat(out)


def evaluate_pictures(pictures: Any, pairs: Sequence[tuple[Any, Any]]) -> Evaluation:
    """Score pictures (N, 3, 128, 128) in [-1, 1] against their (scene, caption) pairs."""
    from latentrelay.reference import judge as judging
    from latentrelay.reference.pipeline import reference_path

    judge = judging.load_judge(reference_path())
    captions = [caption for _, caption in pairs]
    readings, features = judging.read(judge, pictures)
    scores = [judging.score(reading, caption) for reading, caption in zip(readings, captions, strict=True)]
    truth, true_features = judging.read(judge, judging.pictures_of([scene for scene, _ in pairs]))
    ceiling = [judging.score(reading, caption).accuracy for reading, caption in zip(truth, captions, strict=True)]
    summary = judging.summarise(scores)
    renderings = judging.load_statistics(reference_path())
    return Evaluation(
        attribute_accuracy=summary.attribute_accuracy,
        interval=bootstrap_interval([item.accuracy for item in scores]),
        exact_scene_rate=summary.exact_scene_rate,
        by_attribute=summary.by_attribute,
        chance=judging.chance_accuracy(readings, captions),
        true_renderings=float(np.mean(ceiling)),
        frechet_distance=judging.frechet_distance(judging.Statistics.of(features), renderings),
        frechet_floor=judging.frechet_distance(judging.Statistics.of(true_features), renderings),
        captions=len(captions),
    )


def score_each(pictures: Any, pairs: Sequence[tuple[Any, Any]]) -> list[float]:
    """The accuracy of every picture, for comparisons of the same captions and seeds."""
    from latentrelay.reference import judge as judging
    from latentrelay.reference.pipeline import reference_path

    readings, _ = judging.read(judging.load_judge(reference_path()), pictures)
    return [judging.score(reading, caption).accuracy for reading, (_, caption) in zip(readings, pairs, strict=True)]


def bootstrap_interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean, by resampling with a fixed seed."""
    rng = np.random.default_rng(0)
    array = np.asarray(values, np.float64)
    means = array[rng.integers(0, len(array), size=(draws, len(array)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_sheet(pictures: Any, prompts: Sequence[str], path: Path, columns: int = 6, rows: int = 4) -> None:
    """A sheet of the first pictures with their captions below, as a PNG."""
    from latentrelay.tools.sheet import Cell, save_sheet

    shown = ((pictures[: columns * rows] + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    cells = [Cell(picture, text) for picture, text in zip(shown, prompts, strict=False)]
    save_sheet([cells[i : i + columns] for i in range(0, len(cells), columns)], path)


def _show(console: Any, results: dict[str, Evaluation], split: str) -> None:
    first, second = results[split], results["held_out"]
    percent = "{:.1%}".format
    rows = [
        [
            "attribute accuracy",
            *(
                f"{percent(item.attribute_accuracy)} ({percent(item.interval[0])}..{percent(item.interval[1])})"
                for item in (first, second)
            ),
        ],
        ["exact scenes", *(percent(item.exact_scene_rate) for item in (first, second))],
        ["Frechet distance", *(f"{item.frechet_distance:.1f}" for item in (first, second))],
        ["  of true renderings", *(f"{item.frechet_floor:.1f}" for item in (first, second))],
        ["chance", *(percent(item.chance) for item in (first, second))],
        ["true renderings", *(percent(item.true_renderings) for item in (first, second))],
        *(
            [f"  {name}", *(percent(item.by_attribute.get(name, float("nan"))) for item in (first, second))]
            for name in first.by_attribute
        ),
    ]
    console.print(table(["", f"{split} ({first.captions})", f"held-out pairs ({second.captions})"], rows))
