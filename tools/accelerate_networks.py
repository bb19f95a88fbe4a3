"""A bundle's U-Net and its cuts: what every accelerated method calls, and what each call costs.

In: a bundle, a folder for the cut graphs (they lie beside a copy of the weights). Out: arrays of a call by role, and
milliseconds by kind of call, all kinds in turn in one process, in the session that the bundle's manifest asks for. A
kind is one graph: the whole network with some of its inner values (`full`, `full_deep`, `full_blocks`, `full_modules`),
what is left of it when inner values are given (`shallow`, `modules`, `head`), its beginning (`probe`, `first`,
`block`), and the whole network on the conditional branch alone (`conditional`). Inner values: `deep`, the hidden state
that the last up-block's last resnet reads before its skip (DeepCache's, arXiv 2312.00858); `probe`, what norm2 of the
first resnet reads; `first_in`, conv_in's output; `first_out`, the first attention block's; `last`, what the last norm
reads; `module_*`, the outputs of attention and feed-forward layers before they are added. `tail` is no call of the
network but what every step does besides: compensation, guidance and solver.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.cut_unet import cut_graph, cut_points, module_output
from latentrelay.export.onnx_graphs import export_onnx
from latentrelay.export.step_graph import StepTail
from latentrelay.runtime import Bundle
from latentrelay.runtime.backend import Graph, open_backend
from latentrelay.runtime.manifest import Component, Port
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Values = Mapping[str, Floats]
WHOLE = ("full", "full_deep", "full_blocks", "full_modules")  # the kinds that are a computed step
BRANCH = "conditional"
NOTHING = "none"  # a step without any call
TAIL = "tail"  # what every step does besides
ROUNDS, WARM_UPS, CALLS = 25, 3, 2
_OPSET = 18
_SAMPLE, _TIMESTEP, _STATES, _RESULT = "sample", "timestep", "encoder_hidden_states", "out_sample"
_BLOCK = re.compile(r"up_blocks\.\d+\.(resnets|attentions)\.\d+")
_LAYER = re.compile(r"(.*\.transformer_blocks\.\d+\.(?:attn1|attn2|ff))\.")


@dataclass(frozen=True)
class Cut:
    """One kind of call by roles: what it is given besides the network's own inputs, and what it returns."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclass
