"""Compensation inside the step graph: the graph is its tables, zeros change nothing, and no tables leave no node."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from latentrelay.compress.plan import Plan, Tables
from latentrelay.export.parity import open_session, snr_db, step_in_numpy
from latentrelay.export.step_writer import write_step

LATENTS = torch.zeros(2, 4, 8, 8)


class Session:
    """The bundle's own U-Net as a denoiser."""

    def __init__(self, unet: Path, plan: Plan) -> None:
        self._session, self._plan = open_session(unet), plan

    def __call__(self, latents: Any, step: int, prompt_embeds: Any) -> Any:
        timestep = np.array(self._plan.recipe.timesteps[step], np.float32)
        sample = np.concatenate([latents * np.float32(self._plan.recipe.solver[step].s)] * 2)
        feeds = {"sample": sample, "timestep": timestep, "encoder_hidden_states": prompt_embeds}
        return self._session.run(["out_sample"], feeds)[0]


@pytest.fixture
def unet(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle's U-Net folder."""
    folder = tmp_path / "unet"
    shutil.copytree(tiny_bundle / "unet", folder)
    return folder


def compensated(plan: Plan, gain: Any, offset: Any) -> Plan:
    return replace(plan, tables=Tables(plan.tables.guidance_multiplier, gain, offset))


def feeds(plan: Plan, session: Any, step: int) -> dict[str, Any]:
    """Random inputs of a step graph, by its own signature."""
    generator = np.random.default_rng(step)
    made: dict[str, Any] = {"step": np.array(step, np.int64), "guidance": np.array(3.5, np.float32)}
    for port in session.get_inputs():
        if port.name not in made:
            made[port.name] = generator.standard_normal(port.shape).astype(np.float32)
    return made


def test_the_graph_is_the_tables_in_numpy(unet: Path, tiny_bundle: Path) -> None:
    plan = Plan.load(tiny_bundle)
    generator = np.random.default_rng(0)
    shape = (plan.recipe.num_steps, 2, 4)
    plan = compensated(plan, 0.3 * generator.standard_normal(shape), 0.5 * generator.standard_normal(shape))
    write_step(plan, unet / "step_full.onnx", LATENTS, 20)
    session, denoiser = open_session(unet / "step_full.onnx"), Session(unet / "model.onnx", plan)
    plain = Plan.load(tiny_bundle)
    for step in range(plan.recipe.num_steps):
        inputs = feeds(plan, session, step)
        got = dict(zip([port.name for port in session.get_outputs()], session.run(None, inputs), strict=True))
        expected, without = (step_in_numpy(each, inputs, denoiser) for each in (plan, plain))
        for name, array in expected.items():
            assert snr_db(array, got[name]) > 100
            assert snr_db(without[name], got[name]) < 40  # so the tables are what was compared


def test_tables_of_zeros_are_bit_identical_and_no_tables_leave_no_node(unet: Path, tiny_bundle: Path) -> None:
    plan = Plan.load(tiny_bundle)
    zeros = np.zeros((plan.recipe.num_steps, 2, 4))
    write_step(plan, unet / "without.onnx", LATENTS, 20)
    write_step(compensated(plan, zeros, zeros), unet / "zeros.onnx", LATENTS, 20)
    without, with_zeros = (open_session(unet / f"{name}.onnx") for name in ("without", "zeros"))
    for step in range(plan.recipe.num_steps):
        inputs = feeds(plan, without, step)
        for mine, theirs in zip(without.run(None, inputs), with_zeros.run(None, inputs), strict=True):
            assert mine.tobytes() == theirs.tobytes()
    nodes = [
        len(onnx.load(unet / f"{name}.onnx", load_external_data=False).graph.node) for name in ("without", "zeros")
    ]
    shipped = onnx.load(tiny_bundle / "unet" / "step_full.onnx", load_external_data=False).graph.node
    assert nodes[0] == len(shipped) < nodes[1]
