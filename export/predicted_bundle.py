"""What predicted steps add to a bundle beside their tables: ports, samples and the manifest's record.

In: a plan with predicted steps, its U-Net graph and the recorded reference run. Out: step_full's samples with the
ladders' ports, a sample of step_predicted, and `PredictionSpec`. A plan without them adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from latentrelay.compress.denoising_chain import Start
from latentrelay.compress.plan import Plan
from latentrelay.compress.plan_prediction import mask_rows
from latentrelay.export.parity import Feeds, Sample
from latentrelay.export.predicted_parity import FULL, GridDenoiser, numpy_steps
from latentrelay.export.reference_run import ReferenceRun
from latentrelay.export.step_writer import Ladders, ladders_of
from latentrelay.runtime.manifest import PredictionSpec, StepMask


def plain_row(plan: Plan, unet: Path, latent: Sequence[int]) -> Feeds:
    """What step_full is fed with beside a plain step's inputs where nothing is predicted: row 0 and empty ladders.

    `latent`: channels, rows, columns. Empty for a plan without predicted steps.
    """
    if not plan.recipe.prediction:
        return {}
    return {"split_row": np.array(0, np.int64), **_zeros(ladders_of(plan, unet, latent))}


def with_ladders(samples: Sequence[Sample], plain: Feeds) -> list[Sample]:
    """step_full's samples with `plain_row`'s inputs; row 0 leaves ladders of zeros."""
    left = {f"next_{name}": array for name, array in plain.items() if name != "split_row"}
    return [Sample({**case.inputs, **plain}, {**case.outputs, **left}) for case in samples]


def predicted_sample(plan: Plan, run: ReferenceRun, staged: GridDenoiser) -> Sample:
    """One predicted step of the first mask's run, in NumPy: its ladders as full as they get there."""
    split, level = next(iter(mask_rows(plan.recipe.prediction)))
    start = Start(split, run.latents[split], run.x0_prev[split] if split else None, run.prompt_embeds)
    steps = [step for step in numpy_steps(plan, start, run.guidance, staged, level) if step.kind != FULL]
    chosen = steps[len(steps) // 2]
    return Sample(chosen.inputs, chosen.outputs)


def prediction_spec(plan: Plan, unet: Path, latent: Sequence[int]) -> PredictionSpec | None:
    """The manifest's record; None for a plan without predicted steps."""
    settings = plan.recipe.prediction
    if not settings:
        return None
    ladders, rows = ladders_of(plan, unet, latent), mask_rows(settings)
    masks = {(each.split, each.level): tuple(each.mask) for each in plan.recipe.splits}
    return PredictionSpec(
        target=settings["target"],
        feature_shape=ladders.feature,
        masks=tuple(StepMask(key[0], row, masks[key], key[1]) for key, row in rows.items()),
        ladder_dtype=ladders.dtype,
        probe=settings["probe"],
        metric=settings["metric"],
        probe_shape=ladders.probe,
        fallback_threshold=settings["fallback_threshold"],
    )


def _zeros(ladders: Ladders) -> Feeds:
    shapes: Mapping[str, tuple[int, ...] | None] = {"feature_ladder": ladders.feature, "probe_ladder": ladders.probe}
    return {name: np.zeros(shape, ladders.dtype) for name, shape in shapes.items() if shape is not None}
