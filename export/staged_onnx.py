"""A U-Net's graph as the predicted chain sees it: the whole with its cut values, the probe alone, the shallow path.

`StagedOnnx` cuts unet/model.onnx (cut_unet.py) into three graphs and opens each in the session that a bundle's manifest
asks for, so that schedules and rectifiers are fitted on what will run. ONNX Runtime takes external weights from a
graph's own folder only, and not through links, so the folder given gets a copy of the data file.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
import torch
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.predicted_chain import Staged
from latentrelay.compress.solver_tables import SolverTable
from latentrelay.compress.trajectory import step_feeds
from latentrelay.export.cut_unet import cut_graph, cut_points, probe_value
from latentrelay.export.errors import CutError
from latentrelay.export.onnx_graphs import UNET_DATA
from latentrelay.runtime.backend import Backend, Graph, open_backend
from latentrelay.runtime.manifest import BackendSpec, Component, Port
from onnx import ModelProto, TensorProto

SAMPLE, TIMESTEP, STATES, RESULT = "sample", "timestep", "encoder_hidden_states", "out_sample"
FEATURE, PROBE = "deep_feature", "probe"


class StagedOnnx:
    """See `StagedDenoiser` of compress/predicted_chain.py; the feature is the deep one (the DeepCache point).

    `latent`: channels, rows, columns; `states`: tokens, width; `probe` "P0".."P3", or None for none; `threads`: torch's
    number if not given. Graphs are opened when they are first called. Raises CutError, SessionError.
    """

    def __init__(
        self,
        unet: Path,
        folder: Path,
        table: SolverTable,
        spec: BackendSpec,
        latent: Sequence[int],
        states: Sequence[int],
        threads: int | None = None,
        probe: str | None = "P1",
    ) -> None:
        self._table = table
        self._backend = open_backend(spec, threads=torch.get_num_threads() if threads is None else threads)
        images: tuple[int | str, ...] = ("batch", *latent)
        tokens: tuple[int | str, ...] = ("batch", *states)
        known = {SAMPLE: images, TIMESTEP: (), STATES: tokens, RESULT: images}
        self._cuts = write_cuts(unet, folder, probe)
        self._graphs = _Graphs(self._backend, self._cuts, known)
        self.has_probe = probe is not None

    @property
    def providers(self) -> tuple[str, ...]:
        """What the backend really set up."""
        return self._graphs["full"].providers

    def on_grid(self, table: SolverTable) -> StagedOnnx:
        """The same sessions with another grid's timesteps and input scales."""
        other = copy.copy(self)
        other._table = table
        return other

    def reads_states(self, part: str) -> bool:
        """Whether "full", "shallow" or "probe" has the text states among its inputs."""
        model = onnx.load(str(self._cuts[part]), load_external_data=False)
        return any(value.name == STATES for value in model.graph.input)

    def __call__(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """The whole network as a `Denoiser`."""
        return self.full(latents, step, prompt_embeds).noise_pred

    def full(self, latents: Floats, step: int, prompt_embeds: Floats) -> Staged:
        """latents (1,C,h,w), prompt_embeds (2,T,D) -> noise_pred (2,C,h,w), deep feature (2,Cf,h,w), probe."""
        results = self._graphs["full"].run(step_feeds(self._table, latents, step, prompt_embeds))
        return Staged(results[RESULT], results[FEATURE], results.get(PROBE))

    def probe(self, latents: Floats, step: int, prompt_embeds: Floats) -> Floats:
        """-> the probe (2,Cp,h,w). Raises CutError where none was asked for."""
        if not self.has_probe:
            raise CutError("the probe", got="none was asked for", expected="P0 | P1 | P2 | P3")
        result: Floats = self._graphs["probe"].run(step_feeds(self._table, latents, step, prompt_embeds))[PROBE]
        return result

    def shallow(self, latents: Floats, step: int, prompt_embeds: Floats, feature: Floats) -> Floats:
        """feature (2,Cf,h,w) in the place of the computed one -> noise_pred (2,C,h,w)."""
        feeds = {**step_feeds(self._table, latents, step, prompt_embeds), FEATURE: feature}
        result: Floats = self._graphs["shallow"].run(feeds)[RESULT]
        return result


def write_cuts(unet: Path, folder: Path, probe: str | None) -> dict[str, Path]:
    """Write full.onnx, shallow.onnx and, with a probe, probe.onnx into `folder`, beside a copy of the data file.

    Values are called deep_feature and probe. Returns the files by name. Raises CutError.
    """
    model = onnx.load(str(unet), load_external_data=False)
    points = cut_points(model)
    kept = {probe_value(points, probe): PROBE} if probe is not None else {}
    cuts = {
        "full": cut_graph(model, {}, {RESULT: RESULT, points.deep: FEATURE, **kept}),
        "shallow": cut_graph(model, {points.deep: FEATURE}, {RESULT: RESULT}),
        **({"probe": cut_graph(model, {}, kept)} if kept else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = unet.with_name(UNET_DATA)
    if data.is_file() and folder.resolve() != unet.parent.resolve():
        _moved_in(folder / UNET_DATA, lambda beside: shutil.copyfile(data, beside))
    paths = {name: folder / f"{name}.onnx" for name in cuts}
    for name, cut in cuts.items():
        _moved_in(paths[name], partial(onnx.save, cut))
    return paths


def _moved_in(path: Path, write: Callable[[str], object]) -> None:
    """Written beside and renamed: another session may have the old file open."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(str(beside))
    beside.replace(path)


def cut_component(path: Path, known: Mapping[str, tuple[int | str, ...]]) -> Component:
    """A cut graph's signature; `known` are the shapes of the U-Net's own ports, the others are the graph's."""
    model = onnx.load(str(path), load_external_data=False)
    _require_float(model)

    def ports(values: Sequence[onnx.ValueInfoProto]) -> tuple[Port, ...]:
        return tuple(Port(v.name, v.name, "float32", known.get(v.name) or _shape(v)) for v in values)

    return Component("unet", path.name, ports(model.graph.input), ports(model.graph.output))


class _Graphs(dict[str, Graph]):
    """The cuts' sessions, opened when they are first asked for."""

    def __init__(self, backend: Backend, cuts: Mapping[str, Path], known: Mapping[str, tuple[int | str, ...]]) -> None:
        super().__init__()
        self._backend, self._cuts, self._known = backend, cuts, known

    def __missing__(self, name: str) -> Graph:
        path = self._cuts[name]
        self[name] = self._backend.load(path, cut_component(path, self._known))
        return self[name]


def _require_float(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            got = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
            raise CutError(value.name, got=got, expected="FLOAT: activations at a cut are float32")


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
