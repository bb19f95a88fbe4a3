"""Sensitivities with a known error, the choice under a budget by hand, the front, and its plot."""

import json
from dataclasses import replace

import numpy as np
import pytest
from latentrelay.compress.denoising_chain import guided
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.layer_sensitivity import (
    ForcedSample,
    LayerSensitivity,
    alone,
    final_error,
    forced_samples,
    layer_sensitivities,
    output_error,
)
from latentrelay.compress.precision import Layer, recipe_for
from latentrelay.compress.precision_plot import save_pareto
from latentrelay.compress.recipe_choice import (
    Budget,
    ParetoPoint,
    pareto_front,
    raised,
    spare,
    spare_worst,
    weight_bytes,
)
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import Trajectory

LAYERS = (
    Layer("conv_in", "conv", (8, 4, 3, 3), 500, "first"),
    Layer("a", "conv", (16, 8, 3, 3), 4000, "body"),
    Layer("b", "linear", (64, 64), 3000, "body"),
    Layer("c", "conv", (16, 16, 1, 1), 500, "body"),
)
RECIPE = recipe_for(LAYERS, "w4a8", "onnxruntime-x64")
NOISE = {"a": 0.1, "b": 0.3, "c": 0.2, "conv_in": 0.0}
RNG = np.random.default_rng(0)


def recorded(split: int = 0) -> Trajectory:
    """Four steps of x' = x - 0.5 e with e = 1 throughout, from x = 3."""
    latents = np.stack([np.full((1, 1, 2, 2), 3.0 - 0.5 * i, np.float32) for i in range(5)])
    noise_pred = np.ones((4, 2, 1, 2, 2), np.float32)
    return Trajectory("p", 0, split, np.zeros((2, 3, 4), np.float32), None, latents[split:], noise_pred[split:])


def deploy(recipe):
    """A network whose error is known: each quantised layer adds its own constant to both branches, by root of sums."""
    quantised = [name for name, rule in recipe.rules.items() if rule.weights != "float32"]
    energy = sum(NOISE[name] ** 2 for name in quantised)

    def denoiser(latents, step, prompt_embeds):
        return np.full((2, 1, 2, 2), 1.0 + np.sqrt(energy), np.float32)

    return denoiser


TABLE = SolverTable((SolverRow(1.0, -0.5, 0.0, 0.0, 1.0, -0.5, 1.0),) * 4, (9, 6, 3, 0), 1.0)
SAMPLES = forced_samples([recorded()], every=1)


def measure(denoiser):
    return output_error(denoiser, SAMPLES, 4.0)


def test_each_layer_alone_worst_first():
    seen = []
    found = layer_sensitivities(RECIPE, deploy, measure, progress=lambda done, every: seen.append((done, every)))
    assert [each.name for each in found] == ["b", "c", "a", "conv_in"]
    assert [each.error for each in found[:3]] == pytest.approx([0.09, 0.04, 0.01], rel=1e-5)
    assert found[2].snr_db == pytest.approx(20.0, abs=1e-4)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [n for n, rule in alone(RECIPE, ("b",)).rules.items() if rule.weights != "float32"] == ["b"]


def test_error_is_of_the_guided_prediction_and_steps_are_weighted():
    want = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
    wrong = want + RNG.standard_normal(want.shape).astype(np.float32)
    sample = ForcedSample(3, np.zeros((1, 3, 4, 4), np.float32), np.zeros((2, 1, 1), np.float32), want)
    energy = np.sum((guided(wrong, 2.0) - guided(want, 2.0)) ** 2) / np.sum(guided(want, 2.0) ** 2)
    assert output_error(lambda *_: wrong, [sample], 2.0) == pytest.approx(float(energy), rel=1e-5)
    other = replace(sample, step=4)
    mixed = output_error(lambda x, step, e: wrong if step == 3 else want, [sample, other], 2.0, {3: 3.0, 4: 1.0})
    assert mixed == pytest.approx(0.75 * float(energy), rel=1e-5)
    with pytest.raises(PrecisionError, match="needs samples"):
        output_error(deploy(RECIPE), [], 4.0)


