"""The step graphs that a benchmark of predicted steps compares, and the share of FLOPs that a predicted step keeps.

In: the folder of a network's U-Net graph (model.onnx and its data) and the network's plan. Out, in another folder with
a copy of both: one step graph a `Variant`, computed with and without ladders, predicted with and without a choice by
token, each from a plan whose tables ask for it (orders 0 and 1, masks without meaning, rectifier rows of zeros, which
cost what fitted ones do). Every graph is written by the code that writes a bundle's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.plan import Plan, SplitMask
from latentrelay.tools.bench_graphs import OPSET, UNET, load_unet
from latentrelay.tools.bench_source import Network

SPLIT, EVERY = 8, 3  # the device's first step, and which of its steps are computed
ROW, COMPUTED, PREDICTED = 1, SPLIT + 2 * EVERY, SPLIT + 2 * EVERY + 1  # where ladders are whole; the tables' row
PROBE, METRIC = "P1", "l2"
SHARES = "flop_shares.json"


@dataclass(frozen=True)
class Variant:
    """`kind` "full", "predicted" or "part" (of both); `target` None: a plan without prediction; `selects`: tokens
    choose by a probe."""

    name: str
    kind: str
    target: str | None = None
    selects: bool = False

    @property
    def file(self) -> str:
        """The graph's file."""
        return f"{self.name}.onnx"


FULL = Variant("full", "full")
# What choosing predictors and updating ladders takes, alone: out of the deep feature's two step graphs.
SELECTION, UPDATES = Variant("selection-alone", "part"), Variant("ladder-updates-alone", "part")
VARIANTS = (
    FULL,
    Variant("full-deep-feature", "full", "deep_feature", selects=True),
    Variant("full-whole-output", "full", "whole_output"),
    Variant("predicted-deep-feature", "predicted", "deep_feature", selects=True),
    Variant("predicted-deep-feature-fixed", "predicted", "deep_feature"),
    Variant("predicted-whole-output", "predicted", "whole_output"),
    Variant("predicted-whole-output-probe", "predicted", "whole_output", selects=True),
    SELECTION,
    UPDATES,
)


def predicted_plan(plan: Plan, target: str, *, selects: bool, channels: int) -> Plan:
    """`plan` with a predicted run from SPLIT: every EVERY-th step computed, order 1 or a choice of orders 0 and 1."""
    recipe = plan.recipe
    mask: Any = tuple("full" if i % EVERY == 0 else "predicted" for i in range(recipe.num_steps - SPLIT))
    spec = LadderSpec((0, 1) if selects else (1,))
    axis = spec.axis(recipe.solver_table, "epsilon")
    update, candidates = ladder_rows(mask, SPLIT, recipe.num_steps, spec, axis)
    prediction = {
        "target": target,
        "probe": PROBE if selects else None,
        "metric": METRIC if selects else None,
        "orders": list(spec.orders),
        "horizon": spec.horizon,
        "abscissa": spec.abscissa,
        "ladder": spec.kind,
        "ladder_dtype": "float32",
        "rows": {str(SPLIT): ROW},
        "fallback_threshold": None,
        "report": {},
    }
    splits = tuple(SplitMask(SPLIT, mask) if each.split == SPLIT else each for each in recipe.splits)
    tables = replace(
        plan.tables,
        ladder_update=np.stack([np.zeros_like(update), update]),
        candidates=np.stack([np.zeros_like(candidates), candidates]),
        rectifier_gain=np.zeros((2, recipe.num_steps, 2, channels)),
        rectifier_offset=np.zeros((2, recipe.num_steps, 2, channels)),
        rectifier_mixing=np.zeros((2, recipe.num_steps, 2, 1 + 2 * spec.rungs, channels)),
    )
    return Plan(replace(recipe, splits=splits, prediction=prediction), tables)


def write_variants(network: Network, folder: Path, unet: Path, variants: Sequence[Variant] = VARIANTS) -> None:
    """The variants' graphs into `folder`, beside a copy of the U-Net's graph and data out of `unet`."""
    import torch
    from latentrelay.export.step_writer import write_predicted, write_step

    for path in unet.glob(f"{UNET}*"):
        shutil.copyfile(path, folder / path.name)
    plain = Plan.load(network.folder)
    inputs = network.inputs()
    latents = torch.from_numpy(inputs["latents"])
    for each in variants:
        if each.kind == "part":
            continue
        plan = plain
        if each.target is not None:
            plan = predicted_plan(plain, each.target, selects=each.selects, channels=latents.shape[1])
        write = write_step if each.kind == "full" else write_predicted
        write(plan, folder / each.file, latents, OPSET)
    _write_parts(predicted_plan(plain, "deep_feature", selects=True, channels=latents.shape[1]), folder, latents)


def _write_parts(plan: Plan, folder: Path, latents: Any) -> None:
    """The choice and the updates of both ladders as graphs of their own, on the deep feature's shapes."""
    import torch
    from latentrelay.export.onnx_graphs import export_onnx
    from latentrelay.export.predicted_step import LadderUpdate, Selection
    from latentrelay.export.step_writer import ladders_of

    class Updates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.update = LadderUpdate(plan)

        def forward(self, feature: Any, feature_ladder: Any, probe: Any, probe_ladder: Any, at: Any) -> Any:
            return self.update(feature, feature_ladder, at), self.update(probe, probe_ladder, at)

    kept = ladders_of(plan, folder / UNET, latents.shape[1:]).examples()
    given = {
        **kept,
        "feature": torch.zeros(kept["feature_ladder"].shape[1:]),
        "probe": torch.zeros(kept["probe_ladder"].shape[1:]),
        "at": torch.tensor(0),
    }
    parts = (
        (UPDATES, Updates(), ["feature", "feature_ladder", "probe", "probe_ladder", "at"], [f"next_{n}" for n in kept]),
        (SELECTION, Selection(plan), ["probe", "probe_ladder", "at"], ["index", "choices", "probe_error"]),
    )
    for part, module, inputs, outputs in parts:
        examples = [given[name] for name in inputs]
        export_onnx(module, examples, folder / part.file, inputs=inputs, outputs=outputs, opset=OPSET)


def write_shares(network: Network, folder: Path) -> None:
    """flop_shares.json: by target, FLOPs of a predicted step's network over those of a computed step, both branches.

    Convolutions and matrix products are counted (compress/flops.py); ladders, choice and solver hold none.
    """
    import torch
    from latentrelay.compress.flops import count_flops
    from latentrelay.export.staged_unet import ProbeUNet, ShallowUNet

    unet = load_unet(network)
    states = torch.empty(network.inputs()["encoder_hidden_states"].shape)
    sample = torch.empty(2, unet.config.in_channels, network.rows, network.columns)
    case = (sample, torch.tensor(0.0), states)
    width = unet.up_blocks[-1].resnets[-1].conv1.in_channels - unet.conv_in.out_channels
    deep = torch.empty(2, width, network.rows, network.columns)
    whole = count_flops(unet, *case)
    probe = count_flops(ProbeUNet(unet, PROBE), *case) / whole
    shares = {
        "predicted-deep-feature": count_flops(ShallowUNet(unet, PROBE), *case, deep) / whole,
        "predicted-deep-feature-fixed": count_flops(ShallowUNet(unet), *case, deep) / whole,
        "predicted-whole-output": 0.0,
        "predicted-whole-output-probe": probe,
    }
    document = {"step_flops": whole, "shares": shares}
    (folder / SHARES).write_text(json.dumps(document), encoding="utf-8")
