"""A step package without tables as a `Denoiser`, so that compensation is fitted on what Core ML will run.

A package gives whole steps, not noise predictions. The solver's row is known, so the guided prediction is read back off
the step's result, once at guidance 0 (the unconditional branch) and once at 1 (the conditional one), in float64. By
Core ML itself on a Mac, else by the interpreter, whose every call takes a hundred times as long as a session's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.plan import Plan
from latentrelay.export.coreml_bundle import feeds_of, open_packages
from latentrelay.export.coreml_graphs import step_inputs
from latentrelay.export.errors import ExportError
from latentrelay.export.parity import Sample
from latentrelay.runtime.manifest import CoreMLPackage
from latentrelay.runtime.samplers import sampler_rule


class PackageDenoiser:
    """`packages`: the step's entries of the manifest, in order; `folder` holds their paths; `plan` has no tables.

    `latent`: channels, rows, columns; `states`: tokens, width. Raises ExportError for a sampler of one branch.
    """

    def __init__(
        self,
        folder: Path,
        packages: Sequence[CoreMLPackage],
        plan: Plan,
        latent: Sequence[int],
        states: Sequence[int],
        *,
        apple_layout: bool = False,
    ) -> None:
        rule = sampler_rule(plan.recipe.sampler)
        if rule.branches != 2 or plan.tables.compensation_gain is not None:
            raise ExportError(
                "a package is read back with two guidance branches and no tables", got=plan.recipe.sampler
            )
        self._plan, self._inputs = plan, step_inputs(rule, latent, states, apple_layout=apple_layout)
        self._run = open_packages([folder / each.path for each in packages], packages[0].compute_units)

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """See `Denoiser`."""
        return np.concatenate([self._guided(latents, step, prompt_embeds, scale) for scale in (0.0, 1.0)])

    def _guided(self, latents: Floats, step: int, prompt_embeds: Floats, scale: float) -> Floats:
        row, multiplier = self._plan.recipe.solver[step], float(self._plan.tables.guidance_multiplier[step])
        case = {
            "latents": latents,
            "step": np.array(step),
            "prompt_embeds": prompt_embeds,
            "guidance": np.array(scale / multiplier, dtype=np.float32),
            "x0_prev": np.zeros_like(latents),
        }
        made = self._run(feeds_of(self._inputs, Sample(case, {})))
        wide = latents.astype(np.float64)
        if "next_x0_prev" in made and abs(row.q) > abs(row.b):  # the better conditioned of the two
            found: Floats = ((made["next_x0_prev"] - row.p * wide) / row.q).astype(np.float32)
        else:
            found = ((made["next_latents"] - row.a * wide) / row.b).astype(np.float32)
        return found
