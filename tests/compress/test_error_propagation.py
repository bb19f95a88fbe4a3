"""The recursion against simulation and its closed form; the solvers' own coefficients; the trap of double counting."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from latentrelay.compress.denoising_chain import Start
from latentrelay.compress.error_propagation import (
    final_gains,
    fit_jacobian,
    predict,
    propagate,
    rank_layers,
    rank_steps,
)
from latentrelay.compress.error_propagation_plot import plot_predictions
from latentrelay.compress.errors import CompensationError
from latentrelay.compress.solver_tables import SolverTable, solver_table
from latentrelay.compress.trajectory import CloudHandoff, Identity, Trajectories, record

STABLE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SOLVERS: dict[str, Any] = {
    "ddim": lambda **kw: DDIMScheduler(**STABLE, clip_sample=False, set_alpha_to_one=False, **kw),
    "euler": lambda **kw: EulerDiscreteScheduler(**STABLE, **kw),
    "dpmsolver++1": lambda **kw: DPMSolverMultistepScheduler(**STABLE, solver_order=1, **kw),
    "dpmsolver++2": lambda **kw: DPMSolverMultistepScheduler(**STABLE, solver_order=2, **kw),
}
N = 12


def simulate(table: SolverTable, weights: Any, errors: Any, x: Any) -> Any:
    """A network that is a scalar a step, so that its Jacobian is exact."""
    memory = np.zeros_like(x)
    for row, weight, error in zip(table.rows, weights, errors, strict=True):
        e = weight * x + error
        x, memory = row.a * x + row.b * e + row.c * memory, row.p * x + row.q * e
    return x


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_recursion_closed_form_and_simulation_agree(solver: str, prediction_type: str) -> None:
    table = solver_table(SOLVERS[solver](prediction_type=prediction_type), N)
    rng = np.random.default_rng(0)
    weights, errors, x = rng.uniform(-0.5, 0.9, N), 0.1 * rng.standard_normal((N, 3)), rng.standard_normal(3)
    simulated = simulate(table, weights, errors, x) - simulate(table, weights, 0 * errors, x)
    scale = float(np.abs(simulate(table, weights, errors, x)).max())
    assert np.abs(propagate(table, errors, weights)[-1] - simulated).max() <= 1e-14 * max(scale, 100.0)
    closed = final_gains(table, weights) @ errors
    np.testing.assert_allclose(closed, simulated, rtol=1e-11, atol=1e-12 * scale)


def test_ddim_coefficients_are_the_papers() -> None:
    """A = sqrt(abar'/abar), B = sqrt(1-abar') - sqrt(abar'(1-abar)/abar); with v: A = aa'+ss', B = s'a - a's."""
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = SOLVERS["ddim"](prediction_type=prediction_type)
        table = solver_table(scheduler, N)
        for i in range(N - 1):
            now, then = (float(scheduler.alphas_cumprod.double()[int(table.timesteps[j])]) for j in (i, i + 1))
            a, s, a2, s2 = math.sqrt(now), math.sqrt(1 - now), math.sqrt(then), math.sqrt(1 - then)
            expected = (a2 / a, s2 - a2 * s / a) if prediction_type == "epsilon" else (a * a2 + s * s2, s2 * a - a2 * s)
            assert (table.rows[i].a, table.rows[i].b) == pytest.approx(expected, abs=1e-9)


def test_two_step_recursion_is_the_cards() -> None:
    """DPM++(2M) for epsilon: its own h, c, k and r, with both past errors, against the rows read off diffusers."""
    scheduler = SOLVERS["dpmsolver++2"]()
    table = solver_table(scheduler, N)
    alpha = [math.sqrt(float(scheduler.alphas_cumprod.double()[int(t)])) for t in table.timesteps]
    sigma = [math.sqrt(1 - a * a) for a in alpha]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    rng = np.random.default_rng(1)
    j, e = rng.uniform(-0.3, 0.3, N), rng.standard_normal(N)
    found = propagate(table, e, j)
    d = [0.0]
    for i in range(N - 2):  # the last step is first order and ends at sigma 0
        h, a, s, a2, s2 = lam[i + 1] - lam[i], alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        c = a2 * (1 - math.exp(-h))
        k = (h / (lam[i] - lam[i - 1])) / 2 if i else 0.0
        value = (s2 / s + c * (1 + k) / a) * d[i] - c * (1 + k) * (s / a) * (j[i] * d[i] + e[i])
        if i:
            ap, sp = alpha[i - 1], sigma[i - 1]
            value += -(c * k / ap) * d[i - 1] + c * k * (sp / ap) * (j[i - 1] * d[i - 1] + e[i - 1])
        d.append(value)
        assert found[i + 1] == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_dpmsolver_of_first_order_is_ddim_and_v_is_epsilon() -> None:
    """DPM-Solver++ of first order: DDIM's A and B at its own timesteps; and a run on v is the run on epsilon."""
    scheduler = SOLVERS["dpmsolver++1"]()
    first, cumulative = solver_table(scheduler, N), scheduler.alphas_cumprod.double()
    for row, t, t2 in zip(first.rows, first.timesteps, first.timesteps[1:], strict=False):
        now, then = float(cumulative[int(t)]), float(cumulative[int(t2)])
        expected = (math.sqrt(then / now), math.sqrt(1 - then) - math.sqrt(then * (1 - now) / now))
        assert (row.a, row.b) == pytest.approx(expected, abs=2e-6)
    epsilon, velocity = (solver_table(SOLVERS["ddim"](prediction_type=kind), N) for kind in ("epsilon", "v_prediction"))
    alphas = SOLVERS["ddim"]().alphas_cumprod.double()
    rng = np.random.default_rng(2)
    x = y = rng.standard_normal(4)
    for eps_row, v_row, t in zip(epsilon.rows, velocity.rows, epsilon.timesteps, strict=True):
        a, s = math.sqrt(alphas[int(t)]), math.sqrt(1 - alphas[int(t)])
        eps = np.tanh(x)
        x, y = eps_row.a * x + eps_row.b * eps, v_row.a * y + v_row.b * ((eps - s * y) / a)
    np.testing.assert_allclose(x, y, rtol=1e-8)


def test_naive_two_term_correction_loses_to_the_stateless_one() -> None:
    """Subtracting the step before's error again, after it was corrected, is worse than not to correct at all."""
    table = solver_table(SOLVERS["ddim"](), N)
    rng = np.random.default_rng(3)
    k, gains = 0.05, []
    for _ in range(40):
        x = rng.standard_normal(64)
        noise = 0.002 * rng.standard_normal((N, 64))
        ends = []
        for kind in ("float", "none", "stateless", "two terms"):
            z, before = x, np.zeros(64)
            for i, row in enumerate(table.rows):
                r = 0.9 * z
                q = r if kind == "float" else r / (1 - k) + noise[i]
                z_next = row.a * z + row.b * q
                if kind in ("stateless", "two terms"):
                    z_next = z_next - row.b * k * q
                if kind == "two terms" and i:
                    z_next = z_next - row.a * table.rows[i - 1].b * k * before
                z, before = z_next, q
            ends.append(z)
        gains.append([np.mean((end - ends[0]) ** 2) for end in ends[1:]])
    none, stateless, two_terms = np.mean(gains, axis=0)
    assert stateless < none < two_terms


# ---- through a network ---------------------------------------------------------------------------------------------

IDENTITY = Identity("sha256:a", "sha256:b", "dpmsolver++", "sha256:c", N, 3.0)
SHAPE = (1, 2, 6, 6)


def network(latents: Any, step: int, prompt_embeds: Any) -> Any:
    """Linear, so that J is known: guided e = (0.4 + 3 (0.6 - 0.4)) x = x."""
    return np.concatenate([0.4 * latents, 0.6 * latents]).astype(np.float32)


def deployed(latents: Any, step: int, prompt_embeds: Any) -> Any:
    noise = np.sin(1e4 * latents) * np.float32(0.02 if step < N - 1 else 0.2)
    return network(latents, step, prompt_embeds) + np.concatenate([noise, noise])


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Trajectories, SolverTable]:
    table = solver_table(SOLVERS["dpmsolver++2"](prediction_type="v_prediction"), N)

    def cloud(prompt: str, seed: int, split: int) -> CloudHandoff:
        noise = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
        start = Start(0, noise, None, np.zeros((2, 1, 1), np.float32))
        return CloudHandoff(start.latents, None, start.prompt_embeds)

    return record(tmp_path, ["a", "b", "c"], [1, 2, 3], [0], cloud, network, table, IDENTITY), table


