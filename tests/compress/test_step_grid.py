"""Adjusted grids: factors by hand, the identity bit for bit, the solvers' rows on a moved grid, the printed phi."""

import math
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from latentrelay.compress.error_matrix import error_matrix
from latentrelay.compress.errors import ScheduleError, UnsupportedSchedulerError
from latentrelay.compress.solver_tables import SolverRow, solver_table
from latentrelay.compress.step_grid import adjusted_sigmas, adjusted_table, nominal_sigmas, step_factors

STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS: dict[str, Any] = {
    "ddim": lambda **kw: DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, **kw),
    "dpmsolver++": lambda **kw: DPMSolverMultistepScheduler(**STABLE, **kw),
    "dpmsolver++1": lambda **kw: DPMSolverMultistepScheduler(**STABLE, solver_order=1, **kw),
    "euler": lambda **kw: EulerDiscreteScheduler(**STABLE, **kw),
}
F, P = "full", "predicted"
N, SPLIT = 12, 3
MASK = (F, P, P, F, P, F, P, P, F)
FACTORS = np.array([1.0, 1, 1, 1, 0.8, 0.75, 1, 0.9, 1, 0.7, 0.95, 1])


def outputs(seed: int, n: int = N) -> np.ndarray:
    """A path (n, 2, C, h, w) that turns slowly."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 2, 3, 2, 2))
    return np.stack([np.cos(0.1 * i) * first + np.sin(0.1 * i) * second for i in range(n)]).astype(np.float32)


def test_factors_by_hand() -> None:
    run = np.array([4.0, 5.0, 8.0, 10.0, 16.0]).reshape(5, 1, 1, 1, 1)
    found = step_factors([(0, run)], (F, P, P, F), 1, 5, phi_min=0.1)
    assert found.tolist() == [1.0, 1.0, 1 - 3 / 8, 1 - 5 / 10, 1.0]
    assert step_factors([(0, run)], (F, P, P, F), 1, 5).tolist() == [1.0, 1.0, 0.7, 0.7, 1.0]  # phi_min


def test_factors_are_quotients_of_means_over_runs_that_reach_back_to_the_split() -> None:
    runs = [(0, outputs(1)), (SPLIT, 3 * outputs(2)[SPLIT:]), (SPLIT + 1, outputs(3)[SPLIT + 1 :])]
    found = step_factors(runs, MASK, SPLIT, N, phi_min=0.0)
    first, second = runs[0][1].astype(float), 3 * outputs(2).astype(float)
    wrong = np.abs(first[3] - first[5]).sum() + np.abs(second[3] - second[5]).sum()
    assert found[5] == pytest.approx(1 - wrong / (np.abs(first[5]).sum() + np.abs(second[5]).sum()), rel=1e-6)
    assert (found[[0, 1, 2, 3, 6, 8, 11]] == 1.0).all()
    one = step_factors(runs[:1], MASK, SPLIT, N, phi_min=0.0)
    matrix = error_matrix([(0, outputs(1).reshape(N, 1, 6, 2, 2))], N, branches=(0,))
    assert one[4] == pytest.approx(1 - matrix.values[3, 4], rel=1e-6)


def test_a_forecast_that_is_right_needs_no_adjustment() -> None:
    straight = np.arange(1.0, N + 1).reshape(N, 1, 1, 1, 1)

    def line(computed: Any, step: int) -> Any:
        (last, value), (before, older) = computed[:2]
        return value + (step - last) * (value - older) / (last - before)

    mask = (F, F, P, P, F, P, P, P, F)
    assert (step_factors([(0, straight)], mask, SPLIT, N, forecast=line) == 1.0).all()
    assert (step_factors([(0, straight)], mask, SPLIT, N, phi_min=0.0) < 1.0).sum() == 5


def test_the_printed_factor_is_identically_zero_after_a_computed_step() -> None:
    """||v~_i - v_i|| / ||v_i - v_{i-1}|| with v~_i = v_{i-1}: 1, whatever v is, so that the step would not move."""
    for seed in range(3):
        printed = step_factors([(0, outputs(seed))], MASK, SPLIT, N, denominator="change", phi_min=0.0)
        after = [SPLIT + i for i in range(1, len(MASK)) if MASK[i] == P and MASK[i - 1] == F]
        assert after == [4, 7, 9]
        assert (printed[after] == 0.0).all()
        assert (step_factors([(0, outputs(seed))], MASK, SPLIT, N)[after] > 0.7).all()


def test_grid_form_by_hand() -> None:
    sigmas = np.array([8.0, 6.0, 4.0, 2.0, 0.0])
    tau = adjusted_sigmas(sigmas, np.array([1.0, 0.5, 1.0, 1.0]), 0, 4)
    assert tau[:3].tolist() == [8.0, 6.0, 5.0]
    assert tau[3:].tolist() == pytest.approx([5 - 5 / 4 * 2, 0.0])
    cloud = adjusted_sigmas(sigmas, np.array([1.0, 0.5, 1.0, 1.0]), 0, 3)  # the handoff is at 2
    assert cloud.tolist() == pytest.approx([8.0, 6.0, 5.0, 2.0, 0.0])


@pytest.mark.parametrize("segment", [(SPLIT, N), (0, SPLIT + 3)])
def test_ends_of_the_segment_stay_and_levels_fall(segment: tuple[int, int]) -> None:
    first, last_excl = segment
    factors = np.where((np.arange(N) >= first) & (np.arange(N) < last_excl - 1), FACTORS, 1.0)
    factors[1] = 0.8 if first == 0 else 1.0
    sigmas = nominal_sigmas(SCHEDULERS["dpmsolver++"](), N)
    tau = adjusted_sigmas(sigmas, factors, first, last_excl)
    assert (tau[: first + 1] == sigmas[: first + 1]).all()
    assert (tau[last_excl:] == sigmas[last_excl:]).all()
    assert (np.diff(tau) < 0).all()
    assert (tau >= sigmas).all()
    assert (tau != sigmas).any()


def test_all_ones_change_no_bit() -> None:
    sigmas = nominal_sigmas(SCHEDULERS["ddim"](), N)
    assert adjusted_sigmas(sigmas, np.ones(N), SPLIT, N).tobytes() == sigmas.tobytes()
    for name, made in SCHEDULERS.items():
        for prediction_type in ("epsilon", "v_prediction"):
            scheduler = made(prediction_type=prediction_type)
            assert adjusted_table(scheduler, N, np.ones(N), SPLIT, N, "actual") == solver_table(scheduler, N), name


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_what_lies_before_the_first_moved_level_is_nominal(name: str) -> None:
    scheduler = SCHEDULERS[name](prediction_type="v_prediction")
    nominal, moved = solver_table(scheduler, N), adjusted_table(scheduler, N, FACTORS, SPLIT, N)
    assert moved.rows[:4] == nominal.rows[:4]  # step 4 is the first whose end moves
    assert moved.rows[4] != nominal.rows[4]
    assert moved.timesteps == nominal.timesteps
    assert moved.init_noise_sigma == nominal.init_noise_sigma
    assert moved.needs_x0_prev == nominal.needs_x0_prev
    assert solver_table(scheduler, N) == nominal  # the scheduler is as it was


def alphas_of(sigma: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + sigma * sigma), sigma / math.sqrt(1 + sigma * sigma)


def test_ddim_rows_on_the_adjusted_grid_are_the_papers() -> None:
    """x' = (a a' + s s') x + (s' a - a' s) v, with (a, s) of the adjusted levels."""
    scheduler = SCHEDULERS["ddim"](prediction_type="v_prediction")
    tau = adjusted_sigmas(nominal_sigmas(scheduler, N), FACTORS, SPLIT, N)
    for step, row in enumerate(adjusted_table(scheduler, N, FACTORS, SPLIT, N).rows):
        (a, s), (a2, s2) = alphas_of(tau[step]), alphas_of(tau[step + 1])
        expected = (a * a2 + s * s2, s2 * a - a2 * s, a, -s)
        assert (row.a, row.b, row.p, row.q) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("segment", [(SPLIT, N), (SPLIT, N - 3)])
