"""Error matrices by hand and against a five-line reference; runs that cover a part; the trap of reused epsilon."""

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from latentrelay.compress.denoising_chain import Start, chain, final_latents, solver_step
from latentrelay.compress.error_matrix import (
    ErrorMatrix,
    deep_features,
    error_matrix,
    recorded_outputs,
    velocity,
)
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.predicted_chain import WholeOutput
from latentrelay.compress.solver_tables import SolverTable, prepared, read_rows, solver_table
from latentrelay.compress.trajectory import Trajectory

RNG = np.random.default_rng(0)


def features(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 2, 3, 4, 4)).astype(np.float32)


def test_values_by_hand() -> None:
    run = np.array([[[1.0, 3.0]], [[2.0, 2.0]], [[4.0, -4.0]]])[:, :, None]  # (3, 1, 1, 2)
    found = error_matrix([(0, run)], 3, "v", branches=(0,))
    assert found.values[0, 1] == (1 + 1) / (2 + 2)
    assert found.values[0, 2] == (3 + 7) / 8
    assert found.values[1, 2] == (2 + 6) / 8
    assert np.array_equal(found.values.diagonal(), np.zeros(3))
    assert np.isnan(found.values[np.tril_indices(3, -1)]).all()
    assert np.array_equal(found.norms, [2.0, 2.0, 4.0])
    assert (found.name, found.runs) == ("v", 1)


def test_mean_over_runs_and_branches_is_a_plain_loop() -> None:
    runs = [(0, features(5, 1)), (0, features(5, 2)), (2, features(3, 3))]
    found = error_matrix(iter(runs), 5)
    for c in range(5):
        for i in range(c + 1, 5):
            quotients = [
                np.abs(f[c - first, branch].astype(np.float64) - f[i - first, branch]).sum()
                / np.abs(f[i - first, branch].astype(np.float64)).sum()
                for first, f in runs
                if first <= c
                for branch in (0, 1)
            ]
            assert found.values[c, i] == pytest.approx(np.mean(quotients), rel=1e-12)


def test_each_branch_has_its_own_quotient() -> None:
    run = np.stack([np.stack([np.full((1, 2, 2), 1.0), np.full((1, 2, 2), 100.0)]), np.full((2, 1, 2, 2), 2.0)])
    assert error_matrix([(0, run)], 2).values[0, 1] == ((1 / 2) + (98 / 2)) / 2
    assert error_matrix([(0, run)], 2, branches=(0,)).values[0, 1] == 1 / 2


