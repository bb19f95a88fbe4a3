"""The planner: budgets by hand, only what helps held-out runs ships, and the plan that comes out is a valid one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.compensation_gate import Score
from latentrelay.compress.denoising_chain import Start, chain
from latentrelay.compress.errors import PredictionError, TrajectoryError
from latentrelay.compress.ladders import LadderSpec
from latentrelay.compress.plan import Plan, PlanSource, full_plan
from latentrelay.compress.plan_prediction import with_masks
from latentrelay.compress.predicted_chain import Prediction, predicted_chain
from latentrelay.compress.prediction_candidates import Bench, Candidate, StepCosts, uniform
from latentrelay.compress.prediction_gate import PredictionOutcome, _for_split, _ranked, plan_prediction
from latentrelay.compress.prediction_levels import hot_level
from latentrelay.compress.prediction_masks import mask_policies
from latentrelay.compress.prediction_search import Search
from latentrelay.compress.run_segments import segments
from latentrelay.compress.trajectory import Trajectories

N, C, SPLIT, GUIDANCE = 9, 2, 2, 3.0
COSTS = StepCosts(full_ms=10.0, deep_ms=2.0, whole_ms=0.1, choice_ms=0.5)
EXPECTED_PARTS = {"order above 0", "mask policy", "choice per token", "rectifier"}


@pytest.mark.parametrize(
    ("target", "steps", "speedup", "selects", "computed"),
    [
        ("whole_output", 17, 2.0, False, 8),  # 8 full + 9 of 0.1 = 80.9 of 85 ms
        ("deep_feature", 17, 2.0, False, 6),  # 6 full + 11 of 2 = 82 of 85
        ("deep_feature", 17, 2.0, True, 5),  # 5 full + 12 of 2.5 = 80; 6 would take 87.5
        ("deep_feature", 17, 5.0, False, None),  # predicting them all takes as long as there is
        ("whole_output", 17, 1.01, False, 16),
        ("whole_output", 3, 2.0, False, None),  # 1 computed step is none too many
    ],
)
def test_the_computed_steps_that_a_time_allows(
    target: Any, steps: int, speedup: float, selects: bool, computed: Any
) -> None:
    assert COSTS.computed_steps(target, steps, speedup, selects) == computed
    if computed is not None:
        mask = ("full",) * computed + ("predicted",) * (steps - computed)
        assert COSTS.run_ms(mask, target, selects) <= steps * 10.0 / speedup + 1e-9


def test_a_predicted_step_that_costs_a_computed_one_is_no_bargain() -> None:
    assert StepCosts(1.0, 1.0, 0.1).computed_steps("deep_feature", 17, 2.0) is None


@pytest.fixture
def outcome(staged: Any, staged_table: Any, staged_runs: Any) -> PredictionOutcome:
    fit, held = staged_runs("fit", 16), staged_runs("held", 12, seed=90)
    return plan_prediction(fit, held, staged, staged_table(), None, COSTS, (0, SPLIT), 1.5, "v_prediction", probe="P1")


def test_what_ships_is_at_the_time_asked_for_and_the_best_of_what_was_tried(outcome: PredictionOutcome) -> None:
    report = outcome.report
    assert report["decided_at_split"] == SPLIT
    assert report["chosen"] in [row["name"] for row in report["candidates"]]
    for row in report["candidates"]:
        assert row["device_ms"] <= 7 * 10.0 / 1.5 + 1e-9
        assert row["mask"][0] == "F"
        assert len(row["mask"]) == 7
    best = {row["name"]: row["psnr_db"] for row in report["candidates"]}
    assert best[report["chosen"]] >= max(
        best[f"{target} uniform order 0"] for target in ("whole_output", "deep_feature")
    )
    assert report["chosen"] in outcome.why
    assert report["all_computed_psnr_db"] == 200.0  # the float network itself
    assert {name.split(": ")[1] for name in (each.name for each in outcome.evidence)} >= EXPECTED_PARTS
    assert any(each.verdict == "kept" for each in outcome.evidence)
    extended = {row["name"]: row for row in report["candidates"] if row["extends"]}
    for row in extended.values():
        assert row["gain_db"][1] <= row["gain_db"][0] <= row["gain_db"][2]
        assert row["extends"] in best


def test_the_outcome_makes_a_valid_plan_that_runs_alike(
    outcome: PredictionOutcome, staged: Any, staged_table: Any, staged_start: Any, tmp_path: Path
) -> None:
    plain = full_plan(PlanSource("m", "sha256:a", "sd1"), {}, "dpmsolver++", "DPMSolver", "sha256:c", staged_table())
    recipe = dataclasses.replace(
        plain.recipe,
        prediction=outcome.recipe(),
        splits=with_masks(plain.recipe.splits, outcome.masks()),
        corrections=outcome.evidence,
    )
    tables = dataclasses.replace(plain.tables, **outcome.tables())
    dataclasses.replace(plain, recipe=recipe, tables=tables).save(tmp_path)
    plan = Plan.load(tmp_path)
    for (split, level), fitted in outcome.predictions.items():
        prediction = Prediction.of_plan(plan, split, level)
        assert prediction is not None
        assert prediction.mask == fitted.mask
        ends = [
            list(predicted_chain(staged, staged_table(), staged_start(split), GUIDANCE, each))[-1].next_latents
            for each in (prediction, fitted)
        ]
        assert ends[0].tobytes() == ends[1].tobytes()
    assert Prediction.of_plan(plan, 5) is None  # a split that nothing was planned for computes everything
    with pytest.raises(PredictionError, match="no such split"):
        Prediction.of_plan(plan, 40)


@pytest.fixture
def two_levels(staged: Any, staged_table: Any, staged_runs: Any) -> Callable[..., PredictionOutcome]:
    """The planner with and without a hot level, on the same runs."""
    fit, held = staged_runs("fit", 8), staged_runs("held", 6, seed=90)

    def planned(hot_speedup: float | None, splits: tuple[int, ...] = (0, SPLIT)) -> PredictionOutcome:
        return plan_prediction(
            fit, held, staged, staged_table(), None, COSTS, splits, 1.5, "v_prediction",
            targets=("whole_output",), probe=None, hot_speedup=hot_speedup, fallback_threshold=None,
        )  # fmt: skip

    return planned


def test_a_hot_level_adds_rows_after_the_normal_ones_and_changes_nothing_else(
    two_levels: Callable[..., PredictionOutcome],
) -> None:
    plain, both = two_levels(None), two_levels(3.0)
    assert list(both.rows.items()) == [((0, "normal"), 1), ((SPLIT, "normal"), 2), ((0, "hot"), 3), ((SPLIT, "hot"), 4)]
    assert both.recipe()["rows"] == {"0": 1, f"{SPLIT}": 2, "0 hot": 3, f"{SPLIT} hot": 4}
    tables, more = plain.tables(), both.tables()
    assert {len(each) for each in tables.values()} == {3}
    for name, each in more.items():
        assert len(each) == 5
        before = tables.get(name, np.zeros_like(each[:3]))  # a part that only the hot level has is zeros there
        assert each[:3].tobytes() == before.tobytes()
    report = dict(both.report)
    hot = report.pop("hot")
    assert {**report, "why": ""} == {**plain.report, "why": ""}
    assert both.why.startswith(plain.why + "; hot, 3 times faster: ")
    assert both.settings == plain.settings
    for split in (0, SPLIT):
        normal, hotter = both.predictions[split, "normal"], both.predictions[split, "hot"]
        assert (normal.level, hotter.level) == ("normal", "hot")
        assert 2 <= hotter.mask.count("full") < normal.mask.count("full")
        assert COSTS.run_ms(hotter.mask, "whole_output") <= len(hotter.mask) * 10.0 / 3.0
        line = hot["splits"][str(split)]
        assert line["computed_steps"] == hotter.mask.count("full")
        assert line["psnr_db"] < report["splits"][str(split)]["psnr_db"]
        assert line["psnr_db"] >= line["uniform_psnr_db"]  # gated at its own level
        assert normal.candidates.shape == hotter.candidates.shape


def test_a_hot_level_that_saves_no_step_or_has_no_room_is_left_out_and_said(
    two_levels: Callable[..., PredictionOutcome],
) -> None:
    same = two_levels(1.52, (SPLIT,))
    assert same.masks().keys() == {(SPLIT, "normal")}
    assert same.report["hot"]["left_out"][str(SPLIT)] == "computes 4 steps, and the normal run 4"
    assert f"none from split {SPLIT} (computes 4 steps" in same.why
    none = two_levels(20.0, (SPLIT,))
    assert none.masks().keys() == {(SPLIT, "normal")}
    assert "fewer than 2" in none.report["hot"]["left_out"][str(SPLIT)]
    with pytest.raises(PredictionError, match="hot"):
        two_levels(1.5)


def test_the_hot_level_searches_mask_and_rectifier_on_its_own(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("runs", 4)
    bench = _bench(staged, staged_table(), runs, runs)
    bench.policies = mask_policies(runs, staged, staged_table())
    best = Candidate("whole_output", LadderSpec((1,)), policy="dp", rectify=None)  # what ships at the normal level
    even, rectified = dataclasses.replace(best, policy="uniform"), dataclasses.replace(best, rectify="predicted")
    level, up, down = [0.0, 0, 0, 0], [2.0, 3, 2, 3], [-3.0, -2, -3, -2]
    usual = bench.prediction(best, SPLIT)
    assert usual is not None
    for gains, shipped in (
        ({even: level}, even),  # the mask that the normal level has gains nothing here
        ({even: level, best: [-1.0, 9, -1, 9]}, even),  # its mean is ahead, its interval is not
        ({even: level, best: up}, best),
        ({even: level, best: up, rectified: [6.0, 7, 6, 7]}, rectified),  # which the normal level does without
        ({even: level, dataclasses.replace(even, rectify="all"): up}, dataclasses.replace(even, rectify="all")),
    ):
        hotter = bench.at(3.0)
        assert (hotter.speedup, hotter._scores, hotter._made) == (3.0, {}, {})
        for policy in ("uniform", "threshold", "dp"):
            for rectify in (None, "predicted", "all"):
                candidate = dataclasses.replace(best, policy=policy, rectify=rectify)  # type: ignore[arg-type]
                hotter._scores[candidate, SPLIT] = Score(40.0 + np.array(gains.get(candidate, down)))
        found = hot_level(hotter, best, [SPLIT], {(SPLIT, "normal"): usual}, None, lambda words: None)
        ours = hotter.prediction(shipped, SPLIT)
        assert ours is not None
        assert found.predictions[SPLIT, "hot"].mask == ours.mask
        assert (found.predictions[SPLIT, "hot"].gain is None) == (shipped.rectify is None)
        line = found.report["splits"][str(SPLIT)]
        assert line["chosen"] == shipped.name(None)
        assert line["chosen"] in [row["name"] for row in line["candidates"]]
        kept = {each.name: each.verdict for each in found.evidence}
        assert kept[f"prediction, whole_output: hot from split {SPLIT}, rectifier"] == (
            "kept" if shipped.rectify else "dropped"
        )


def test_a_rectifier_that_hurts_is_dropped(
    staged: Any, make_staged: Any, staged_table: Any, staged_runs: Any, tmp_path: Path
) -> None:
    """Fitted on another network's runs it takes the latents somewhere else; held-out runs say so."""
    others = make_staged(drift=1.6)

    def relabelled(runs: Trajectories) -> Any:
        found = []
        for run in runs:
            steps = list(chain(others, staged_table(), run.start, GUIDANCE))
            latents = np.stack([run.latents[0], *(step.next_latents for step in steps)])
            found.append(dataclasses.replace(run, latents=latents, noise_pred=np.stack([s.noise_pred for s in steps])))
        return found

    fit, held = relabelled(staged_runs("fit", 12)), staged_runs("held", 8, seed=90)
    bench = _bench(staged, staged_table(), fit, held)
    search = Search(bench, SPLIT, "P1", Candidate("whole_output", LadderSpec((1,))), lambda words: None)
    search.try_part("rectifier", lambda best: [dataclasses.replace(best, rectify="predicted")])
    without, with_it, _ = search.parts["rectifier"]
    assert with_it.over(without)[2] < 0.0
    assert search.best.rectify is None
    right = _bench(staged, staged_table(), staged_runs("fit", 12), held)  # fitted on its own runs it ships
    search = Search(right, SPLIT, "P1", Candidate("whole_output", LadderSpec((1,))), lambda words: None)
    search.try_part("rectifier", lambda best: [dataclasses.replace(best, rectify="predicted")])
    assert search.best.rectify == "predicted"