def test_two_step_rows_on_the_adjusted_grid_are_the_papers(segment: tuple[int, int]) -> None:
    """DPM-Solver++(2M) in the levels' own log-SNRs; first order at the first step and, ending at 0, at the last."""
    scheduler = SCHEDULERS["dpmsolver++"](prediction_type="v_prediction")
    factors = np.where(np.arange(N) < segment[1] - 1, FACTORS, 1.0)
    tau = adjusted_sigmas(nominal_sigmas(scheduler, N), factors, *segment)
    rows = adjusted_table(scheduler, N, factors, *segment).rows
    lam = -np.log(tau[:-1])
    for step in range(N - 1):
        (a, s), (a2, s2) = alphas_of(tau[step]), alphas_of(tau[step + 1])
        h = lam[step + 1] - lam[step]
        gone = a2 * -math.expm1(-h)  # what x0 counts by in one step of the first order
        k = 0.0 if step == 0 else h / (lam[step] - lam[step - 1]) / 2
        expected = SolverRow(s2 / s + gone * (1 + k) * a, -gone * (1 + k) * s, -gone * k, 0.0, a, -s, 1.0)
        got = rows[step]
        assert (got.a, got.b, got.c, got.p, got.q) == pytest.approx(
            (expected.a, expected.b, expected.c, expected.p, expected.q), abs=2e-6
        )
    assert rows[-1].a == pytest.approx(rows[-1].p)
    assert rows[-1].c == 0.0


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_actual_timesteps_are_those_of_the_levels(name: str) -> None:
    scheduler = SCHEDULERS[name](prediction_type="v_prediction")
    sigmas = nominal_sigmas(scheduler, N)
    tau = adjusted_sigmas(sigmas, FACTORS, SPLIT, N)
    nominal, actual = solver_table(scheduler, N), adjusted_table(scheduler, N, FACTORS, SPLIT, N, "actual")
    assert actual.rows == adjusted_table(scheduler, N, FACTORS, SPLIT, N).rows
    alphas = scheduler.alphas_cumprod.double().numpy()
    levels = np.sqrt((1 - alphas) / alphas)
    for step in range(N):
        if tau[step] == sigmas[step]:
            assert actual.timesteps[step] == nominal.timesteps[step]
            continue
        assert actual.timesteps[step] > nominal.timesteps[step]  # noisier than planned
        low = int(actual.timesteps[step])
        part = actual.timesteps[step] - low
        found = (1 - part) * math.log(levels[low]) + part * math.log(levels[low + 1])
        assert found == pytest.approx(math.log(tau[step]), abs=1e-9)


