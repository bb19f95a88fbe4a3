"""The rectifier: planted affine errors come back, it aims at the recorded latents, and segments enter runs midway."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.compensation_gate import psnr_db
from latentrelay.compress.denoising_chain import guided
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.predicted_chain import Prediction, RunState, predicted_chain, rectified
from latentrelay.compress.rectifier import branch_rows, fit_rectifier
from latentrelay.compress.run_segments import segments

N, C, SPLIT, GUIDANCE = 9, 2, 2, 3.0
F, P = "full", "predicted"
MASK = (F, F, P, P, F, P, F)
K, B = np.array([0.15, -0.1]), np.array([0.05, -0.2])


def made(mask: Any = MASK, target: Any = "whole_output", orders: Any = (1,)) -> Prediction:
    update, candidates = ladder_rows(mask, SPLIT, N, LadderSpec(orders), np.arange(float(N)))
    return Prediction(SPLIT, mask, target, update, candidates)


def spoilt(noise_pred: Any) -> Any:
    """With an error that is exactly affine in the spoilt output: (1 - K) q - B is what it was."""
    return ((noise_pred + B[:, None, None]) / (1 - K)[:, None, None]).astype(np.float32)


def final_db(prediction: Prediction, runs: Any, staged: Any, table: Any) -> float:
    ends = [list(predicted_chain(staged, table, run.start, GUIDANCE, prediction))[-1].next_latents for run in runs]
    return float(np.mean([psnr_db(run.latents[-1], end) for run, end in zip(runs, ends, strict=True)]))


def test_segments_enter_a_run_where_the_split_is(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    recorded = list(staged_runs("runs", 4))
    found = segments(recorded, 2, staged_table(), GUIDANCE)
    assert len(found) == 4
    for run, segment in zip(recorded, found, strict=True):
        assert segment.start.split == 2
        assert np.array_equal(segment.after(N - 1), run.latents[-1])
        assert np.array_equal(segment.start.latents, run.latents[2 - run.split])
        steps = predicted_chain(staged, staged_table(), segment.start, GUIDANCE, made((F,) * 7))
        assert np.allclose(list(steps)[-1].next_latents, run.latents[-1], atol=1e-5)  # so its memory is right too
    assert len(segments(recorded, 0, staged_table(), GUIDANCE)) == 2  # those of step 2 never were at step 0
    with pytest.raises(PredictionError, match="no run begins"):
        segments(recorded[1:2], 1, staged_table(), GUIDANCE)


def test_a_planted_affine_error_of_computed_steps_is_found(
    make_staged: Any, staged_table: Any, staged_runs: Any
) -> None:
    class Spoilt(make_staged):  # type: ignore[misc]
        def _shallow(self, latents: Any, feature: Any) -> Any:
            return spoilt(super()._shallow(latents, feature))

    runs = segments(staged_runs("fit", 8), SPLIT, staged_table(), GUIDANCE)
    plain = made((F,) * 7)
    fitted = fit_rectifier(plain, runs, Spoilt(), staged_table(), GUIDANCE, steps="all", ridge=1e-9)
    found = fitted.prediction
    assert found.gain is not None
    assert np.nanmax(fitted.error_after) < 1e-3 * np.nanmax(fitted.error_before)
    assert not found.gain[:SPLIT].any()
    first = SPLIT  # before its rows are known the run is the recorded one, so the regression is the planted error alone
    assert np.allclose(found.gain[first], K, atol=0.02)
    assert np.allclose(found.offset[first], B, atol=0.02)  # type: ignore[index]
    assert np.abs(found.mixing[first]).max() < 0.03  # type: ignore[index]
    others = segments(staged_runs("others", 4, seed=50), SPLIT, staged_table(), GUIDANCE)
    gain = final_db(found, others, Spoilt(), staged_table()) - final_db(plain, others, Spoilt(), staged_table())
    assert gain > 20.0


def test_rows_at_predicted_steps_only(make_staged: Any, staged_table: Any, staged_runs: Any) -> None:
    class SpoiltShallow(make_staged):  # type: ignore[misc]
        def shallow(self, latents: Any, step: int, prompt_embeds: Any, feature: Any) -> Any:
            return spoilt(self.full(latents, step, prompt_embeds).noise_pred)  # right but for the planted error

    runs = segments(staged_runs("fit", 8), SPLIT, staged_table(), GUIDANCE)
    plain = made(target="deep_feature", orders=(0,))
    found = fit_rectifier(plain, runs, SpoiltShallow(), staged_table(), GUIDANCE, ridge=1e-9).prediction
    changed = np.flatnonzero(found.gain.any(axis=(1, 2)))  # type: ignore[union-attr]
    assert changed.tolist() == [SPLIT + i for i, kind in enumerate(MASK) if kind == P]
    assert np.allclose(found.gain[SPLIT + 2], K, atol=0.03)  # type: ignore[index]
    assert plain.gain is None
    assert not found.mixing[:, :, 3:].any()  # type: ignore[index]  # differences are for the whole output


@pytest.mark.parametrize("steps", ["predicted", "all"])
def test_held_out_runs_come_nearer_to_the_recorded_ones(
    staged: Any, staged_table: Any, staged_runs: Any, steps: Any
) -> None:
    runs = segments(staged_runs("fit", 12), SPLIT, staged_table(), GUIDANCE)
    others = segments(staged_runs("others", 6, seed=50), SPLIT, staged_table(), GUIDANCE)
    plain = made()
    found = fit_rectifier(plain, runs, staged, staged_table(), GUIDANCE, steps=steps)
    again = fit_rectifier(found.prediction, runs, staged, staged_table(), GUIDANCE, steps=steps)
    assert np.array_equal(found.prediction.mixing, again.prediction.mixing)  # type: ignore[arg-type]
    assert final_db(found.prediction, others, staged, staged_table()) > 3 + final_db(
        plain, others, staged, staged_table()
    )
    computed = [SPLIT + i for i, kind in enumerate(MASK) if kind == F]
    assert not found.prediction.mixing[computed, :, 3:].any()  # type: ignore[index]


def test_rows_of_the_branches_are_the_guided_regression_at_the_scale() -> None:
    """What the two branches lose, guided, is what the regression asked for; at another scale the direction's part
    grows with it."""
    rng = np.random.default_rng(0)
    coefficients = 0.2 * rng.standard_normal((9, C))
    gain, offset, mixing = branch_rows(coefficients, GUIDANCE, 3)
    q, latents, memory = (rng.standard_normal((b, C, 6, 6)).astype(np.float32) for b in (2, 1, 1))
    ladder = rng.standard_normal((3, 2, C, 6, 6)).astype(np.float32)
    tables = [np.zeros((N, *table.shape)) for table in (gain, offset, mixing)]
    for table, row in zip(tables, (gain, offset, mixing), strict=True):
        table[4] = row
    prediction = dataclasses.replace(made(orders=(2,)), gain=tables[0], offset=tables[1], mixing=tables[2])
    out = rectified(prediction, q, 4, RunState(latents, memory, ladder))
    d = q[1] - q[0]
    columns = np.stack(
        [q[0], d, latents[0], memory[0], np.ones_like(d)]
        + [each for rung in (1, 2) for each in (ladder[rung, 0], ladder[rung, 1] - ladder[rung, 0])]
    )
    for scale in (GUIDANCE, 7.0):
        weights = coefficients.copy()
        weights[[1, 6, 8]] *= scale / GUIDANCE
        lost = np.einsum("rc,rchw->chw", weights, columns)
        assert np.allclose(guided(q, scale)[0] - guided(out, scale)[0], lost, atol=1e-4)


def test_an_adjusted_grid_and_no_runs_are_refused(staged: Any, staged_table: Any, staged_runs: Any) -> None:
    runs = segments(staged_runs("fit", 2), SPLIT, staged_table(), GUIDANCE)
    with pytest.raises(PredictionError, match="adjusted grid"):
        fit_rectifier(dataclasses.replace(made(), grid=staged_table()), runs, staged, staged_table(), GUIDANCE)
    with pytest.raises(PredictionError, match="no runs"):
        fit_rectifier(made(), (), staged, staged_table(), GUIDANCE)