def test_a_gain_within_its_interval_does_not_ship(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("held", 4)
    search = Search(
        _bench(staged, staged_table(), runs, runs), SPLIT, None, Candidate("whole_output"), lambda words: None
    )
    better = Candidate("whole_output", LadderSpec((1,)))
    scores = {search.best: Score(np.array([40.0, 40, 40, 40])), better: Score(np.array([39.0, 45, 39, 45]))}
    search.bench._scores.update({(candidate, SPLIT): found for candidate, found in scores.items()})
    search.try_part("order above 0", lambda best: [better])
    assert search.best == Candidate("whole_output")
    assert search.rows[0]["gain_db"][0] == 2.0
    search.bench._scores[better, SPLIT] = Score(np.array([43.0, 44, 43, 44]))
    search.try_part("order above 0", lambda best: [better])
    assert search.best == better


def test_a_random_choice_is_a_control_and_never_ships(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("held", 4)
    search = Search(
        _bench(staged, staged_table(), runs, runs), SPLIT, "P1", Candidate("deep_feature"), lambda words: None
    )
    random = Candidate("deep_feature", LadderSpec((0, 1)), metric="random")
    search.bench._scores[search.best, SPLIT] = Score(np.array([40.0, 40, 40, 40]))
    search.bench._scores[random, SPLIT] = Score(np.array([60.0, 61, 60, 61]))
    search.try_part("choice per token", lambda best: [random])
    assert search.best == Candidate("deep_feature")
    assert search.rows[0]["psnr_db"] == 60.5


def test_of_level_targets_the_whole_output_ships(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("held", 4)
    bench = _bench(staged, staged_table(), runs, runs)
    whole, deep = (
        Search(bench, SPLIT, None, Candidate(target), lambda words: None) for target in ("whole_output", "deep_feature")
    )
    bench._scores[whole.best, SPLIT] = Score(np.array([40.0, 40, 40, 40]))
    for gains, first in (([-1.0, 3, -1, 3], whole), ([1.0, 1.2, 1, 1.2], deep), ([-2.0, -2, -2, -2], whole)):
        bench._scores[deep.best, SPLIT] = Score(40.0 + np.array(gains))
        assert _ranked(bench, [whole, deep], SPLIT)[0] is first


def test_each_split_takes_mask_and_correction_only_where_they_gain(
    staged: Any, staged_table: Any, staged_runs: Any
) -> None:
    runs = staged_runs("held", 4)
    bench = dataclasses.replace(
        _bench(staged, staged_table(), runs, runs), policies={"uniform": uniform, "dp": uniform}
    )
    best = Candidate("whole_output", LadderSpec((1,)), policy="dp", rectify="predicted")
    even = dataclasses.replace(best, policy="uniform", rectify=None)
    masked, both = dataclasses.replace(even, policy="dp"), best
    even_rectified = dataclasses.replace(even, rectify="predicted")

    def ships(gains: dict[Candidate, list[float]]) -> tuple[Prediction | None, dict[str, Any]]:
        for candidate in (even, masked, both, even_rectified):
            bench._scores[candidate, SPLIT] = Score(40.0 + np.array(gains.get(candidate, [-3.0, -2, -3, -2])))
        return _for_split(bench, best, SPLIT, lambda words: None)

    level, up = [0.0, 0, 0, 0], [2.0, 3, 2, 3]
    for gains, shipped, policy, corrected in (
        ({even: level, masked: [-1.0, 9, -1, 9]}, even, False, False),  # its mean is ahead, its interval is not
        ({even: level, masked: up}, masked, True, False),
        ({even: level, masked: up, both: [6.0, 7, 6, 7]}, both, True, True),
        ({even: level, even_rectified: up}, even_rectified, False, True),
    ):
        prediction, line = ships(gains)
        assert prediction is bench.prediction(shipped, SPLIT)
        assert (line["policy"], line["corrected"]) == (policy, corrected)


def test_a_split_without_room_is_left_out_and_said(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("runs", 4)
    found = plan_prediction(
        runs, runs, staged, staged_table(), None, COSTS, (SPLIT, N - 2), 1.5, "v_prediction",
        targets=("whole_output",), probe=None,
    )  # fmt: skip
    assert set(found.masks()) == {(SPLIT, "normal")}
    assert found.report["decided_at_split"] == SPLIT
    assert f"no room for predicted steps from split {N - 2}" in found.why


def test_a_candidate_that_runs_away_is_worst_and_stops_nothing(
    staged: Any, staged_table: Any, staged_runs: Any
) -> None:
    runs = staged_runs("held", 3)
    bench = _bench(staged, staged_table(), runs, runs)
    prediction = bench.prediction(Candidate("whole_output"), SPLIT)
    assert prediction is not None
    whole = staged.full
    staged.full = lambda latents, step, embeds: dataclasses.replace(
        whole(latents, step, embeds), noise_pred=np.full((2, *latents.shape[1:]), np.nan, np.float32)
    )
    assert (bench.measured(prediction).psnr_db == -999.0).all()


def test_no_room_predicts_nothing_and_says_so(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("runs", 2)
    found = plan_prediction(runs, runs, staged, staged_table(), None, COSTS, (SPLIT,), 50.0, "v_prediction")
    assert (found.recipe(), found.masks(), found.tables(), found.evidence) == ({}, {}, {}, ())
    assert "nothing is predicted" in found.why
    assert found.report["why"] == found.why


def test_one_target_and_no_probe(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = staged_runs("runs", 4)
    found = plan_prediction(
        runs, runs, staged, staged_table(), None, COSTS, (SPLIT,), 1.5, "v_prediction",
        targets=("whole_output",), probe=None, ladder_dtype="float16",
    )  # fmt: skip
    assert found.recipe()["target"] == "whole_output"
    assert found.recipe()["ladder_dtype"] == "float16"
    assert not [row for row in found.report["candidates"] if "tokens" in row["name"] or "deep" in row["name"]]
    assert staged.calls["probe"] == staged.calls["shallow"] == 0


def test_adjusted_grids_are_tried_where_a_scheduler_is_given(
    make_staged: Any, staged_start: Any, tmp_path: Path
) -> None:
    """On a real scheduler's rows, since the grid is read off it; the network is opened on the grid."""
    from diffusers import DDIMScheduler
    from latentrelay.compress.solver_tables import solver_table
    from latentrelay.compress.trajectory import CloudHandoff, Identity, record

    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    table, tables_seen = solver_table(scheduler, N), []

    class OnGrid(make_staged):  # type: ignore[misc]
        def on_grid(self, other: Any) -> Any:
            tables_seen.append(other)
            return self

    def cloud(prompt: str, seed: int, split: int) -> CloudHandoff:
        start: Start = staged_start(0, seed)
        return CloudHandoff(start.latents, None, start.prompt_embeds)

    identity = Identity("sha256:a", "sha256:b", "ddim", "sha256:c", N, GUIDANCE)
    runs = record(tmp_path / "runs", ["a", "b", "c"], [0, 1, 2], (0,), cloud, OnGrid(), table, identity)
    found = plan_prediction(
        runs, runs, OnGrid(), table, None, COSTS, (0,), 1.5, "v_prediction",
        targets=("whole_output",), probe=None, scheduler=scheduler,
    )  # fmt: skip
    names = [row["name"] for row in found.report["candidates"]]
    assert sum("adjusted grid" in name for name in names) >= 2
    assert any(seen.rows != table.rows for seen in tables_seen)
    grid = [each for each in found.evidence if each.name.endswith("adjusted grid")]
    assert len(grid) == 1


def test_policies_have_the_computed_steps_asked_for(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    policies = mask_policies(staged_runs("runs", 4), staged, staged_table())
    for name, policy in policies.items():
        for target in ("whole_output", "deep_feature"):
            mask = policy(target, SPLIT, N, 4)  # type: ignore[arg-type]
            assert mask[0] == mask[-1] == "full"
            assert len(mask) == 7
            assert mask.count("full") == 4 or (name == "threshold" and mask.count("full") < 4)


def test_recordings_of_different_models_and_splits_out_of_range_are_refused(
    staged: Any, staged_table: Any, staged_runs: Any
) -> None:
    runs = staged_runs("runs", 2)
    other = dataclasses.replace(runs, identity=dataclasses.replace(runs.identity, network="sha256:z"))
    with pytest.raises(TrajectoryError, match="another network"):
        plan_prediction(runs, other, staged, staged_table(), None, COSTS, (SPLIT,), 1.5, "v_prediction")
    with pytest.raises(PredictionError, match="splits"):
        plan_prediction(runs, runs, staged, staged_table(), None, COSTS, (N,), 1.5, "v_prediction")


def _bench(staged: Any, table: Any, fit: Any, held: Any) -> Bench:
    def by_split(runs: Any) -> Callable[[int], Any]:
        return lambda split: segments(runs, split, table, GUIDANCE)

    return Bench(
        staged, table, GUIDANCE, COSTS, 1.5, "v_prediction", by_split(fit), by_split(held), {"uniform": uniform}
    )
