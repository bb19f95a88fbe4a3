"""The precision recipes of a reference student: sensitivity by layer, layers spared within a budget, the Pareto front.

In: a released student's class and a folder. Out: in that folder the float graph, recorded runs and sensitivities (kept,
so a killed search goes on); as a result the chosen recipe with its figures and the measured points of every precision.
Layers are ranked on the calibrate split, figures come from the gate split; nothing is fitted to the output here, which
is what a compensation is later held against.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.denoising_chain import Denoiser, chain, final_latents
from latentrelay.compress.layer_sensitivity import (
    LayerSensitivity,
    alone,
    final_error,
    forced_samples,
    output_error,
)
from latentrelay.compress.precision import PrecisionRecipe, recipe_for
from latentrelay.compress.recipe_choice import Budget, ParetoPoint, spare_worst
from latentrelay.compress.solver_tables import SolverTable, solver_table
from latentrelay.compress.trajectory import Identity, Trajectories, record
from latentrelay.export.activation_ranges import record_ranges
from latentrelay.export.bundle_manifest import backend_spec
from latentrelay.export.deployed import PipelineCloud, TorchDenoiser
from latentrelay.export.deployed_recipe import RecipeDeployment
from latentrelay.export.input_statistics import record_inputs
from latentrelay.export.onnx_graphs import UNET_DATA, UNetGraph, export_onnx

NUM_STEPS, SPLIT = 25, 10
BYTES_SHARE = 0.10  # of the plain recipe's bytes, what sparing layers may add


@dataclass(frozen=True)
class Figures:
    """One recipe in its deployed session, on the gate split: bytes of graph and weights, mean final-latent PSNR to the
    float run (peak max |ref|), SNR of the noise prediction on the float run's latents, plain and after guidance."""

    bytes: int
    final_psnr_db: float
    noise_snr_db: float
    guided_snr_db: float


