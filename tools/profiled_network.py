"""A bundle's U-Net with its deep feature and its probes as further results, and the runs that it is asked along.

In: a built bundle and captions. Out: everything that one call gives, by name, (n, 2, ...) float32 along recorded runs;
the float runs themselves; and the source's full model along its own first steps, for the cloud's part. Sessions are the
deployed ones, so what is measured is what will run.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from latentrelay.compress.denoising_chain import Floats, Start, chain
from latentrelay.compress.error_matrix import velocity
from latentrelay.compress.ladders import log_snr
from latentrelay.compress.plan import Plan
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import Identity, Trajectories, Trajectory, record, step_feeds
from latentrelay.export.cut_unet import cut_graph, cut_points
from latentrelay.export.deployed import PipelineCloud
from latentrelay.export.staged_onnx import cut_component
from latentrelay.export.staged_torch import StagedTorch
from latentrelay.runtime import Bundle
from latentrelay.runtime.backend import Graph, open_backend

FEATURE, WHOLE, RESULT = "deep_feature", "whole_output", "out_sample"
TARGETS = (FEATURE, WHOLE)
Streams = Sequence[tuple[int, Mapping[str, Any]]]  # (first step, {name: (n, 2, ...)}) a run


@dataclass(frozen=True, eq=False)
class ProfiledNetwork:
    """`probes` are those that the network has; `solver` are its run's rows and timesteps."""

    graph: Graph
    solver: SolverTable
    probes: tuple[str, ...]

    @classmethod
    def of(cls, bundle: Bundle, solver: SolverTable, folder: Path, threads: int) -> ProfiledNetwork:
        """Write the graph into `folder`, beside a copy of its weights, and open it. Raises CutError, SessionError."""
        model = onnx.load(str(bundle.file("unet/model.onnx")), load_external_data=False)
        points = cut_points(model)
        wanted = {RESULT: RESULT, points.deep: FEATURE, **{value: name for name, value in points.probes.items()}}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "probed.onnx"
        onnx.save(cut_graph(model, {}, wanted), str(path))
        shutil.copyfile(bundle.file("unet/model.onnx_data"), folder / "model.onnx_data")
        latent, states = bundle.manifest.latent, bundle.manifest.components["text_encoder"].outputs[0].shape[1:]
        images: tuple[int | str, ...] = ("batch", latent.channels, latent.height, latent.width)
        known = {"sample": images, "timestep": (), "encoder_hidden_states": ("batch", *states), RESULT: images}
        backend = open_backend(bundle.manifest.backend, threads=threads)
        return cls(backend.load(path, cut_component(path, known)), solver, tuple(sorted(points.probes)))

    def results(self, latents: Floats, step: int, prompt_embeds: Floats) -> Mapping[str, Any]:
        """Of one call, by name."""
        found: Mapping[str, Any] = self.graph.run(step_feeds(self.solver, latents, step, prompt_embeds))
        return found

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """See `Denoiser`."""
        result: Floats = self.results(latents, step, prompt_embeds)[RESULT]
        return result

    def along(self, run: Trajectory) -> dict[str, Any]:
        """Along a run's latents, (n, 2, ...) each."""
        calls = [self.results(latents, step, run.prompt_embeds) for step, latents, _ in run]
        return {name: np.stack([call[name] for call in calls]) for name in calls[0]}


class Reusing:
    """A `Denoiser` that computes every third step and else gives the last output again: runs through it are displaced
    as runs with predicted steps are."""

    def __init__(self, network: ProfiledNetwork) -> None:
        self._network, self._expected, self._age = network, -1, 0
        self._output: Floats | None = None

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """A step that does not follow the last one begins a run."""
        if self._output is None or step != self._expected or self._age == 2:
            self._output, self._age = self._network(latents, step, prompt_embeds), -1
        self._expected, self._age = step + 1, self._age + 1
        return self._output


def record_runs(
    bundle: Bundle,
    network: ProfiledNetwork,
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    split: int,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Trajectories:
    """Runs of the (float) network, half from the first step and half from the split, kept in `folder`."""
    recipe, latent = Plan.load(bundle.path).recipe, bundle.manifest.latent
    guidance, solver = float(bundle.manifest.guidance.default), recipe.solver_table
    student = recipe.compression.get("student_digest", recipe.source.digest)
    identity = Identity(
        recipe.source.digest, student, recipe.sampler, recipe.scheduler_digest, recipe.num_steps, guidance
    )
    cloud = PipelineCloud(pipeline, solver, guidance, (latent.channels, latent.height, latent.width))
    return record(folder, prompts, seeds, (0, split), cloud, network, solver, identity, progress)


def along_runs(network: ProfiledNetwork, runs: Trajectories, solver: SolverTable, prediction_type: str) -> Streams:
    """Everything that the network gives along every run, and its output as v, "whole_output"."""
    found = []
    for run in runs:
        given = network.along(run)
        whole = as_v(given[RESULT], run.latents[:-1], run.split, solver, prediction_type)
        found.append((run.split, {**given, WHOLE: whole}))
    return found


def along_cloud(
    bundle: Bundle, pipeline: Any, solver: SolverTable, prompts: Sequence[str], seeds: Sequence[int], split: int
) -> Streams:
    """The full model's deep feature and output along its own first `split` steps, in torch. Raises
    UnsupportedSourceError."""
    latent, guidance = bundle.manifest.latent, float(bundle.manifest.guidance.default)
    begin = PipelineCloud(pipeline, solver, guidance, (latent.channels, latent.height, latent.width))
    staged = StagedTorch(pipeline.unet, solver, probe=None)
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        handoff = begin(prompt, seed, 0)
        features: list[Floats] = []

        def watched(latents: Floats, step: int, prompt_embeds: Floats, seen: list[Floats] = features) -> Floats:
            given = staged.full(latents, step, prompt_embeds)
            seen.append(given.feature)
            return given.noise_pred

        start = Start(0, handoff.latents, None, handoff.prompt_embeds)
        steps = list(itertools.islice(chain(watched, solver, start, guidance), split))
        latents, outputs = (np.stack([getattr(each, name) for each in steps]) for name in ("latents", "noise_pred"))
        whole = as_v(outputs, latents, 0, solver, bundle.manifest.prediction_type)
        found.append((0, {FEATURE: np.stack(features), RESULT: outputs, WHOLE: whole}))
    return found


def as_v(noise_pred: Floats, latents: Floats, first: int, solver: SolverTable, prediction_type: str) -> Floats:
    """(n, 2, C, h, w) of the steps from `first` on as v, latents (n, 1, C, h, w): the v that epsilon amounts to, since
    held epsilon is a run on the computed steps alone under DDIM. Raises PredictionError as `log_snr` does."""
    if prediction_type == "v_prediction":
        return noise_pred
    alphas = 1.0 / (1.0 + np.exp(-log_snr(solver, prediction_type)))
    rows = [velocity(q, x, float(alphas[first + i])) for i, (q, x) in enumerate(zip(noise_pred, latents, strict=True))]
    return np.stack(rows).astype(np.float32)
