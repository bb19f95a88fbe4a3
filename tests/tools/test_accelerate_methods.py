"""Accelerated runs on a tiny bundle: cuts compose, methods that must agree agree bit for bit, costs add up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from latentrelay.compress.denoising_chain import Start, chain, final_latents
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.prediction import Prediction
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.step_schedule import uniform_mask
from latentrelay.export.errors import CutError
from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import accelerate_rivals as rivals
from latentrelay.tools.accelerate_calibration import (
    FittedThreshold,
    Seen,
    block_threshold,
    output_threshold,
    tea_threshold,
)
from latentrelay.tools.accelerate_grids import evenly, kept_steps, natural_steps
from latentrelay.tools.accelerate_methods import Lab, Predicted, computed_steps, device_ms, plain
from latentrelay.tools.accelerate_networks import BRANCH, Networks
from latentrelay.tools.accelerate_rivals import _Interval

SPLIT, GUIDANCE = 2, 4.0


@pytest.fixture(scope="module")
def lab(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    networks = Networks(Bundle.open(tiny_bundle), tmp_path_factory.mktemp("cuts"), 1)
    return Lab(networks, networks.plan.recipe.solver_table, SPLIT, GUIDANCE, None)


@pytest.fixture(scope="module")
def start(lab: Lab) -> Start:
    rng, latent = np.random.default_rng(0), lab.networks.bundle.manifest.latent
    shape = (1, latent.channels, latent.height, latent.width)
    tokens, width = lab.networks.bundle.manifest.components["text_encoder"].outputs[0].shape[1:]
    latents, memory = rng.standard_normal((2, *shape)).astype(np.float32)
    return Start(SPLIT, latents, memory, rng.standard_normal((2, int(tokens), int(width))).astype(np.float32))


def predicted(lab: Lab, computed: int, target: str, orders: tuple[int, ...]) -> Predicted:
    mask, spec = uniform_mask(SPLIT, lab.num_steps, computed), LadderSpec(orders)
    update, rows = ladder_rows(mask, SPLIT, lab.num_steps, spec, np.arange(lab.num_steps, dtype=float))
    metric = "l2" if rows.shape[1] > 1 else None
    prediction = Prediction(SPLIT, mask, target, update, rows, metric)  # type: ignore[arg-type]
    return Predicted("ours", {}, lab, prediction)


def test_the_cuts_compose(lab: Lab, start: Start) -> None:
    call = lab.networks.run
    at = (start.latents, 500.0, start.prompt_embeds)
    whole = call("full", *at)["noise_pred"]
    for kind, rest in (("full_deep", "shallow"), ("full_blocks", "head"), ("full_modules", "modules")):
        found = call(kind, *at)
        np.testing.assert_allclose(found["noise_pred"], whole, atol=1e-6)
        np.testing.assert_allclose(call(rest, *at, found)["noise_pred"], whole, atol=1e-6)
    first = call("first", *at)
    np.testing.assert_array_equal(first["probe"], call("probe", *at)["probe"])
    np.testing.assert_array_equal(call("block", *at)["first_in"], first["first_in"])


def test_every_kind_of_call_is_timed(lab: Lab) -> None:
    costs = lab.networks.costs(("full", "shallow", "none"), (16, 16))
    assert set(costs) == {"tail", "full", "shallow"}
    assert all(each["median_ms"] > 0.0 for each in costs.values())


def test_all_steps_are_the_plain_chain(lab: Lab, start: Start) -> None:
    ran = plain(lab).run(start)
    expected = final_latents(chain(lab.on(lab.table), lab.table, start, GUIDANCE), start)
    np.testing.assert_array_equal(ran.latents, expected)
    assert ran.kinds == ("full",) * (lab.num_steps - SPLIT)


def test_order_0_is_deep_cache_bit_for_bit(lab: Lab, start: Start) -> None:
    count = lab.num_steps - SPLIT
    interval = count - 1  # computed at the first step and the last, as the mask with two
    ours, theirs = predicted(lab, 2, "deep_feature", (0,)).run(start), rivals.deep_cache(lab, interval).run(start)
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    assert ours.kinds == theirs.kinds == ("full_deep", *("shallow",) * (count - 2), "full_deep")


def test_what_a_method_calls(lab: Lab, start: Start) -> None:
    inner = lab.num_steps - SPLIT - 2
    for target, orders, computed, between in (
        ("whole_output", (1,), "full", "none"),
        ("whole_output", (0, 1), "full_deep", "probe"),
        ("deep_feature", (1,), "full_deep", "shallow"),
        ("deep_feature", (0, 1), "full_deep", "shallow_probe"),
    ):
        method = predicted(lab, 3, target, orders)
        kinds = method.run(start).kinds
        assert (kinds.count(computed), kinds.count(between)) == (3, inner - 1)


def test_an_interval_of_one_computes_everything(lab: Lab, start: Start) -> None:
    expected = plain(lab).run(start).latents
    for method in (rivals.deep_cache(lab, 1), rivals.fora(lab, 1), rivals.taylor_seer(lab, "whole_output", 1, 2)):
        np.testing.assert_allclose(method.run(start).latents, expected, rtol=1e-5, atol=1e-5)


@dataclass
class Ramp:
    """A step of a network whose output is a polynomial of the position; it counts its calls."""

    position: int
    power: int
    count: int = 9
    calls: int = 0

    def call(self, kind: str, values: object = None) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"noise_pred": np.full((2, 1, 1, 1), float(self.position**self.power), np.float32)}


def test_taylor_seer_extrapolates_over_the_gap() -> None:
    def errors(order: int, power: int) -> list[float]:
        rule = _Interval("whole_output", ("noise_pred",), 3, order, 3)
        steps = [Ramp(position, power) for position in range(9)]
        found = [float(rule(step)[0, 0, 0, 0]) - step.position**power for step in steps]  # type: ignore[arg-type]
        assert [step.calls for step in steps] == [1, 1, 1, 0, 0, 1, 0, 0, 1]
        return found

    assert errors(1, 1) == [0.0] * 9
    assert errors(0, 1) == [0, 0, 0, -1, -2, 0, -1, -2, 0]
    # From 0, 1, 4 by the published rule: 4 + 3 u + u^2 2 / 2 at u = 1, 2, against 9, 16.
    assert errors(2, 2)[3:5] == [4 + 3 + 1 - 9, 4 + 6 + 4 - 16]


def test_a_threshold_of_zero_computes_everything(lab: Lab, start: Start) -> None:
    nothing, expected = FittedThreshold(0.0, 99), plain(lab).run(start)
    for rule in (rivals.tea_cache, rivals.first_block_cache, rivals.output_cache):
        ran = rule(lab, nothing).run(start)
        np.testing.assert_allclose(ran.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert computed_steps(ran.kinds) == len(expected.kinds)


def test_an_infinite_threshold_computes_the_edges(lab: Lab, start: Start) -> None:
    everything = FittedThreshold(1e9, 2)
    count = lab.num_steps - SPLIT
    assert computed_steps(rivals.tea_cache(lab, everything).run(start).kinds) == 2
    assert rivals.tea_cache(lab, everything).run(start).kinds[1:-1] == ("first+head",) * (count - 2)
    assert rivals.first_block_cache(lab, everything).run(start).kinds[1:-1] == ("block+head",) * (count - 2)
    assert computed_steps(rivals.output_cache(lab, everything).run(start).kinds) == min(3, count)  # a rate needs two


def test_runs_do_not_leak_into_each_other(lab: Lab, start: Start) -> None:
    methods = [
        rivals.deep_cache(lab, 2),
        rivals.taylor_seer(lab, "deep_feature", 2, 1),
        rivals.output_cache(lab, FittedThreshold(0.5, 3)),
        rivals.random_choice(lab, predicted(lab, 3, "deep_feature", (0, 1)).prediction, {}),
    ]
    for method in methods:
        np.testing.assert_array_equal(method.run(start).latents, method.run(start).latents)


def test_a_graph_of_two_branches_has_no_conditional_call(lab: Lab) -> None:
    assert BRANCH not in lab.networks.kinds  # a profile with static shapes


def test_fewer_steps_of_all_steps_is_the_run_itself(tiny_pipeline: object, lab: Lab, start: Start) -> None:
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(tiny_pipeline.scheduler.config)  # type: ignore[attr-defined]
    table = solver_table(scheduler, 8)
    kept = kept_steps(scheduler, 8, 3, range(3, 8))
    assert kept.rows == table.rows[3:]
    assert kept.timesteps == table.timesteps[3:]
    fewer = natural_steps(scheduler, 8, 3, 4)
    assert fewer.timesteps[0] == table.timesteps[3]
    assert len(fewer.rows) == 4
    assert all(row.b != 0.0 for row in fewer.rows)


def test_steps_are_kept_evenly() -> None:
    assert evenly(8, 25, 5) == (8, 12, 16, 20, 24)
    assert evenly(0, 3, 3) == (0, 1, 2)
    with pytest.raises(RequestError, match="cannot be kept"):
        evenly(8, 25, 18)


def test_device_time_by_hand() -> None:
    costs = {"full": 10.0, "first": 1.0, "head": 0.5, "tail": 0.25}
    kinds = ("full", "first+head", "none", "full")
    assert device_ms(kinds, costs) == pytest.approx(10 + 1.5 + 0 + 10 + 4 * 0.25)
    assert computed_steps(kinds) == 2


def test_thresholds_are_fitted_for_a_number_of_steps() -> None:
    steps = np.arange(9, dtype=np.float32)
    ramp = steps[:, None] * np.ones((1, 4), np.float32)  # the signal moves by 1 a step
    moved = np.array([0.0, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.04, 0.03])
    seen = [Seen(moved, 2 * moved, 1.0 + ramp, ramp, np.stack([ramp + 5, ramp + 5], 1))]
    tea = tea_threshold(seen, 4)
    assert tea.mapped(0.2) == pytest.approx(0.4)
    assert 0.6 < tea.threshold <= 1.0  # 0.6, 0.5: after two steps; 0.4, 0.3; and the last step
    for fitted in (tea_threshold(seen, 5), block_threshold(seen, 4), output_threshold(seen, 5)):
        assert 0.0 < fitted.threshold < np.inf


def test_a_network_without_the_places_is_refused(lab: Lab) -> None:
    with pytest.raises((CutError, KeyError)):
        lab.networks.run("no such cut", np.zeros((1, 4, 8, 8), np.float32), 1.0, np.zeros((2, 16, 16), np.float32))
