"""Predicted steps as Core ML packages: both steps of a plan with prediction, composed in torch, and their samples.

`CoreMLFullStep` is a computed step that updates the ladders, `CoreMLPredictedStep` a predicted one: probe, choice,
prediction, the shallow path where the target asks for it, and the tail. The modules are those that ONNX gets
(`predicted_step.py`) around `staged_unet.py`'s networks. As in `coreml_graphs.py`, what has rank 0 in ONNX is (1,)
here; ladders are float32 and `choices` float32 too, which the backend adapts. An input that a package does not read
(the text, where nothing of the network runs) is not among its inputs. `predicted_samples` says what they must give, by
compress/predicted_chain.py on the same network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from latentrelay.compress.denoising_chain import guided, solver_step
from latentrelay.compress.plan import Level, Plan
from latentrelay.compress.plan_prediction import NORMAL, mask_rows
from latentrelay.compress.predicted_chain import RunState, StagedDenoiser, WholeOutput, rectified, step_output
from latentrelay.compress.prediction import Prediction
from latentrelay.export.compensation_file import TableCorrection
from latentrelay.export.coreml_graphs import CoreMLStep, PackageInput, gather_tables, step_inputs, step_outputs
from latentrelay.export.deployed import TorchDenoiser
from latentrelay.export.errors import ExportError
from latentrelay.export.onnx_graphs import UNetGraph
from latentrelay.export.parity import Sample
from latentrelay.export.predicted_step import FullTail, Guess, PredictedTail
from latentrelay.export.staged_torch import StagedTorch
from latentrelay.export.staged_unet import FullUNet, ShallowUNet, probe_value
from latentrelay.export.step_graph import StepHead
from latentrelay.runtime.samplers import SamplerRule, sampler_rule
from torch import Tensor, nn

LADDERS = ("feature_ladder", "probe_ladder")
_FOR_A_CHECK, _OF_THE_HOT = 3, 1  # samples of each kind of step, at the normal level and at the hot one


class _PredictedStep(nn.Module):
    """What both steps share: the order of their inputs, and the layout of the text states."""

    def __init__(self, plan: Plan, rule: SamplerRule, *, apple_layout: bool) -> None:
        super().__init__()
        settings = plan.recipe.prediction
        self.deep, self.selects = settings["target"] == "deep_feature", settings["metric"] is not None
        self.probe = str(settings["probe"]) if self.selects else None
        self.memory, self.apple_layout = rule.needs_x0_prev, apple_layout
        self.head = gather_tables(StepHead(plan, rule.branches))

    def named(self, rest: Sequence[Tensor]) -> dict[str, Tensor]:
        """The inputs behind guidance, by name."""
        names = [*(["x0_prev"] if self.memory else []), LADDERS[0], *([LADDERS[1]] if self.selects else [])]
        return dict(zip(names, rest, strict=True))

    def states(self, prompt_embeds: Tensor) -> Tensor:
        """(B, T, D)."""
        return prompt_embeds.squeeze(2).transpose(1, 2) if self.apple_layout else prompt_embeds


class CoreMLFullStep(_PredictedStep):
    """A computed step. Inputs in the order of `predicted_inputs`; outputs of `predicted_outputs`."""

    def __init__(self, unet: nn.Module, plan: Plan, rule: SamplerRule, *, apple_layout: bool = False) -> None:
        super().__init__(plan, rule, apple_layout=apple_layout)
        self.staged = self.deep or self.selects
        self.unet: nn.Module = FullUNet(unet, self.probe) if self.staged else UNetGraph(unet)
        self.tail = gather_tables(FullTail(plan))

    def forward(
        self, latents: Tensor, step: Tensor, split_row: Tensor, prompt_embeds: Tensor, guidance: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """latents f32 (1,C,h,w), step and split_row i32 (1,), prompt_embeds f32 (2,T,D), guidance (1,), then x0_prev
        where the solver has memory, feature_ladder (M1,2,Cf,hf,wf) and, where tokens choose, probe_ladder."""
        given = self.named(rest)
        sample, timestep = self.head(latents, step, split_row)
        made = self.unet(sample, timestep, self.states(prompt_embeds))
        noise_pred, feature, *probe = made if self.staged else (made, None)
        results: tuple[Tensor, ...] = self.tail(
            noise_pred,
            latents,
            step,
            split_row,
            guidance,
            given["feature_ladder"],
            x0_prev=given.get("x0_prev"),
            feature=feature if self.deep else None,
            probe_ladder=given.get("probe_ladder"),
            probe=probe[0] if probe else None,
        )
        return results


class CoreMLPredictedStep(_PredictedStep):
    """A predicted step. Inputs in the order of `predicted_inputs`; outputs of `predicted_outputs`."""

    def __init__(self, unet: nn.Module, plan: Plan, rule: SamplerRule, *, apple_layout: bool = False) -> None:
        super().__init__(plan, rule, apple_layout=apple_layout)
        if self.deep or self.selects:
            self.unet = ShallowUNet(unet, self.probe)
        tail = PredictedTail(plan)
        self.reads_ladder = tail.rectifier.reads_ladder
        self.guess, self.tail = gather_tables(Guess(plan)), gather_tables(tail)

    def forward(self, latents: Tensor, step: Tensor, split_row: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """As `CoreMLFullStep`; prompt_embeds are left out where nothing of the network runs."""
        runs = self.deep or self.selects
        guidance, given = rest[int(runs)], self.named(rest[1 + int(runs) :])
        feature_ladder, probe_ladder = given["feature_ladder"], given.get("probe_ladder")
        if not runs:
            q, *chosen = self.guess(step, split_row, feature_ladder)
        else:
            states = self.states(rest[0])
            hidden, embedding = self.unet.begin(*self.head(latents, step, split_row))
            probe = None
            if self.probe is not None:
                probe = probe_value(self.unet.unet, self.probe, hidden, embedding, states)
            q, *chosen = self.guess(step, split_row, feature_ladder, probe_ladder, probe)
            if self.deep:
                q = self.unet.finish(hidden, embedding, states, q)
        ladder = feature_ladder if self.reads_ladder else None
        results = self.tail(q, latents, step, split_row, guidance, x0_prev=given.get("x0_prev"), feature_ladder=ladder)
        if not chosen:
            return tuple(results)
        choices, probe_error = chosen
        return (*results, choices.float(), probe_error.reshape(1))


def predicted_inputs(
    kind: str,
    plan: Plan,
    rule: SamplerRule,
    latent: Sequence[int],
    states: Sequence[int],
    ladders: Mapping[str, Sequence[int]],
    *,
    apple_layout: bool = False,
) -> list[PackageInput]:
    """A package's inputs; `kind` "full" or "predicted", `ladders` the shapes by name, the rest as in `step_inputs`."""
    settings = plan.recipe.prediction
    inputs = step_inputs(rule, latent, states, apple_layout=apple_layout)
    inputs.insert(2, PackageInput("split_row", (1,), "int32"))
    if kind == "predicted" and settings["target"] == "whole_output" and settings["metric"] is None:
        inputs = [each for each in inputs if each.name != "prompt_embeds"]
    names = LADDERS if settings["metric"] is not None else LADDERS[:1]
    return [*inputs, *(PackageInput(name, tuple(ladders[name])) for name in names)]


