"""The profile of predicted steps on a tiny bundle: what it writes, what it asks the network, what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.error_matrix import error_matrix
from latentrelay.compress.plan import Plan
from latentrelay.compress.solver_tables import solver_table
from latentrelay.compress.trajectory import Trajectories
from latentrelay.runtime import Bundle
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import prediction_profile
from latentrelay.tools.prediction_profile import _compact, profile, run
from latentrelay.tools.profiled_network import ProfiledNetwork, Reusing, as_v

SPLIT = 8


@pytest.fixture(scope="module")
def profiled(tiny_pipeline: Any, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The document of four runs, and where runs and graphs are."""
    out = tmp_path_factory.mktemp("profile")
    made = profile(
        [Bundle.open(tiny_bundle)],
        tiny_pipeline,
        ["a cat", "red", "the cat", ""],
        range(4),
        SPLIT,
        1,
        out,
        lambda w: None,
    )
    return made, out


def test_the_document_holds_both_segments(profiled: tuple[Any, Path]) -> None:
    (document, panels, bars), _ = profiled
    json.dumps(document, allow_nan=False)
    edge, cloud = document["networks"]
    assert (edge["name"], edge["segment"], edge["steps"]) == ("fp32", "edge", [8, 24])
    assert (cloud["name"], cloud["segment"], cloud["steps"]) == ("teacher", "cloud", [0, 7])
    assert document["prediction_type"] == "epsilon"
    for row, n in ((edge, 17), (cloud, 8)):
        for target in ("deep_feature", "whole_output"):
            values = np.array(row["matrices"][target]["values"], dtype=float)
            first, last = row["steps"]
            inside = values[first : last + 1, first : last + 1]
            assert np.isfinite(inside[np.triu_indices(n, 1)]).all()
        for each in row["schedules"]:
            assert (each["steps"][0], each["steps"][-1]) == (first, last)
            assert len(each["steps"]) == each["computed"]
    assert not np.isfinite(np.array(cloud["matrices"]["deep_feature"]["values"], dtype=float)[8:, 8:]).any()
    kinds = {(each["target"], each["probe"], each["metric"], each["horizon"]) for each in edge["fidelity"]}
    assert len(kinds) == 2 * 4 * 2 * 2
    assert [panel.first for panel in panels] == [8, 8, 0]
    assert len(bars["fp32"]) == 8


def test_the_matrix_of_the_deep_feature_is_the_deployed_graphs(profiled: tuple[Any, Path], tiny_bundle: Path) -> None:
    """Asked once more, along the recorded runs: the same numbers; and the output is the U-Net's own."""
    (document, _, _), out = profiled
    bundle = Bundle.open(tiny_bundle)
    solver = Plan.load(bundle.path).recipe.solver_table
    network = ProfiledNetwork.of(bundle, solver, out / "again", 1)
    runs = Trajectories.open(out / "runs", recorded_identity(out))
    again = error_matrix(((each.split, network.along(each)["deep_feature"]) for each in runs), 25)
    written = document["networks"][0]["matrices"]["deep_feature"]["values"]
    assert written[8][9] == pytest.approx(again.values[8, 9], rel=1e-3)
    first = next(iter(runs))
    assert np.array_equal(network.along(first)["out_sample"], first.noise_pred)
    assert {each.split for each in runs} == {0, SPLIT}


def recorded_identity(out: Path) -> Any:
    from latentrelay.compress.trajectory import IDENTITY_JSON, Identity

    document = json.loads((out / "runs" / IDENTITY_JSON).read_text())
    document.pop("schema_version")
    return Identity(**document)


class Counted:
    """A network whose output says at which step it was asked."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __call__(self, latents: Any, step: int, prompt_embeds: Any) -> Any:
        self.steps.append(step)
        return np.full((2, 1, 1, 1), step, np.float32)


def test_every_third_step_is_computed_and_a_run_begins_anew() -> None:
    counted = Counted()
    reusing = Reusing(counted)  # type: ignore[arg-type]
    given = [float(reusing(None, step, None).mean()) for step in (0, 1, 2, 3, 4, 2, 3, 4, 5)]  # type: ignore[arg-type]
    assert given == [0, 0, 0, 3, 3, 2, 2, 2, 5]
    assert counted.steps == [0, 3, 2, 5]


def test_epsilon_is_profiled_as_v(tiny: Any) -> None:
    scheduler = tiny.SCHEDULERS["ddim"](beta_schedule="scaled_linear", clip_sample=False, prediction_type="epsilon")
    solver = solver_table(scheduler, 5)
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 3, 1, 2, 2, 2))
    alphas = scheduler.alphas_cumprod[[int(t) for t in solver.timesteps]].double().numpy()[2:].reshape(3, 1, 1, 1, 1)
    latents = np.sqrt(alphas) * x0 + np.sqrt(1 - alphas) * eps
    found = as_v(np.repeat(eps, 2, axis=1), latents, 2, solver, "epsilon")
    np.testing.assert_allclose(found[:, :1], np.sqrt(alphas) * eps - np.sqrt(1 - alphas) * x0, atol=1e-4)
    same = np.repeat(eps, 2, axis=1)
    assert as_v(same, latents, 2, solver, "v_prediction") is same


def test_lists_of_numbers_stand_on_a_line_and_stay_what_they_are() -> None:
    document = {"a": [[1, 2.5, None], [-1e-07]], "words": ["x, y", "[ 1"], "none": [], "deep": [{"b": [3]}]}
    text = _compact(json.dumps(document, indent=1))
    assert json.loads(text) == document
    assert "[1, 2.5, null]" in text


def test_refused(tiny_pipeline: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="0 bundles"):
        run([], 4, 0, split=8, threads=1, output=tmp_path, as_json=True)
    with pytest.raises(RequestError, match="1 captions"):
        run([tiny_bundle], 1, 0, split=8, threads=1, output=tmp_path, as_json=True)
    for split in (0, 24):
        with pytest.raises(RequestError, match="split is out of range"):
            profile([Bundle.open(tiny_bundle)], tiny_pipeline, ["a"], [0], split, 1, tmp_path, lambda w: None)
    assert prediction_profile.FILES == ("prediction_profile.json", "error_matrix.png", "probe_fidelity.png")
