"""step_full.onnx and step_predicted.onnx of a plan: modules exported from torch, merged around the U-Net beside them.

The tables live in the modules alone, so another set of tables is another step graph over the same U-Net and weights.
With predicted steps step_full returns the ladders too; step_predicted holds what is left of the network: the shallow
path for the target deep_feature, the probe's few layers where tokens choose, and for the whole output without a probe
nothing at all, so that it reads no text states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.cut_unet import cut_graph, cut_points, probe_value, shape_of
from latentrelay.export.errors import CutError
from latentrelay.export.merge_step import Part, merge_parts, module_part, network_part
from latentrelay.export.onnx_graphs import export_onnx
from latentrelay.export.predicted_step import FullTail, Guess, PredictedTail, required
from latentrelay.export.step_graph import FewStepTail, StepHead, StepTail
from latentrelay.runtime.samplers import sampler_rule
from onnx import ModelProto
from torch import Tensor, nn

UNET = "model.onnx"
_HEAD, _GUESS, _TAIL = "step_head/", "step_guess/", "step_tail/"
_FEATURE, _PROBE = "predicted_feature", "probe"


@dataclass(frozen=True)
class Ladders:
    """What a plan's runs keep between steps: shapes (M1, 2, channels, rows, columns), `dtype` "float32" | "float16"."""

    feature: tuple[int, ...]
    probe: tuple[int, ...] | None
    dtype: str

    def examples(self) -> dict[str, Tensor]:
        """Zeros by port name."""
        kind = torch.float16 if self.dtype == "float16" else torch.float32
        shapes = {"feature_ladder": self.feature, "probe_ladder": self.probe}
        return {name: torch.zeros(shape, dtype=kind) for name, shape in shapes.items() if shape is not None}


def ladders_of(plan: Plan, unet: Path, latent: Sequence[int]) -> Ladders:
    """The ladders of a plan with predicted steps over the graph `unet`; `latent`: channels, rows, columns. Raises
    CutError, ExportError."""
    prediction, rungs = plan.recipe.prediction, required(plan)[0].shape[2]
    feature: tuple[int, ...] = tuple(latent)
    probe: tuple[int, ...] | None = None
    if prediction["target"] == "deep_feature" or prediction["probe"] is not None:
        network = onnx.load(str(unet), load_external_data=False)
        points = cut_points(network)
        if prediction["target"] == "deep_feature":
            feature = _sizes(network, points.deep)
        if prediction["probe"] is not None:
            probe = _sizes(network, probe_value(points, prediction["probe"]))
            if probe[1:] != feature[1:]:
                raise CutError(f"probe {prediction['probe']}", got=probe[1:], expected=f"the grid {feature[1:]}")
    ladder = (rungs, 2, *feature)
    return Ladders(ladder, None if probe is None else (rungs, 2, *probe), prediction["ladder_dtype"])


def write_step(plan: Plan, output: Path, latents: Tensor, opset: int) -> None:
    """Write `output` beside its U-Net `model.onnx`; `latents` (B, C, h, w) are zeros of the shape that is traced.

    With predicted steps the graph also takes split_row () and the ladders, and returns the ladders that the step
    leaves. Raises CutError where the U-Net cannot be cut.
    """
    rule, given = sampler_rule(plan.recipe.sampler), _examples(plan, latents)
    network = onnx.load(str(output.with_name(UNET)), load_external_data=False)
    results, names = _results(plan), {"noise_pred": "out_sample"}
    if rule.branches == 1:  # an example is a tensor of its own: one passed twice becomes one input twice
        given |= {"noise_pred": given["latents"].clone(), "noise": given["latents"].clone()}
        module: nn.Module = FewStepTail(plan)
        order = ["noise_pred", "latents", "step", "noise"]
    elif plan.recipe.prediction:
        ladders = ladders_of(plan, output.with_name(UNET), latents.shape[1:])
        module, taps = FullTail(plan), _taps(plan, ladders, network)
        given |= ladders.examples()
        order = ["noise_pred", "latents", "step", "split_row", "guidance", *_memory(plan)]
        for name, shape, value in taps:
            given[name], names[name] = torch.zeros(shape), value
        order += [name for name in ("feature_ladder", "feature", "probe_ladder", "probe") if name in given]
        results += ["next_" + name for name in ladders.examples()]
    else:
        module, order = StepTail(plan), ["noise_pred", "latents", "step", "guidance", *_memory(plan)]
    tail = _exported(module, {name: given[name] for name in order}, results, opset)
    parts = [_head(plan, given, opset), network_part(network), module_part(tail, _TAIL, names)]
    _save("step_full", parts, results, parts[1], output, rule.branches)


