"""step_full.onnx of a plan: head and tail exported from torch and merged around the U-Net that lies in the same folder.

The tables live in head and tail alone, so another set of tables is another step graph over the same U-Net and weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.merge_step import merge_step
from latentrelay.export.onnx_graphs import export_onnx
from latentrelay.export.step_graph import FewStepTail, StepHead, StepTail
from latentrelay.runtime.samplers import sampler_rule

UNET = "model.onnx"


def write_step(plan: Plan, output: Path, latents: torch.Tensor, opset: int) -> None:
    """Write `output` beside its U-Net `model.onnx`; `latents` (B, C, h, w) are zeros of the shape that is traced."""
    rule = sampler_rule(plan.recipe.sampler)
    one, step = latents[:1], torch.tensor(0, dtype=torch.int64)
    if rule.branches == 1:  # an example is a tensor of its own: one passed twice becomes one input twice
        module: torch.nn.Module = FewStepTail(plan)
        examples = {"noise_pred": one.clone(), "latents": one, "step": step, "noise": one.clone()}
        results = ["next_latents"]
    else:
        pair = torch.cat([one, one])
        module = StepTail(plan)
        examples = {"noise_pred": pair, "latents": one, "step": step, "guidance": torch.tensor(7.5)}
        examples |= {"x0_prev": one.clone()} if rule.needs_x0_prev else {}
        results = ["next_latents", *(["next_x0_prev"] if rule.needs_x0_prev else [])]
    with tempfile.TemporaryDirectory() as folder:
        head, tail = Path(folder, "head.onnx"), Path(folder, "tail.onnx")
        inputs, outputs = ["latents", "step"], ["sample", "timestep"]
        export_onnx(StepHead(plan, rule.branches), [one, step], head, inputs=inputs, outputs=outputs, opset=opset)
        export_onnx(module, list(examples.values()), tail, inputs=list(examples), outputs=results, opset=opset)
        merge_step(output.with_name(UNET), head, tail, output, rule.branches)