def test_a_shorter_step_helps_where_the_reused_output_is_wrong() -> None:
    """DDIM over one Gaussian whose v is known: reuse of v with the norm form's factors and actual timesteps is nearer
    to the whole run's end than without, as the method promises for it."""
    scheduler = SCHEDULERS["ddim"](prediction_type="v_prediction")
    mask = (F, P, F, P, F, P, F, P, F, P, F, F)
    alphas = scheduler.alphas_cumprod.double().numpy()

    def v(x: Any, timestep: float) -> Any:
        """Of data with mean 2 and variance 0.25: x0 and eps by their posterior means."""
        ac = np.exp(np.interp(timestep, np.arange(1000), np.log(alphas)))
        a, s = math.sqrt(ac), math.sqrt(1 - ac)
        x0 = 2 + 0.25 * a * (x - 2 * a) / (0.25 * ac + s * s)
        return a * (x - a * x0) / s - s * x0

    def run(table: Any, kinds: Any) -> tuple[Any, list[Any]]:
        x, told, outs = np.random.default_rng(0).standard_normal(512), None, []
        for row, timestep, kind in zip(table.rows, table.timesteps, kinds, strict=True):
            told = v(x, timestep) if kind == F else told
            outs.append(told)
            x = row.a * x + row.b * told
        return x, outs

    table = solver_table(scheduler, N)
    end, outs = run(table, [F] * N)
    factors = step_factors([(0, np.stack(outs).reshape(N, 1, 1, 1, -1))], mask, 0, N)
    plain = np.sqrt(np.mean((run(table, mask)[0] - end) ** 2))
    adjusted = adjusted_table(scheduler, N, factors, 0, N, "actual")
    assert np.sqrt(np.mean((run(adjusted, mask)[0] - end) ** 2)) < plain


@pytest.mark.parametrize(
    "call",
    [
        lambda: step_factors([], MASK, SPLIT, N),
        lambda: step_factors([(SPLIT + 1, outputs(0)[SPLIT + 1 :])], MASK, SPLIT, N),
        lambda: step_factors([(0, outputs(0)[:-1])], MASK, SPLIT, N),
        lambda: step_factors([(0, outputs(0))], MASK[1:], SPLIT + 1, N),  # begins with a predicted step
        lambda: step_factors([(0, outputs(0))], MASK, SPLIT + 1, N),
        lambda: adjusted_sigmas(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.9]), 0, 2),
        lambda: adjusted_sigmas(np.array([3.0, 2.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0]), 0, 3),  # does not move
        lambda: adjusted_sigmas(np.array([np.inf, 2.0, 1.0, 0.0]), np.array([0.9, 1.0, 1.0]), 0, 3),
        lambda: adjusted_sigmas(np.array([3.0, 2.0]), np.ones(3), 0, 3),
    ],
)
def test_refused(call: Any) -> None:
    with pytest.raises(ScheduleError):
        call()


def test_a_solver_with_noise_of_its_own_has_no_adjusted_grid() -> None:
    scheduler = LCMScheduler(**{key: value for key, value in STABLE.items() if key != "steps_offset"})
    with pytest.raises(UnsupportedSchedulerError, match="LCMScheduler"):
        adjusted_table(scheduler, 4, np.array([1, 0.9, 1, 1.0]), 0, 4)