@dataclass
class RecipeSearch:
    """One student's search. `captions`: how many of the calibrate and of the gate split; `threads` of the sessions."""

    student: str
    folder: Path
    profile: str = "x86-laptop-vnni"
    captions: tuple[int, int] = (24, 16)
    ranked_on: int = 2
    threads: int = 1
    progress: Callable[[str], None] = lambda line: None

    # ---- what everything is measured on ----------------------------------------------------------------------------

    @cached_property
    def pipeline(self) -> Any:
        """The reference pipeline."""
        from latentrelay.reference.pipeline import load

        return load()

    @cached_property
    def unet(self) -> torch.nn.Module:
        """The student in float32."""
        from latentrelay.compress.student_unet import StudentUNet2DConditionModel
        from latentrelay.reference.students import student_path

        found: torch.nn.Module = StudentUNet2DConditionModel.from_pretrained(student_path(self.student) / "unet")
        return found.float().eval()

    @cached_property
    def table(self) -> SolverTable:
        """The pipeline's own scheduler, 25 steps."""
        return solver_table(self.pipeline.scheduler, NUM_STEPS)

    @property
    def guidance(self) -> float:
        """The reference's."""
        from latentrelay.reference.pipeline import GUIDANCE

        return GUIDANCE

    def runs(self, split: str) -> Trajectories:
        """Recorded float runs of "calibrate" or "gate": half from the first step, half from step 10."""
        from latentrelay.reference.captions import sample_captions

        count, seed = (self.captions[0], 11) if split == "calibrate" else (self.captions[1], 12)
        prompts = [caption.text for _, caption in sample_captions(split, count, seed)]  # type: ignore[arg-type]
        identity = Identity("reference", self.student, "dpmsolver++", "reference", NUM_STEPS, self.guidance)
        cloud = PipelineCloud(self.pipeline, self.table, self.guidance, (4, 16, 16))
        seeds = [seed * 1000 + i for i in range(count)]
        folder = self.folder / f"runs-{split}"
        denoiser = TorchDenoiser(self.unet, self.table)
        return record(folder, prompts, seeds, (0, SPLIT), cloud, denoiser, self.table, identity)

    @cached_property
    def deployment(self) -> RecipeDeployment:
        """The student's float graph with ranges and input statistics of the calibrate runs."""
        from latentrelay.device_profiles import load_profile

        profile = load_profile(self.profile)
        graph = self.folder / "float" / "model.onnx"
        if not graph.is_file():
            self._export(graph, profile.backend.kernels)
        feeds = list(self.runs("calibrate").feeds(self.table))
        self.progress("measuring activations")
        ranges = record_ranges(graph, feeds[::2], threads=self.threads)
        statistics = record_inputs(graph, feeds[::4])
        return RecipeDeployment(graph, ranges, statistics, self.table, backend_spec(profile), (4, 16, 16), (32, 128))

    def _export(self, graph: Path, kernels: str) -> None:
        graph.parent.mkdir(parents=True, exist_ok=True)
        export_onnx(
            UNetGraph(self.unet),
            [torch.zeros(2, 4, 16, 16), torch.tensor(1.0), torch.zeros(2, 32, 128)],
            graph,
            inputs=["sample", "timestep", "encoder_hidden_states"],
            outputs=["out_sample"],
            opset=20,
            batched=["sample", "encoder_hidden_states"],
            external=UNET_DATA,
            kernels=kernels,
        )

    # ---- sensitivity and choice ------------------------------------------------------------------------------------

    def plain(self, precision: str) -> PrecisionRecipe:
        """The recipe without measurements."""
        from latentrelay.device_profiles import load_profile

        return recipe_for(self.deployment.layers, precision, load_profile(self.profile).backend.kernels)

    def sensitivities(self, precision: str) -> tuple[LayerSensitivity, ...]:
        """Final-latent error of each integer layer alone, the worst first; read back where it is known already."""
        path = self.folder / f"sensitivity-{precision}.jsonl"
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        recipe, found = self.plain(precision), dict(known)
        runs = [run for run in self.runs("calibrate") if run.split == SPLIT][: self.ranked_on]
        wanted = [name for name, rule in recipe.rules.items() if rule.integer]
        with path.open("a") as file:
            for i, name in enumerate(wanted):
                if name not in found:
                    denoiser = self.deployment(alone(recipe, (name,)))
                    found[name] = final_error(denoiser, runs, self.table, self.guidance)
                    file.write(json.dumps([name, found[name]]) + "\n")
                    file.flush()
                    self.progress(f"sensitivity: {i + 1} of {len(wanted)}")
        return tuple(LayerSensitivity(name, found[name]) for name in sorted(wanted, key=lambda name: -found[name]))

    def spared(self, precision: str, share: float = 1.0) -> PrecisionRecipe:
        """The plain recipe with its worst layers spared, within `share` of the whole budget (10 % more bytes, 5 % of
        the multiply-adds in float)."""
        recipe = self.plain(precision)
        budget = Budget(
            int(share * BYTES_SHARE * self.bytes_of(recipe)), float("inf"), share * Budget(0, 0).float_share
        )
        return spare_worst(recipe, self.deployment.layers, self.sensitivities(precision), budget)

    def bytes_of(self, recipe: PrecisionRecipe) -> int:
        """Bytes of the graph and its weights."""
        return self.deployment.write(recipe, self.folder / "written" / "model.onnx")

    # ---- figures ---------------------------------------------------------------------------------------------------

    def figures(self, recipe: PrecisionRecipe) -> Figures:
        """Measured on the gate split."""
        denoiser, runs = self.deployment(recipe), list(self.runs("gate"))
        samples = forced_samples(runs)
        final = float(np.mean([self._final_psnr_db(denoiser, run) for run in runs]))
        plain, guided = (_db(output_error(denoiser, samples, scale)) for scale in (None, self.guidance))
        return Figures(self.bytes_of(recipe), round(final, 3), round(plain, 3), round(guided, 3))

    def _final_psnr_db(self, denoiser: Denoiser, run: Any) -> float:
        got = final_latents(chain(denoiser, self.table, run.start, self.guidance), run.start)
        want = run.latents[-1].astype(np.float64)
        return _db(float(np.mean((got - want) ** 2) / np.max(np.abs(want)) ** 2))

    def points(self, recipes: Sequence[tuple[str, PrecisionRecipe]], repeats: int = 15) -> list[ParetoPoint]:
        """Bytes, milliseconds and dB of recipes; calls are interleaved, the fastest of `repeats` counts."""
        sample = forced_samples(list(self.runs("gate").take(1)))[0]
        denoisers = [self.deployment(recipe) for _, recipe in recipes]
        fastest = [float("inf")] * len(recipes)
        for _ in range(repeats + 1):  # the first call of each allocates, and is never the fastest
            for i, denoiser in enumerate(denoisers):
                started = time.perf_counter()
                denoiser(sample.latents, sample.step, sample.prompt_embeds)
                fastest[i] = min(fastest[i], 1e3 * (time.perf_counter() - started))
        found = []
        for (name, recipe), ms in zip(recipes, fastest, strict=True):
            figures = self.figures(recipe)
            found.append(ParetoPoint(name, _spared(recipe), figures.bytes, round(ms, 2), figures.final_psnr_db))
        return found


def _spared(recipe: PrecisionRecipe) -> int:
    return sum(rule.reason.endswith("by measurement") for rule in recipe.rules.values())


def _db(error: float) -> float:
    return -10.0 * float(np.log10(max(error, 1e-20)))
