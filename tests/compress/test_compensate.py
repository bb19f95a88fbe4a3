"""Compensation: planted tables are found, rivals are what their formulas say, and only what pays off held out ships."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.compensate import Compensation, fit, fit_closed_loop, measure, none
from latentrelay.compress.compensation_gate import Score, _choice, compensate, gate_rows, psnr_db, score
from latentrelay.compress.compensation_rows import branch_corrections, branch_tables
from latentrelay.compress.denoising_chain import Start, chain, final_latents
from latentrelay.compress.error_moments import Moments
from latentrelay.compress.errors import CompensationError
from latentrelay.compress.solver_tables import SolverRow, SolverTable
from latentrelay.compress.trajectory import CloudHandoff, Identity, Trajectories, record

N, C, SIDE, GUIDANCE = 4, 2, 6, 4.0
SHAPE = (1, C, SIDE, SIDE)
Net = Callable[[Any, int, Any], Any]


def make_table(memory: bool) -> SolverTable:
    rows = tuple(SolverRow(0.9, -0.3 - 0.1 * i, 0.05 * (0 < i < N - 1) * memory, 0.0, 1.0, -0.5, 1.0) for i in range(N))
    return SolverTable(rows, tuple(800 - 200 * i for i in range(N)), 1.0)


IDENTITY = Identity("sha256:a", "sha256:b", "dpmsolver++", "sha256:c", N, GUIDANCE)


def network(latents: Any, step: int, prompt_embeds: Any) -> Any:
    """The float network: both branches see the latents and a shift that the prompt's states give."""
    shift = prompt_embeds.mean(axis=(1, 2))[:, None, None, None]
    return (np.tanh(latents + shift) + np.float32(0.2)).astype(np.float32)


def cloud(prompt: str, seed: int, split: int) -> CloudHandoff:
    rng = np.random.default_rng(seed)
    embeds = np.stack([np.zeros((2, 2)), np.full((2, 2), 0.2 + len(prompt) / 10)]).astype(np.float32)
    latents, memory = rng.standard_normal(SHAPE).astype(np.float32), None
    start = Start(0, latents, None, embeds)
    for done in chain(network, make_table(True), start, GUIDANCE):
        if done.step == split:
            break
        latents, memory = done.next_latents, done.next_x0_prev
    return CloudHandoff(latents, memory, embeds)


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., Trajectories]:
    """`runs("name", memory, count, first seed)`: float runs, every second one from split 2."""

    def made(name: str, memory: bool = True, count: int = 6, seed: int = 0) -> Trajectories:
        prompts = [chr(97 + i) * (1 + i % 5) for i in range(count)]
        seeds = range(seed, seed + count)
        return record(
            tmp_path / f"{name}{memory}", prompts, seeds, (0, 2), cloud, network, make_table(memory), IDENTITY
        )

    return made


def planted(gain: Any, offset: Any) -> Net:
    """A network whose error is exactly affine in its own output."""

    def quantised(latents: Any, step: int, prompt_embeds: Any) -> Any:
        r = network(latents, step, prompt_embeds).astype(np.float64)
        kept, b = (1 - gain[step])[..., None, None], offset[step][..., None, None]
        return ((r + b) / kept).astype(np.float32)

    return quantised


def noisy(size: float, of_step: Callable[[int], float] = lambda step: 1.0) -> Net:
    """A network with an error that looks random but belongs to its input, as rounding's does."""

    def quantised(latents: Any, step: int, prompt_embeds: Any) -> Any:
        r = network(latents, step, prompt_embeds)
        noise = np.sin(1e4 * (latents + prompt_embeds.mean(axis=(1, 2))[:, None, None, None])) + np.sin(7e3 * r)
        return (r + np.float32(size * of_step(step)) * noise).astype(np.float32)

    return quantised


@pytest.mark.parametrize("method", ["affine", "joint"])
def test_planted_tables_are_recovered(runs: Any, method: Any) -> None:
    rng = np.random.default_rng(3)
    gain, offset = rng.uniform(-0.15, 0.15, (N, 2, C)), 0.1 * rng.standard_normal((N, 2, C))
    recorded, table = runs("fit"), make_table(True)
    network_q = planted(gain, offset)
    found = fit(measure(recorded, network_q, table), method, IDENTITY, table)
    if method == "affine":
        np.testing.assert_allclose(found.gain, gain, atol=2e-3)
        np.testing.assert_allclose(found.offset, offset, atol=2e-3)
    better, worse = (score(recorded, network_q, table, each).mean for each in (found, None))
    assert better > worse + 30.0