def predicted_outputs(kind: str, plan: Plan, rule: SamplerRule) -> list[str]:
    """A package's outputs."""
    selects = plan.recipe.prediction["metric"] is not None
    names = ["next_latents", *(["next_x0_prev"] if rule.needs_x0_prev else [])]
    if kind == "full":
        return [*names, *(f"next_{name}" for name in (LADDERS if selects else LADDERS[:1]))]
    return [*names, *(["choices", "probe_error"] if selects else [])]


def step_modules(
    unet: nn.Module, plan: Plan, samples: Mapping[str, list[Sample]], *, apple_layout: bool
) -> dict[str, tuple[nn.Module, list[PackageInput], list[str]]]:
    """The step packages of a plan by role: module, inputs, outputs. One without prediction has step_full alone."""
    rule, step = sampler_rule(plan.recipe.sampler), samples["step_full"][0].inputs
    latent, states = step["latents"].shape[1:], step["prompt_embeds"].shape[1:]
    if not plan.recipe.prediction:
        inputs = step_inputs(rule, latent, states, apple_layout=apple_layout)
        return {"step_full": (CoreMLStep(unet, plan, rule, apple_layout=apple_layout), inputs, step_outputs(rule))}
    ladders = {name: step[name].shape for name in LADDERS if name in step}
    modules = {
        "full": CoreMLFullStep(unet, plan, rule, apple_layout=apple_layout),
        "predicted": CoreMLPredictedStep(unet, plan, rule, apple_layout=apple_layout),
    }
    return {
        f"step_{kind}": (
            module,
            predicted_inputs(kind, plan, rule, latent, states, ladders, apple_layout=apple_layout),
            predicted_outputs(kind, plan, rule),
        )
        for kind, module in modules.items()
    }


