"""How much each layer's quantisation moves the output: one layer quantised at a time, in the deployed session.

In: a `PrecisionRecipe`, a `Deploy` that turns any recipe into a running network, and how its error is measured. Out:
one `LayerSensitivity` a layer: the error energy that the layer alone adds. One at a time and not all but one: with all
others float the error is the layer's own and stands far above rounding noise, and the sums of single errors predict the
whole (they are nearly independent); a difference of two large errors does not. Two measures: `output_error` of the
guided noise prediction on a float run's own latents, and `final_error` of whole runs, where steps weigh what they do to
the result; a scalar model of that propagation gives all the weight to the last step, so the run itself is the measure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from latentrelay.compress.denoising_chain import Denoiser, Floats, chain, final_latents, guided
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.precision import LayerRule, PrecisionRecipe
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Trajectory

FLOAT = LayerRule()


class Deploy(Protocol):
    """Quantises the network by a recipe and opens it where it will run."""

    def __call__(self, recipe: PrecisionRecipe) -> Denoiser:
        """The network in its deployed session."""
        ...


@dataclass(frozen=True, eq=False)
class ForcedSample:
    """One step of a float run: latents (1, C, h, w), states (2, T, D) and the float noise prediction (2, C, h, w)."""

    step: int
    latents: Floats
    prompt_embeds: Floats
    noise_pred: Floats


@dataclass(frozen=True)
class LayerSensitivity:
    """`error`: energy that the layer's quantisation adds, as a share of the signal's (noise prediction or latents)."""

    name: str
    error: float

    @property
    def snr_db(self) -> float:
        """The same as a signal-to-noise ratio in dB, 200 at most."""
        return min(200.0, -10.0 * math.log10(max(self.error, 1e-20)))


def forced_samples(runs: Iterable[Trajectory], every: int = 5) -> tuple[ForcedSample, ...]:
    """Every `every`-th step of every run, the first step of run i being i modulo `every`, so that all steps come in."""
    return tuple(
        ForcedSample(step, latents, run.prompt_embeds, noise_pred)
        for i, run in enumerate(runs)
        for j, (step, latents, noise_pred) in enumerate(run)
        if (j - i) % every == 0
    )


def output_error(
    denoiser: Denoiser,
    samples: Sequence[ForcedSample],
    guidance: float | None,
    step_weights: Mapping[int, float] | None = None,
) -> float:
    """Error energy of the guided noise prediction over its own energy, of both branches as they are where `guidance` is
    None; steps count by `step_weights` (1 by default). Raises PrecisionError without samples."""
    if not samples:
        raise PrecisionError("sensitivity needs samples", got="none", expected="steps of recorded runs")
    signal = error = 0.0
    for sample in samples:
        weight = 1.0 if step_weights is None else float(step_weights[sample.step])
        want, got = sample.noise_pred, denoiser(sample.latents, sample.step, sample.prompt_embeds)
        if guidance is not None:
            want, got = guided(want, guidance), guided(got, guidance)
        signal += weight * float(np.sum(np.square(want, dtype=np.float64)))
        error += weight * float(np.sum(np.square(got - want, dtype=np.float64)))
    return error / max(signal, 1e-300)


def final_error(denoiser: Denoiser, runs: Iterable[Trajectory], table: SolverTable, guidance: float) -> float:
    """Error energy of the final latents over their own energy, each run chained from where the float one began.
    Raises PrecisionError without runs, TrajectoryError where a run stops being numbers."""
    signal = error = 0.0
    for run in runs:
        got = final_latents(chain(denoiser, table, run.start, guidance), run.start)
        want = run.latents[-1].astype(np.float64)
        signal += float(np.sum(want**2))
        error += float(np.sum((got - want) ** 2))
    if signal == 0.0:
        raise PrecisionError("sensitivity needs runs", got="none", expected="recorded runs")
    return error / signal


def alone(recipe: PrecisionRecipe, names: Collection[str]) -> PrecisionRecipe:
    """The recipe with every layer float but those named."""
    rules = {name: rule if name in names else FLOAT for name, rule in recipe.rules.items()}
    return dataclasses.replace(recipe, rules=rules)


def layer_sensitivities(
    recipe: PrecisionRecipe,
    deploy: Deploy,
    measure: Callable[[Denoiser], float],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerSensitivity, ...]:
    """One entry a quantised layer, the worst first; layers that the recipe keeps in float have none.

    `measure`: `output_error` or `final_error` with all but the denoiser filled in. One deployment a layer: seconds
    each on small networks. progress(done, all).
    """
    quantised = [name for name, rule in recipe.rules.items() if rule.weights != "float32" or rule.integer]
    found = []
    for i, name in enumerate(quantised):
        found.append(LayerSensitivity(name, measure(deploy(alone(recipe, (name,))))))
        if progress is not None:
            progress(i + 1, len(quantised))
    return tuple(sorted(found, key=lambda each: -each.error))