def test_gain_is_the_ratio_fit(runs: Any) -> None:
    recorded, table, network_q = runs("fit"), make_table(True), noisy(0.1)
    found = fit(measure(recorded, network_q, table), "gain", IDENTITY, table)
    top = bottom = 0.0
    for run in recorded:
        for step, latents, r in run:
            if step == 3:
                q = network_q(latents, step, run.prompt_embeds).astype(np.float64)
                guided = (q - r)[:1] + GUIDANCE * ((q - r)[1:] - (q - r)[:1])
                weight = 1 / np.mean(guided**2)
                top, bottom = top + weight * np.sum(q[1, 0] * (q - r)[1, 0]), bottom + weight * np.sum(q[1, 0] ** 2)
    assert found.gain[3, 1, 0] == pytest.approx(top / (bottom * (1 + 1e-4)), rel=1e-5)
    assert not found.offset.any()
    assert found.mixing is None


def test_ptqd_is_slope_and_bias_of_the_guided_output(runs: Any) -> None:
    """On noise-free q = (1 + k) r + bias: K = k / (1 + k), b = mean error / (1 + k), whatever the scale."""
    k = 0.08

    def quantised(latents: Any, step: int, prompt_embeds: Any) -> Any:
        return ((1 + k) * network(latents, step, prompt_embeds) + np.float32(0.05)).astype(np.float32)

    recorded, table = runs("fit"), make_table(True)
    found = fit(measure(recorded, quantised, table), "ptqd", IDENTITY, table)
    np.testing.assert_allclose(found.gain, k / (1 + k), rtol=1e-4)
    np.testing.assert_allclose(found.gain[:, 0], found.gain[:, 1])
    np.testing.assert_allclose(found.offset[:, 0], found.offset[:, 1])
    assert found.guidance == GUIDANCE


def test_zeros_change_no_bit(runs: Any) -> None:
    recorded, table = runs("fit"), make_table(True)
    zeros = none(IDENTITY, table.timesteps, C)
    mixing = dataclasses.replace(zeros, mixing=np.zeros((N, 2, 3, C)))
    for run in recorded:
        plain, one, other = (
            final_latents(chain(network, table, run.start, GUIDANCE, each), run.start) for each in (None, zeros, mixing)
        )
        assert plain.tobytes() == one.tobytes() == other.tobytes()
    assert zeros.tables() == {}
    assert zeros.rows == ()


def test_moments_of_parts_add_up(runs: Any) -> None:
    recorded, table, network_q = runs("fit"), make_table(True), noisy(0.2)
    whole = measure(recorded, network_q, table)
    tail = dataclasses.replace(recorded, files=recorded.files[2:])
    both = measure(recorded.take(2), network_q, table).merged(measure(tail, network_q, table))
    np.testing.assert_allclose(both.sums, whole.sums, rtol=1e-12)
    assert both.runs.tolist() == whole.runs.tolist() == [3, 3, 6, 6]


def test_tables_of_branches_and_of_directions_are_each_others_inverse() -> None:
    corrections = np.random.default_rng(0).standard_normal((N, 2, 5, C))
    gain, offset, mixing = branch_tables(corrections)
    for step in range(N):
        back = branch_corrections(gain[step], offset[step], mixing[step])
        np.testing.assert_allclose(back, corrections[step].transpose(2, 0, 1), atol=1e-12)


def test_rows_that_do_not_help_held_out_become_zero() -> None:
    table = make_table(True)
    plain = none(IDENTITY, table.timesteps, C)
    rng = np.random.default_rng(1)
    held = Moments.zeros(N, C)
    for step in range(3):  # step 3 has no held-out sample
        q = rng.standard_normal((2, C, SIDE, SIDE)).astype(np.float32)
        held.add(step, q, (0.1 if step else -0.1) * q, rng.standard_normal(SHAPE).astype(np.float32), None)
    fitted = dataclasses.replace(plain, method="gain", gain=np.full((N, 2, C), 0.1))
    assert gate_rows(fitted, held, GUIDANCE).rows == (1, 2)


@pytest.mark.parametrize("memory", [True, False])
def test_closed_loop_takes_back_noise_that_open_loop_cannot(runs: Any, memory: bool) -> None:
    """Noise on the last step only: the guidance direction and the memory carry what the last output hides."""
    network_q = noisy(0.3, lambda step: float(step == N - 1))
    table, fit_runs, held = make_table(memory), runs("fit", memory, 12), runs("held", memory, 6, 100)
    outcome = compensate(fit_runs, held, network_q, table)
    assert outcome.gain_db[0] > 0.5
    assert "closed" in outcome.name
    assert N - 1 in outcome.kept.rows
    tables = outcome.kept.tables()
    assert tables["compensation_mixing"].shape == (N, 2, 3, C)
    assert tables["compensation_mixing"][:, :, 2].any() <= memory
    assert score(held, network_q, table, outcome.kept).mean == pytest.approx(outcome.scores[outcome.name].mean)
    assert outcome.scores[outcome.name].mean >= max(each.mean for each in outcome.scores.values()) - 0.1