@torch.no_grad()
def predicted_samples(unet: nn.Module, plan: Plan, start: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """What both kinds of step must give in float32, by NumPy around the network in torch: {"step_full": [...],
    "step_predicted": [...]} of one run with predicted steps, and behind them of one at the hot level where the plan has
    one.

    `start`: latents (1,C,h,w), prompt_embeds (2,T,D), guidance () and, where the solver has memory, x0_prev of a step's
    sample; a run begins with them at the level's first split. Ladders that were never written are NaN.
    """
    found: dict[str, list[Sample]] = {"step_full": [], "step_predicted": []}
    rows = mask_rows(plan.recipe.prediction)
    for level in dict.fromkeys(level for _, level in rows):
        split = next(split for split, each in rows if each == level)
        for role, cases in _samples_of(unet, plan, start, split, level).items():
            found[role] += cases[: _FOR_A_CHECK if level == NORMAL else _OF_THE_HOT]
    return found


def _samples_of(
    unet: nn.Module, plan: Plan, start: Mapping[str, Any], split: int, level: Level
) -> dict[str, list[Sample]]:
    """All of one run."""
    row, prediction = mask_rows(plan.recipe.prediction)[split, level], Prediction.of_plan(plan, split, level)
    if prediction is None:
        raise ExportError("the plan predicts no steps", got=f"split {split}", expected="a mask with predicted steps")
    table = prediction.grid or plan.recipe.solver_table
    denoiser: StagedDenoiser
    if prediction.target == "whole_output" and not prediction.selects:
        denoiser = WholeOutput(TorchDenoiser(unet, table))
    else:
        denoiser = StagedTorch(unet, table, plan.recipe.prediction["probe"])
    kept = {name: array for name, array in plan.tables.arrays().items() if name.startswith("compensation_")}
    correction = TableCorrection(kept) if kept else None
    fixed = {"prompt_embeds": start["prompt_embeds"], "guidance": np.asarray(start["guidance"], dtype=np.float32)}
    state = RunState(start["latents"], start.get("x0_prev"))
    found: dict[str, list[Sample]] = {"step_full": [], "step_predicted": []}
    blank: dict[str, Any] = {}
    for step in range(split, plan.recipe.num_steps):
        out = step_output(denoiser, prediction, state, step, start["prompt_embeds"], correction)
        q = rectified(prediction, out.q, step, state)
        e = guided(q, float(start["guidance"]) * float(plan.tables.guidance_multiplier[step]))
        next_latents, x0 = solver_step(table.rows[step], state.latents, e, state.x0_prev)
        inputs: dict[str, Any] = {"latents": state.latents, "step": np.array(step), "split_row": np.array(row)}
        outputs: dict[str, Any] = {"next_latents": next_latents}
        inputs |= fixed
        if "x0_prev" in start:
            inputs["x0_prev"], outputs["next_x0_prev"] = state.x0_prev, x0
        for name in LADDERS:
            after = getattr(out.state, name)
            if after is None:
                continue
            before = getattr(state, name)
            blank[name] = blank.get(name, np.full_like(after, np.nan))
            inputs[name] = blank[name] if before is None else before
            if prediction.kind(step) == "full":
                outputs[f"next_{name}"] = after
        if out.choices is not None:
            outputs |= {"choices": out.choices, "probe_error": np.asarray(out.probe_error)}
        found[f"step_{prediction.kind(step)}"].append(Sample(inputs, outputs))
        state = replace(out.state, latents=next_latents, x0_prev=x0 if "x0_prev" in start else None)
    return found