def write_predicted(plan: Plan, output: Path, latents: Tensor, opset: int) -> None:
    """Write step_predicted.onnx of a plan with predicted steps as `output`, beside its U-Net; the rest as above."""
    prediction, given = plan.recipe.prediction, _examples(plan, latents)
    ladders, results = ladders_of(plan, output.with_name(UNET), latents.shape[1:]), _results(plan)
    kept, deep = ladders.examples(), prediction["target"] == "deep_feature"
    guess, found = Guess(plan), [_FEATURE]
    inputs = {"step": given["step"], "split_row": given["split_row"], **kept}
    if ladders.probe is not None:
        inputs["probe"] = torch.zeros(ladders.probe[1:])
        found += ["choices", "probe_error"]
    parts = [module_part(_exported(guess, inputs, found, opset), _GUESS)]
    tail = PredictedTail(plan)
    order = ["noise_pred", "latents", "step", "split_row", "guidance", *_memory(plan)]
    if tail.rectifier.reads_ladder:
        given |= kept
        order.append("feature_ladder")
    stream = {"noise_pred": "out_sample" if deep else _FEATURE}
    parts.append(module_part(_exported(tail, {name: given[name] for name in order}, results, opset), _TAIL, stream))
    network = _left(plan, output.with_name(UNET))
    if network is not None:
        parts = [_head(plan, given, opset), parts[0], network_part(network), parts[1]]
    _save("step_predicted", parts, [*results, *found[1:]], parts[2 if network is not None else 0], output, 2)


def _left(plan: Plan, unet: Path) -> ModelProto | None:
    """What a predicted step keeps of the network; None where that is nothing."""
    prediction = plan.recipe.prediction
    deep, probe = prediction["target"] == "deep_feature", prediction["probe"]
    if not deep and probe is None:
        return None
    network = onnx.load(str(unet), load_external_data=False)
    points = cut_points(network)
    outputs = {"out_sample": "out_sample"} if deep else {}
    outputs |= {} if probe is None else {probe_value(points, probe): _PROBE}
    return cut_graph(network, {points.deep: _FEATURE} if deep else {}, outputs)


def _taps(plan: Plan, ladders: Ladders, network: ModelProto) -> list[tuple[str, tuple[int, ...], str]]:
    """What step_full's tail reads inside the network: (input, shape, value)."""
    prediction = plan.recipe.prediction
    deep = prediction["target"] == "deep_feature"
    if not deep and ladders.probe is None:
        return []
    points = cut_points(network)
    found = [("feature", ladders.feature[1:], points.deep)] if deep else []
    if ladders.probe is not None:
        found.append(("probe", ladders.probe[1:], probe_value(points, prediction["probe"])))
    return found


def _examples(plan: Plan, latents: Tensor) -> dict[str, Tensor]:
    """One tensor a port: an example passed twice would become one input twice."""
    one = latents[:1]
    return {
        "latents": one,
        "step": torch.tensor(0, dtype=torch.int64),
        "split_row": torch.tensor(0, dtype=torch.int64),
        "guidance": torch.tensor(7.5),
        "noise_pred": torch.cat([one, one]),
        **{name: one.clone() for name in _memory(plan)},
    }


def _memory(plan: Plan) -> list[str]:
    return ["x0_prev"] if sampler_rule(plan.recipe.sampler).needs_x0_prev else []


def _results(plan: Plan) -> list[str]:
    return ["next_latents", *("next_" + name for name in _memory(plan))]


def _head(plan: Plan, given: Mapping[str, Tensor], opset: int) -> Part:
    head = StepHead(plan, sampler_rule(plan.recipe.sampler).branches)
    inputs = ["latents", "step", *(["split_row"] if head.has_grids else [])]
    return module_part(_exported(head, {name: given[name] for name in inputs}, ["sample", "timestep"], opset), _HEAD)


class _Named(nn.Module):
    """A module called by the names of its inputs, whichever of them there are."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The values in the order of the names."""
        found: Tensor | tuple[Tensor, ...] = self.module(**dict(zip(self.names, values, strict=True)))
        return found if isinstance(found, tuple) else (found,)


def _exported(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], opset: int) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "module.onnx")
        positional = isinstance(module, StepHead | StepTail | FewStepTail)
        called = module if positional else _Named(module, list(inputs))
        export_onnx(called, list(inputs.values()), path, inputs=list(inputs), outputs=outputs, opset=opset)
        return onnx.load(str(path))


def _save(name: str, parts: Sequence[Part], outputs: Sequence[str], base: Part, output: Path, branches: int) -> None:
    onnx.save(merge_parts(name, parts, outputs, base, branches), str(output))


def _sizes(network: ModelProto, value: str) -> tuple[int, ...]:
    """Channels, rows and columns of a value."""
    sizes = shape_of(network, value)[1:]
    if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CutError(value, got=sizes, expected="channels, rows and columns")
    return tuple(int(size) for size in sizes)