def test_prediction_through_a_linear_network(runs: tuple[Trajectories, SolverTable], tmp_path: Path) -> None:
    recorded, table = runs
    jacobian = fit_jacobian(recorded, network, deployed, table)
    np.testing.assert_allclose(jacobian, 1.0, rtol=1e-4)
    found = predict(recorded, deployed, table, jacobian)
    assert abs(found.bias_db) < 1.0  # its errors on other latents are other draws of the same noise
    assert found.step_shares.sum() == pytest.approx(1.0)
    assert rank_steps(found)[0] == int(np.argmax(found.gains**2 * found.step_power))
    plot_predictions({"w4a8": found}, tmp_path / "plots" / "propagation.png")
    assert (tmp_path / "plots" / "propagation.png").read_bytes()[:4] == b"\x89PNG"


def test_layers_are_ranked_by_what_reaches_the_end() -> None:
    gains = np.array([0.1, 1.0])
    power = {"early": np.array([9.0, 0.0]), "late": np.array([0.0, 1.0])}
    assert rank_layers(power, gains) == {"late": pytest.approx(1.0), "early": pytest.approx(0.09)}
    assert list(rank_layers(power, gains)) == ["late", "early"]


def test_a_jacobian_of_another_length_is_refused() -> None:
    table = solver_table(SOLVERS["ddim"](), N)
    with pytest.raises(CompensationError, match="one J a step"):
        final_gains(table, np.zeros(3))
