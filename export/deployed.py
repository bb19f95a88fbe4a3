"""The networks as compression sees them: a graph in its deployed session, or torch, behind `Denoiser`.

Corrections are fitted through `OnnxDenoiser`, which is the runtime's own backend with the bundle's own options, so what
is fitted on is what will run. `TorchDenoiser` is the float network. `PipelineCloud` is the cloud's part of a run: the
source's full model in torch, from the prompt and the seed to the latents at the split.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.denoising_chain import Floats, Start, chain
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import CloudHandoff, step_feeds
from latentrelay.export.onnx_graphs import UNetGraph
from latentrelay.export.reference_run import encode_ids
from latentrelay.runtime.backend import open_backend
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from latentrelay.runtime.noise import initial_noise
from numpy.typing import NDArray


class TorchDenoiser:
    """A U-Net in torch, float32 on the CPU."""

    def __init__(self, unet: torch.nn.Module, table: SolverTable) -> None:
        self._graph, self._table = UNetGraph(unet).eval(), table

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """See `Denoiser`."""
        feeds = step_feeds(self._table, latents, step, prompt_embeds)
        with torch.no_grad():
            result: Floats = self._graph(*(torch.from_numpy(array) for array in feeds.values())).numpy()
        return result


class OnnxDenoiser:
    """`unet/model.onnx` in the session that a bundle's manifest asks for, as far as this machine has it.

    `latent`: channels, rows, columns; `states`: tokens, width; `threads`: torch's number if not given. Raises
    SessionError.
    """

    def __init__(
        self,
        path: Path,
        table: SolverTable,
        spec: BackendSpec,
        latent: Sequence[int],
        states: Sequence[int],
        threads: int | None = None,
    ) -> None:
        self._table = table
        backend = open_backend(spec, threads=torch.get_num_threads() if threads is None else threads)
        self._graph = backend.load(path, unet_component(path.name, latent, states))

    @property
    def providers(self) -> tuple[str, ...]:
        """What the backend really set up."""
        return self._graph.providers

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """See `Denoiser`."""
        result: Floats = self._graph.run(step_feeds(self._table, latents, step, prompt_embeds))["out_sample"]
        return result


class DeployedSession:
    """One graph in the session that a bundle's manifest asks for, called as ONNX Runtime's own sessions are."""

    def __init__(self, path: Path, component: Component, spec: BackendSpec) -> None:
        self._graph = open_backend(spec, threads=torch.get_num_threads()).load(path, component)

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The outputs of those names."""
        outputs = self._graph.run(feeds)
        return [outputs[name] for name in names]


def unet_component(path: str, latent: Sequence[int], states: Sequence[int]) -> Component:
    """The U-Net's signature with a free batch."""
    sample = Port("sample", "sample", "float32", ("batch", *latent))
    embeds = Port("encoder_hidden_states", "encoder_hidden_states", "float32", ("batch", *states))
    result = Port("out_sample", "out_sample", "float32", ("batch", *latent))
    return Component("unet", path, (sample, Port("timestep", "timestep", "float32", ()), embeds), (result,))


class PipelineCloud:
    """The source pipeline's first steps in torch; `latent`: channels, rows, columns."""

    def __init__(self, pipeline: Any, table: SolverTable, guidance: float, latent: Sequence[int]) -> None:
        self._pipeline, self._table, self._guidance = pipeline, table, guidance
        self._shape = (1, *latent)
        self._denoiser = TorchDenoiser(pipeline.unet, table)

    def __call__(self, prompt: str, seed: int, split: int) -> CloudHandoff:
        """See `CloudSegment`; the negative prompt is empty."""
        with torch.no_grad():
            ids = torch.from_numpy(encode_ids(self._pipeline.tokenizer, ["", prompt]))
            embeds: Floats = self._pipeline.text_encoder(ids).last_hidden_state.numpy().copy()
        noise = initial_noise(seed, self._shape)
        latents: Floats = (noise * np.float32(self._table.init_noise_sigma)).astype(np.float32)
        memory: Floats | None = None
        steps = chain(self._denoiser, self._table, Start(0, latents, None, embeds), self._guidance)
        for step in itertools.islice(steps, split):
            latents, memory = step.next_latents, step.next_x0_prev
        return CloudHandoff(latents, memory, embeds)