def test_steps_that_no_run_covers_are_unknown() -> None:
    found = error_matrix([(2, features(2, 0))], 5)
    assert np.isfinite(found.values[2, 3])
    assert np.isnan([found.values[0, 1], found.values[1, 2], found.values[3, 4], found.norms[0]]).all()


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], "no runs"),
        ([(3, features(3, 0))], "3..6"),
        ([(0, np.full((2, 2, 1, 1, 1), np.nan, np.float32))], "NaN"),
        ([(0, np.zeros((2, 2, 1, 1, 1), np.float32))], "all zero"),
    ],
)
def test_refused(runs: list[tuple[int, np.ndarray]], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        error_matrix(runs, 5)


def test_a_file_gives_the_same_bits(tmp_path: Path) -> None:
    found = error_matrix([(1, features(3, 7))], 5, "deep")
    found.save(tmp_path / "e" / "deep.json")
    back = ErrorMatrix.load(tmp_path / "e" / "deep.json")
    assert (back.name, back.runs) == ("deep", 1)
    assert back.values.tobytes() == found.values.tobytes()
    assert back.norms.tobytes() == found.norms.tobytes()
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["deep.json"]
    assert found.to_json(2)["values"][1][2] == float(f"{found.values[1, 2]:.2g}")


@pytest.mark.parametrize("change", [{"schema_version": "9"}, {"norms": [1.0]}, {"values": "x"}, {"runs": None}])
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "e.json"
    path.write_text(json.dumps({**error_matrix([(0, features(3, 7))], 3).to_json(), **change}))
    with pytest.raises(ScheduleError):
        ErrorMatrix.load(path)
    with pytest.raises(ScheduleError):
        ErrorMatrix.load(tmp_path / "none.json")


def test_recorded_runs_and_a_staged_network_agree_where_the_feature_is_the_output() -> None:
    def network(latents: np.ndarray, step: int, prompt_embeds: np.ndarray) -> np.ndarray:
        return np.tanh(np.concatenate([latents, -latents]) * np.float32(1 + step))

    latents = RNG.standard_normal((4, 1, 2, 3, 3)).astype(np.float32)
    embeds = np.zeros((2, 1, 1), np.float32)
    outputs = np.stack([network(latents[i], 1 + i, embeds) for i in range(3)])
    run = Trajectory("a", 0, 1, embeds, None, latents, outputs)
    mine = error_matrix(recorded_outputs([run]), 4)
    asked = error_matrix(deep_features([run], WholeOutput(network)), 4)
    assert mine.values.tobytes() == asked.values.tobytes()


def ddim(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )


def on_kept_steps(kept: list[int], num_steps: int) -> SolverTable:
    """DDIM of the kept steps alone: a scheduler whose training schedule is their levels."""
    probe = prepared(ddim("epsilon"), num_steps)
    levels = probe.alphas_cumprod[probe.timesteps[kept]].flip(0)
    probe.final_alpha_cumprod = probe.final_alpha_cumprod.double()
    probe.alphas_cumprod, probe.num_inference_steps = levels, len(kept)
    probe.register_to_config(num_train_timesteps=len(kept))
    probe.timesteps = probe.timesteps.new_tensor(range(len(kept) - 1, -1, -1))
    return SolverTable(read_rows(probe), tuple(range(len(kept))), 1.0)


def test_reused_epsilon_under_ddim_is_a_run_on_the_computed_steps_alone() -> None:
    """Why v is profiled and reused: for epsilon a mask of such a run only picks timesteps."""
    table, kept = solver_table(ddim("epsilon"), 10), [0, 3, 5, 9]

    def network(latents: np.ndarray) -> np.ndarray:
        return np.tanh(0.7 * latents) - 0.2 * latents[:, ::-1]

    start = np.random.default_rng(3).standard_normal((1, 2, 3, 3))
    whole, held = start, start
    for step, row in enumerate(table.rows):
        held = network(whole) if step in kept else held
        whole = row.a * whole + row.b * held
    few = start
    for row in on_kept_steps(kept, 10).rows:
        few = row.a * few + row.b * network(few)
    assert np.abs(whole - few).max() < 1e-12
    v, few_v = start, start  # the same with v held: another run
    alphas = [float(each) for each in prepared(ddim("epsilon"), 10).alphas_cumprod[[int(t) for t in table.timesteps]]]
    for step, (row, alpha) in enumerate(zip(table.rows, alphas, strict=True)):
        if step in kept:
            few_v = velocity(network(v), v, alpha)
        v = row.a * v + row.b * (np.sqrt(alpha) * few_v + np.sqrt(1 - alpha) * v)
    assert np.abs(v - few).max() > 0.01


def test_velocity_is_what_a_v_prediction_would_be() -> None:
    """x = alpha x0 + sigma eps and v = alpha eps - sigma x0."""
    x0, eps = RNG.standard_normal((2, 1, 2, 3, 3))
    alpha = np.sqrt(0.3)
    sigma = np.sqrt(0.7)
    found = velocity(eps, alpha * x0 + sigma * eps, 0.3)
    np.testing.assert_allclose(found, alpha * eps - sigma * x0, atol=1e-12)


def test_the_two_predictions_make_the_same_step() -> None:
    """A run of a v network equals that of the epsilon network it amounts to, so that E of v is E of either."""
    tables = {name: solver_table(ddim(name), 6) for name in ("epsilon", "v_prediction")}
    alphas = prepared(ddim("epsilon"), 6).alphas_cumprod

    def eps(latents: np.ndarray, step: int, prompt_embeds: np.ndarray) -> np.ndarray:
        return np.concatenate([np.tanh(latents)] * 2)

    def v(latents: np.ndarray, step: int, prompt_embeds: np.ndarray) -> np.ndarray:
        alpha = float(alphas[int(tables["epsilon"].timesteps[step])])
        return velocity(eps(latents, step, prompt_embeds), latents, alpha).astype(np.float32)

    start = Start(0, RNG.standard_normal((1, 2, 3, 3)).astype(np.float32), None, np.zeros((2, 1, 1), np.float32))
    ends = [
        final_latents(chain(network, tables[name], start, 1.0), start)
        for name, network in (("epsilon", eps), ("v_prediction", v))
    ]
    assert np.abs(ends[0] - ends[1]).max() < 1e-4
    assert solver_step(tables["epsilon"].rows[0], start.latents, start.latents, None)[0].shape == (1, 2, 3, 3)