def test_nothing_ships_for_a_network_without_error(runs: Any) -> None:
    outcome = compensate(runs("fit"), runs("held", seed=50), network, make_table(True))
    assert (outcome.name, outcome.kept.tables()) == ("none", {})


def test_the_closed_row_is_the_least_squares_solution(runs: Any) -> None:
    """Any other row leaves more of the weighted error: each run's counts relative to what it was."""
    table, recorded, network_q = make_table(True), runs("fit"), noisy(0.05)
    plain = none(IDENTITY, table.timesteps, C)
    found = fit_closed_loop(plain, recorded, network_q, table, N - 1, "joint")
    assert found.closed_from == N - 1
    without = score(recorded, network_q, table, None)

    def left(compensation: Compensation) -> float:
        return float(np.mean(10 ** ((without.psnr_db - score(recorded, network_q, table, compensation).psnr_db) / 10)))

    for entry in ("gain", "offset"):
        moved = getattr(found, entry).copy()
        moved[N - 1] += 0.02
        assert left(dataclasses.replace(found, **{entry: moved})) > left(found)
    assert not plain.gain.any()


def some(closed_from: int = N) -> Compensation:
    rng = np.random.default_rng(2)
    table = make_table(True)
    gain, offset = rng.standard_normal((2, N, 2, C))
    return Compensation("affine", gain, offset, None, IDENTITY, table.timesteps, closed_from)


def test_another_number_of_steps_is_interpolated_by_model_timestep() -> None:
    fitted = some()  # timesteps 800, 600, 400, 200
    identity = dataclasses.replace(IDENTITY, num_steps=3)
    found = fitted.interpolated(identity, (800, 500, 100))
    np.testing.assert_allclose(found.gain[0], fitted.gain[0])
    np.testing.assert_allclose(found.gain[1], (fitted.gain[1] + fitted.gain[2]) / 2)
    assert not found.gain[2].any()  # later than any fitted row: the network was not measured there
    assert found.identity.num_steps == 3
    assert fitted.interpolated(IDENTITY, fitted.timesteps) is fitted
    closed = some(closed_from=3).interpolated(identity, (800, 500, 200))
    assert not closed.gain[2].any()
    assert closed.gain[1].any()  # an open-loop row


@pytest.mark.parametrize("field", ["source", "network", "sampler", "scheduler_digest", "guidance"])
def test_another_identity_is_refused(field: str) -> None:
    other = dataclasses.replace(IDENTITY, **{field: 9.0 if field == "guidance" else "other"})
    for ask in (lambda: some().require(other), lambda: some().interpolated(other, (1, 2, 3, 4))):
        with pytest.raises(CompensationError) as refused:
            ask()
        assert refused.value.field == field
    with pytest.raises(CompensationError, match="timesteps"):
        some().interpolated(IDENTITY, (1, 2))


def test_psnr_by_hand() -> None:
    reference = np.array([2.0, 0.0], np.float32)
    assert psnr_db(reference, np.array([2.0, 0.2], np.float32)) == pytest.approx(10 * np.log10(4 / 0.02), abs=1e-4)
    assert psnr_db(reference, reference) == 200.0
    assert psnr_db(reference, np.array([np.nan, 0.0])) == -np.inf


def test_chance_does_not_ship() -> None:
    """One run in eight that gains 40 dB raises the mean by 5; seven that lose a little decide."""
    table = make_table(True)
    plain = none(IDENTITY, table.timesteps, C)
    small = dataclasses.replace(plain, gain=np.ones((N, 2, C))).only([3])
    large = dataclasses.replace(plain, gain=np.ones((N, 2, C)))
    base = np.full(8, 30.0)
    lucky, steady, better = base - 0.1, base + np.linspace(0.4, 0.6, 8), base + np.linspace(0.45, 0.65, 8)
    lucky[0] += 40.0
    scores = {"none": Score(base), "lucky": Score(lucky)}
    candidates = {"none": plain, "lucky": large, "steady": small, "better": large, "ptqd": large}
    assert _choice(scores, candidates) == "none"
    assert _choice({**scores, "ptqd": Score(better)}, candidates) == "none"
    assert _choice({**scores, "better": Score(better)}, candidates) == "better"
    assert _choice({**scores, "better": Score(better), "steady": Score(steady)}, candidates) == "steady"  # fewer rows