def test_final_error_is_of_the_whole_run():
    found = layer_sensitivities(RECIPE, deploy, lambda denoiser: final_error(denoiser, [recorded()], TABLE, 4.0))
    # e is off by 0.3 at each of four steps of b = -0.5: 0.6 off at the end, where the latents are 1
    assert (found[0].name, found[0].error) == ("b", pytest.approx(0.36, rel=1e-5))
    half = final_error(deploy(RECIPE), [recorded(split=2)], TABLE, 4.0)
    assert half == pytest.approx(0.14 * (2 * 0.5) ** 2, rel=1e-5)
    with pytest.raises(PrecisionError, match="needs runs"):
        final_error(deploy(RECIPE), [], TABLE, 4.0)


def test_samples_reach_every_step():
    samples = forced_samples([recorded()] * 4, every=4)
    assert [sample.step for sample in samples] == [0, 1, 2, 3]


def test_choice_by_hand():
    found = layer_sensitivities(RECIPE, deploy, measure)
    # float share: conv_in's 500 of 8000 are spent by the recipe already, so 0.13 leaves 540: c fits, a does not.
    chosen = spare_worst(RECIPE, LAYERS, found, Budget(3000, 1.0, 0.13), ms_per_mac=1e-4)
    assert chosen.rules["b"].weights == "int8"  # 64*64/2 more bytes less nothing: stays integer
    assert chosen.rules["b"].activations == "dynamic"
    assert (chosen.rules["c"].weights, chosen.rules["c"].activations) == ("float32", "float32")
    assert chosen.rules["a"] == RECIPE.rules["a"]
    assert all(chosen.rules[name].reason for name in ("b", "c"))
    assert chosen.float_list.mac_share <= 0.13


@pytest.mark.parametrize(
    ("budget", "spared"),
    [
        (Budget(0, 1.0, 0.13), set()),
        (Budget(2047, 1.0, 0.13), {"c"}),
        (Budget(2048, 1.0, 0.0), {"b"}),
        (Budget(10_000, 0.04, 0.5), {"b"}),
        (Budget(100_000, 10.0, 1.0), {"a", "b", "c"}),
    ],
)
def test_each_part_of_the_budget_binds(budget, spared):
    found = [LayerSensitivity(name, NOISE[name] ** 2) for name in ("a", "b", "c")]
    chosen = spare_worst(RECIPE, LAYERS, found, budget, ms_per_mac=1e-4)
    assert {name for name in RECIPE.rules if chosen.rules[name] != RECIPE.rules[name]} == spared


def test_bytes_of_layers():
    rule = RECIPE.rules["b"]
    assert weight_bytes(LAYERS[2], rule) == 64 * 64 // 2 + 4 * 64 * 2
    assert weight_bytes(LAYERS[2], replace(rule, rank=4)) == 64 * 64 // 2 + 4 * 64 * 2 + 2 * 4 * 128
    assert weight_bytes(LAYERS[1], RECIPE.rules["a"]) == 16 * 72 + 4 * 16
    assert weight_bytes(LAYERS[1], raised(RECIPE.rules["a"])) == 4 * 16 * 72


def test_unknown_layer_is_refused():
    with pytest.raises(PrecisionError, match="unknown layer, got x"):
        spare_worst(RECIPE, LAYERS, [LayerSensitivity("x", 1.0)], Budget(1, 1.0))


def test_named_layers_are_spared():
    chosen = spare(RECIPE, ["a", "b"])
    assert (chosen.rules["a"].weights, chosen.rules["b"].weights) == ("float32", "int8")
    assert chosen.rules["c"] == RECIPE.rules["c"]
    with pytest.raises(PrecisionError, match="to spare is unknown, got x"):
        spare(RECIPE, ["x"])


def test_front_and_its_files(tmp_path):
    points = [
        ParetoPoint("plain", 0, 100, 5.0, 20.0),
        ParetoPoint("spared", 3, 120, 6.0, 24.0),
        ParetoPoint("bad", 4, 130, 6.0, 23.0),
    ]
    assert [point.name for point in pareto_front(points)] == ["plain", "spared"]
    save_pareto({"w4a8": points}, tmp_path, "pareto", {"machine": "here"})
    document = json.loads((tmp_path / "pareto.json").read_text())
    assert [row["on_front"] for row in document["families"]["w4a8"]] == [True, True, False]
    assert document["machine"] == "here"
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 2
