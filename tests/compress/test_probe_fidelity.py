"""Rank correlations against scipy's, planted probes that know everything or nothing, and the two plots."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.error_matrix import error_matrix
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.ladders import LadderSpec, ladder_rows, push
from latentrelay.compress.prediction_plot import MatrixPanel, plot_error_matrices, plot_probe_fidelity
from latentrelay.compress.probe_fidelity import Estimate, Fidelity, ProfiledRun, _spearman, probe_fidelity

F, P = "full", "predicted"
N, SPLIT = 9, 1
MASK = (F, F, P, P, F, P, P, F)
AXIS = np.arange(N, dtype=np.float64)
UPDATE, ROWS = ladder_rows(MASK, SPLIT, N, LadderSpec((0, 1, 2)), AXIS)


def stream(seed: int, channels: int = 6) -> np.ndarray:
    """(N, 2, C, 4, 4): tokens that stand still, go straight and turn."""
    rng = np.random.default_rng(seed)
    start, speed, bend = rng.standard_normal((3, 2, channels, 4, 4))
    kind = rng.integers(0, 3, (4, 4))
    t = np.arange(N).reshape(N, 1, 1, 1, 1) / 4
    return (start + t * speed * (kind > 0) + t * t * bend * (kind > 1) + 0.05 * rng.standard_normal(
        (N, 2, channels, 4, 4)
    )).astype(np.float32)  # fmt: skip


def runs(probe_of: Any, count: int = 3, first: int = 0) -> list[ProfiledRun]:
    made = [stream(seed) for seed in range(count)]
    return [ProfiledRun(first, each[first:], {"P": probe_of(each, i)[first:]}) for i, each in enumerate(made)]


def measured(made: list[ProfiledRun], metric: str = "l2") -> Fidelity:
    (found,) = probe_fidelity(iter(made), MASK, SPLIT, UPDATE, ROWS, ["P"], [metric])
    return found


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for width in (7, 50):  # ranked by comparing all pairs, and by sorting
        left, right = np.round(rng.standard_normal((2, 3, 2, width)), 1 if width > 7 else 0)  # with ties
        found = _spearman(left, right, axis=2)
        for i in range(3):
            for j in range(2):
                assert found[i, j] == pytest.approx(stats.spearmanr(left[i, j], right[i, j]).statistic)
    assert (_spearman(np.ones((1, 4)), np.arange(4.0)[None], axis=1) == 0.0).all()


def test_the_feature_as_its_own_probe_knows_everything() -> None:
    found = measured(runs(lambda feature, i: feature))
    assert found.across_tokens.mean == found.across_candidates.mean == pytest.approx(1.0)
    assert found.preferences.mean == pytest.approx(1.0)
    assert found.found_best.mean == 1.0
    assert found.chosen == found.oracle
    assert found.oracle.mean < found.best_fixed.mean < found.random.mean
    assert found.candidates == 3


def test_a_probe_of_something_else_knows_nothing_of_the_tokens() -> None:
    found = measured(runs(lambda feature, i: stream(100 + i), count=12))
    assert abs(found.across_tokens.mean) < 0.25
    assert abs(found.preferences.mean) < 0.25
    assert found.chosen.mean > found.best_fixed.mean


def test_errors_are_a_plain_loops() -> None:
    """One run: squares of the chosen rows over the feature's own, every ladder pushed by hand."""
    (run,) = runs(lambda feature, i: feature + 0.2 * stream(50), count=1, first=1)
    chosen = oracle = random = total = 0.0
    ladders = {"feature": np.zeros((3, 2, 6, 4, 4), np.float32), "probe": np.zeros((3, 2, 6, 4, 4), np.float32)}
    for step, kind in enumerate(MASK, start=SPLIT):
        now = {"feature": run.feature[step - 1], "probe": run.probes["P"][step - 1]}
        if kind == F:
            ladders = {name: push(ladder, now[name], UPDATE[step]) for name, ladder in ladders.items()}
            continue
        rows = np.unique(ROWS[step], axis=0)
        squares = {
            name: np.stack([np.square(np.tensordot(row, ladder.astype(float), 1) - now[name]).sum(1) for row in rows])
            for name, ladder in ladders.items()
        }
        pick = squares["probe"].argmin(0)
        chosen += np.take_along_axis(squares["feature"], pick[None], 0).sum()
        oracle += squares["feature"].min(0).sum()
        random += squares["feature"].mean(0).sum()
        total += np.square(now["feature"].astype(float)).sum()
    found = measured([run])
    assert found.chosen.mean == pytest.approx(chosen / total, rel=1e-9)
    assert found.oracle.mean == pytest.approx(oracle / total, rel=1e-9)
    assert found.random.mean == pytest.approx(random / total, rel=1e-9)
    assert math.isinf(found.chosen.high)
    assert found.to_json()["chosen"]["high"] is None


def test_cosine_does_not_see_scale() -> None:
    """A probe whose candidates differ by a factor only: cosine finds all of them equal, L2 tells them apart."""
    growing = np.arange(1.0, N + 1, dtype=np.float32).reshape(N, 1, 1, 1, 1)
    made = [ProfiledRun(0, stream(i), {"P": np.abs(stream(9 + i)[:1]) * growing}) for i in range(3)]
    squares, angles = (probe_fidelity(made, MASK, SPLIT, UPDATE, ROWS, ["P"], [m])[0] for m in ("l2", "cosine"))
    assert squares.chosen.mean != angles.chosen.mean


def test_one_candidate_has_nothing_to_choose() -> None:
    update, rows = ladder_rows(MASK, SPLIT, N, LadderSpec((1,)), AXIS)
    (found,) = probe_fidelity(runs(lambda feature, i: feature), MASK, SPLIT, update, rows, ["P"], ["l2"])
    assert found.candidates == 1
    assert math.isnan(found.across_candidates.mean)
    assert found.to_json()["preferences"] == {"mean": None, "low": None, "high": None}
    assert found.chosen == found.oracle == found.random
    assert found.best_fixed.mean == pytest.approx(found.chosen.mean)


def test_runs_that_begin_after_the_split_are_left_out() -> None:
    whole = runs(lambda feature, i: feature)
    late = ProfiledRun(2, whole[0].feature[2:], {"P": whole[0].probes["P"][2:]})
    assert measured([*whole, late]) == measured(whole)
    with pytest.raises(ScheduleError, match="no runs"):
        measured([late])


def test_a_probe_must_be_there_and_on_the_features_grid() -> None:
    made = runs(lambda feature, i: feature[..., :2])
    with pytest.raises(ScheduleError, match="probe P"):
        measured(made)
    with pytest.raises(ScheduleError, match="P7"):
        probe_fidelity(made, MASK, SPLIT, UPDATE, ROWS, ["P7"])


def test_estimate() -> None:
    found = Estimate.of([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.high - 2.0) == (2.0, pytest.approx(1.96 / math.sqrt(3)))
    assert math.isnan(Estimate.of([]).mean)


def test_plots_are_written_whole(tmp_path: Path) -> None:
    rows = probe_fidelity(runs(lambda feature, i: feature), MASK, SPLIT, UPDATE, ROWS, ["P"])
    plot_probe_fidelity({"fp32": rows, "w8a8": rows}, tmp_path / "plots" / "fidelity.png")
    matrix = error_matrix([(0, stream(0))], N, "deep")
    panels = [MatrixPanel("device", matrix, SPLIT, MASK), MatrixPanel("cloud", matrix, 0, (F, P, F))]
    plot_error_matrices(panels, tmp_path / "plots" / "matrix.png")
    for name in ("fidelity.png", "matrix.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "plots").iterdir())) == 2