class Networks:
    """One bundle's U-Net. Graphs are cut and opened when first called. Not safe for several threads."""

    bundle: Bundle
    folder: Path
    threads: int
    _open: dict[str, tuple[Graph, tuple[str, ...]]] = field(default_factory=dict)

    @cached_property
    def plan(self) -> Plan:
        """The bundle's."""
        return Plan.load(self.bundle.path)

    @cached_property
    def digest(self) -> str:
        """Of the network's files."""
        return repr(sorted((e.path, e.sha256) for e in self.bundle.files if e.path.startswith("unet/model.onnx")))

    @cached_property
    def values(self) -> dict[str, str]:
        """{role: the graph's value}."""
        points = cut_points(self._model)
        found = {"noise_pred": _RESULT, "deep": points.deep, "first_in": points.probes["P0"]}
        found |= {"probe": points.probes["P1"], "last": module_output(self._model, _last_module(self._model))}
        if "P3" in points.probes:
            found["first_out"] = points.probes["P3"]
        return found | {
            f"module_{i}": module_output(self._model, path) for i, path in enumerate(_layer_paths(self._model))
        }

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The roles of the attention and feed-forward outputs."""
        return tuple(role for role in self.values if role.startswith("module_"))

    @cached_property
    def kinds(self) -> dict[str, Cut]:
        """Every kind of call that this network has."""
        out = "noise_pred"
        found = {
            "full": Cut((), (out,)),
            "full_deep": Cut((), (out, "deep", "probe")),
            "shallow": Cut(("deep",), (out,)),
            "shallow_probe": Cut(("deep",), (out, "probe")),
            "probe": Cut((), ("probe",)),
            "first": Cut((), ("first_in", "probe")),
            "head": Cut(("last",), (out,)),
            "full_blocks": Cut((), tuple(r for r in (out, "first_in", "first_out", "probe", "last") if self._has(r))),
        }
        if self._any_batch:
            found[BRANCH] = Cut((), (out,))
        if self._has("first_out"):
            found["block"] = Cut((), ("first_in", "first_out"))
        if self.modules:
            found |= {"full_modules": Cut((), (out, *self.modules)), "modules": Cut(self.modules, (out,))}
        return found

    def run(self, kind: str, sample: Floats, timestep: float, states: Floats, values: Values | None = None) -> Values:
        """sample (1, C, h, w) as the network reads it, states (2, T, D) -> arrays by role; two branches each, one for
        the kind `conditional`."""
        cut, branches = self.kinds[kind], slice(1, 2) if kind == BRANCH else slice(0, 2)
        feeds: dict[str, Any] = {
            _SAMPLE: np.repeat(sample, branches.stop - branches.start, 0),
            _TIMESTEP: np.array(timestep, np.float32),
            _STATES: states[branches],
        }
        feeds |= {role: (values or {})[role] for role in cut.takes}
        graph, names = self._graph("full" if kind == BRANCH else kind)
        return graph.run({name: feeds[name] for name in names})

    def costs(self, kinds: Iterable[str], states: tuple[int, int]) -> dict[str, dict[str, float]]:
        """`median_ms` and `spread_ms` by kind: rounds in which each runs CALLS times, in an order that moves on."""
        rng = np.random.default_rng(0)
        sample = rng.standard_normal((1, *self._latent)).astype(np.float32)
        embeds = rng.standard_normal((2, *states)).astype(np.float32)
        names = [TAIL, *(kind for kind in dict.fromkeys(kinds) if kind != NOTHING)]
        tail = {"noise_pred": np.repeat(sample, 2, 0), "latents": sample, "x0_prev": sample}
        tail |= {"step": np.array(1), "guidance": np.array(4.0, np.float32)}
        known: dict[str, Floats] = {}
        for kind in ("full_deep", "full_blocks", "full_modules"):
            if kind in self.kinds:
                known |= self.run(kind, sample, 500.0, embeds)
        laps: dict[str, list[float]] = {kind: [] for kind in names}
        for turn in range(-WARM_UPS, ROUNDS):
            for i in range(len(names)):
                kind = names[(i + turn) % len(names)]
                begun = time.perf_counter()
                for _ in range(CALLS):
                    if kind == TAIL:
                        self._graph(TAIL)[0].run(tail)
                    else:
                        self.run(kind, sample, 500.0, embeds, known)
                if turn >= 0:
                    laps[kind].append((time.perf_counter() - begun) * 1e3 / CALLS)
        return {
            kind: {"median_ms": statistics.median(each), "spread_ms": max(each) - min(each)}
            for kind, each in laps.items()
        }

    @property
    def _any_batch(self) -> bool:
        """Whether the graph takes one branch alone: a profile with static shapes has two."""
        sample = next(value for value in self._model.graph.input if value.name == _SAMPLE)
        return bool(sample.type.tensor_type.shape.dim[0].dim_param)

    def _has(self, role: str) -> bool:
        return role in self.values

    @cached_property
    def _model(self) -> onnx.ModelProto:
        return onnx.load(self.bundle.file("unet/model.onnx"), load_external_data=False)

    def _graph(self, kind: str) -> tuple[Graph, tuple[str, ...]]:
        if kind not in self._open:
            place = self.folder / sha256(self.digest.encode()).hexdigest()[:16]  # weights lie beside their own graphs
            place.mkdir(parents=True, exist_ok=True)
            path = place / f"{kind}.onnx"
            if kind == TAIL:
                self._write_tail(path)
                model = onnx.load(path)
            else:
                cut, values = self.kinds[kind], self.values
                model = cut_graph(self._model, {values[r]: r for r in cut.takes}, {values[r]: r for r in cut.gives})
                for data in self.bundle.file("unet/model.onnx").parent.glob("model.onnx_data*"):
                    if not (place / data.name).is_file():
                        beside = place / f".{data.name}.{os.getpid()}"
                        shutil.copyfile(data, beside)
                        beside.replace(place / data.name)
                onnx.save(model, path)
            inputs, outputs = ([_port(value) for value in values] for values in (model.graph.input, model.graph.output))
            backend = open_backend(self.bundle.manifest.backend, threads=self.threads)
            graph = backend.load(path, Component(kind, path.name, tuple(inputs), tuple(outputs)))
            self._open[kind] = (graph, tuple(port.name for port in inputs))
        return self._open[kind]

    def _write_tail(self, path: Path) -> None:
        """What every step does after its network, as a graph of its own: compensation, guidance, solver."""
        pair = torch.zeros(2, *self._latent)
        given = {
            "noise_pred": pair,
            "latents": pair[:1].clone(),
            "step": torch.tensor(1),
            "guidance": torch.tensor(4.0),
        }
        given["x0_prev"] = pair[:1].clone()
        outputs = ["next_latents", "next_x0_prev"]
        export_onnx(StepTail(self.plan), list(given.values()), path, inputs=list(given), outputs=outputs, opset=_OPSET)

    @property
    def _latent(self) -> tuple[int, int, int]:
        latent = self.bundle.manifest.latent
        return latent.channels, latent.height, latent.width


def _port(value: Any) -> Port:
    """A graph's input or output with every size free."""
    dims = value.type.tensor_type.shape.dim
    dtype = "int64" if value.type.tensor_type.elem_type == onnx.TensorProto.INT64 else "float32"
    return Port(value.name, value.name, dtype, tuple(f"{value.name}_{i}" for i in range(len(dims))))


def _last_module(model: onnx.ModelProto) -> str:
    """The path of the block whose result conv_norm_out reads: the last up block's last attention, else its ResNet."""
    paths = {match.group(0) for node in model.graph.node if (match := _BLOCK.match(node.name))}
    return max(paths, key=lambda path: (*map(int, path.split(".")[1::2]), "attentions" in path))


def _layer_paths(model: onnx.ModelProto) -> list[str]:
    """Attentions and feed-forward layers in the graph's order."""
    found = (match.group(1) for node in model.graph.node if (match := _LAYER.match(node.name)))
    return list(dict.fromkeys(found))
