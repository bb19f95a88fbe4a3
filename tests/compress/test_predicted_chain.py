"""The chain with predicted steps: nothing predicted changes nothing, known methods come out as special cases, and what
was left in a ladder before never reaches a result."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from latentrelay.compress.denoising_chain import chain, compensated, guided, solver_step
from latentrelay.compress.errors import PredictionError, TrajectoryError
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.predicted_chain import (
    Prediction,
    RunState,
    WholeOutput,
    predicted_chain,
    rectified,
    step_output,
)
from latentrelay.compress.solver_tables import SolverRow, SolverTable

N, SPLIT, GUIDANCE, C = 9, 2, 3.0, 2
F, P = "full", "predicted"
MASK = (F, F, P, P, F, P, F)


def made(mask: Any = MASK, target: Any = "deep_feature", spec: LadderSpec | None = None, **more: Any) -> Prediction:
    spec = spec or LadderSpec((0,))
    update, candidates = ladder_rows(mask, SPLIT, N, spec, np.arange(float(N)))
    return Prediction(SPLIT, mask, target, update, candidates, **more)


def correction() -> Any:
    rng = np.random.default_rng(7)
    gain, offset, mixing = (0.1 * rng.standard_normal(size) for size in ((N, 2, C), (N, 2, C), (N, 2, 3, C)))

    class Tables:
        def apply(self, noise_pred: Any, step: int, latents: Any, x0_prev: Any) -> Any:
            return compensated(noise_pred, gain[step], offset[step], mixing[step], latents, x0_prev)

    return Tables()


@pytest.mark.parametrize("target", ["deep_feature", "whole_output"])
@pytest.mark.parametrize("corrected", [False, True])
def test_a_mask_without_predictions_is_the_plain_chain_bit_for_bit(
    staged: Any, staged_table: Any, staged_start: Any, target: Any, corrected: bool
) -> None:
    prediction = made((F,) * 7, target, LadderSpec((0, 1, 2), horizon=2))
    tables = correction() if corrected else None
    start, multiplier = staged_start(SPLIT), np.linspace(1.0, 0.5, N)
    plain = list(chain(staged, staged_table(), start, GUIDANCE, tables, multiplier))
    found = list(predicted_chain(staged, staged_table(), start, GUIDANCE, prediction, tables, multiplier))
    assert len(plain) == len(found) == 7
    for a, b in zip(plain, found, strict=True):
        for name in ("latents", "noise_pred", "e", "next_latents", "next_x0_prev"):
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes()
        assert b.kind == F


@pytest.mark.parametrize("corrected", [False, True])
def test_order_0_is_deepcache_bit_for_bit(
    staged: Any, make_staged: Any, staged_table: Any, staged_start: Any, corrected: bool
) -> None:
    table, start, tables = staged_table(), staged_start(SPLIT), correction() if corrected else None
    net, latents, memory, held, expected = make_staged(), start.latents, start.x0_prev, None, []
    for step, kind in enumerate(MASK, start=SPLIT):  # DeepCache: the deep feature is held, the shallow path is fresh
        if kind == F:
            out = net.full(latents, step, start.prompt_embeds)
            q, held = out.noise_pred, out.feature
        else:
            q = net.shallow(latents, step, start.prompt_embeds, held)
        q = q if tables is None else tables.apply(q, step, latents, memory)
        latents, memory = solver_step(table.rows[step], latents, guided(q, GUIDANCE), memory)
        expected.append(latents)
    found = [each.next_latents for each in predicted_chain(staged, table, start, GUIDANCE, made(), tables)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(expected, found, strict=True))
    assert staged.calls == {"full": 4, "probe": 0, "shallow": 3}


def test_whole_output_calls_the_network_at_computed_steps_only(
    staged: Any, staged_table: Any, staged_start: Any
) -> None:
    prediction = made(target="whole_output", spec=LadderSpec((1,)))
    start = staged_start(SPLIT)
    alone = list(predicted_chain(WholeOutput(staged), staged_table(), start, GUIDANCE, prediction))
    assert staged.calls == {"full": 4, "probe": 0, "shallow": 0}
    whole = list(predicted_chain(staged, staged_table(), start, GUIDANCE, prediction))
    assert alone[-1].next_latents.tobytes() == whole[-1].next_latents.tobytes()
    assert [each.kind for each in whole] == list(MASK)
    rise = alone[1].noise_pred - alone[0].noise_pred  # steps 2 and 3 are computed, one step apart
    assert np.allclose(alone[3].noise_pred, alone[1].noise_pred + 2 * rise, atol=1e-5)


def test_the_whole_output_is_predicted_after_its_compensation(
    staged: Any, staged_table: Any, staged_start: Any
) -> None:
    tables, start = correction(), staged_start(SPLIT)
    steps = list(predicted_chain(staged, staged_table(), start, GUIDANCE, made(target="whole_output"), tables))
    computed = steps[1]
    held = tables.apply(computed.noise_pred, computed.step, computed.latents, computed.x0_prev)
    assert steps[2].noise_pred.tobytes() == held.tobytes()  # and is not corrected again
    assert np.array_equal(steps[2].e, guided(held, GUIDANCE))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_tokens_choose_by_the_probe_and_choices_are_counted(
    staged: Any, staged_table: Any, staged_start: Any, metric: Any
) -> None:
    prediction = made(spec=LadderSpec((0, 1), horizon=2), metric=metric)
    steps = list(predicted_chain(staged, staged_table(), staged_start(SPLIT), GUIDANCE, prediction))
    for each in steps:
        if each.kind == F:
            assert each.choices is None
        else:
            assert each.choices is not None
            assert each.choices.sum() == 2 * 36
            assert 0.0 <= float(each.probe_error) < 1.0  # type: ignore[arg-type]
    assert sum((each.choices > 0).sum() > 1 for each in steps if each.choices is not None) >= 1
    assert staged.calls == {"full": 4, "probe": 3, "shallow": 3}


def test_a_random_choice_takes_no_probe_and_is_the_same_every_time(
    staged: Any, staged_table: Any, staged_start: Any
) -> None:
    prediction = made(spec=LadderSpec((0, 1)), metric="random")
    ends = [
        list(predicted_chain(staged, staged_table(), staged_start(SPLIT), GUIDANCE, prediction))[-1] for _ in (0, 1)
    ]
    assert ends[0].next_latents.tobytes() == ends[1].next_latents.tobytes()
    assert staged.calls["probe"] == 0


@pytest.mark.parametrize("target", ["deep_feature", "whole_output"])
def test_what_a_ladder_held_before_never_reaches_a_result(
    staged: Any, staged_table: Any, staged_start: Any, target: Any
) -> None:
    prediction = made(target=target, spec=LadderSpec((0, 1, 2), horizon=1), metric="l2")
    start, state = staged_start(SPLIT), None
    ends = []
    for fill in (0.0, np.nan):
        feature = np.full((3, 2, C if target == "whole_output" else 3, 6, 6), fill, np.float32)
        state = RunState(start.latents, start.x0_prev, feature, np.full((3, 2, 2, 6, 6), fill, np.float32))
        for step in range(SPLIT, N):
            out = step_output(staged, prediction, state, step, start.prompt_embeds)
            latents, x0 = solver_step(staged_table().rows[step], state.latents, guided(out.q, GUIDANCE), state.x0_prev)
            state = dataclasses.replace(out.state, latents=latents, x0_prev=x0)
        ends.append(state.latents)
    assert np.isfinite(ends[1]).all()
    assert ends[0].tobytes() == ends[1].tobytes()
    plain = list(predicted_chain(staged, staged_table(), start, GUIDANCE, prediction))[-1]
    assert plain.next_latents.tobytes() == ends[0].tobytes()


def test_branches_together_are_branches_apart(staged: Any, staged_table: Any, staged_start: Any) -> None:
    """The unconditional branch does not depend on the conditional prompt while the latents are the same."""
    prediction = made((F, P, F, F, F, F, F), spec=LadderSpec((0, 1)), metric="l2")
    start = staged_start(SPLIT)
    other = dataclasses.replace(start, prompt_embeds=start.prompt_embeds * np.float32(3.0))
    state = RunState(start.latents, start.x0_prev)
    found = []
    for embeds in (start.prompt_embeds, other.prompt_embeds):
        out = step_output(staged, prediction, state, SPLIT, embeds)
        found.append(step_output(staged, prediction, out.state, SPLIT + 1, embeds).q)
    assert np.array_equal(found[0][0], found[1][0])
    assert not np.array_equal(found[0][1], found[1][1])


def test_a_large_probe_error_falls_back_to_a_computed_step(staged: Any, staged_table: Any, staged_start: Any) -> None:
    prediction = made(spec=LadderSpec((0, 1)), metric="l2", fallback_threshold=0.0)
    steps = list(predicted_chain(staged, staged_table(), staged_start(SPLIT), GUIDANCE, prediction))
    plain = list(chain(staged, staged_table(), staged_start(SPLIT), GUIDANCE))
    assert [each.kind for each in steps] == [F] * 7
    assert steps[-1].next_latents.tobytes() == plain[-1].next_latents.tobytes()
    assert all(each.choices is not None for each, kind in zip(steps, MASK, strict=True) if kind == P)


def test_a_rectifier_by_hand_and_of_zeros() -> None:
    rng = np.random.default_rng(0)
    q, latents, memory = (rng.standard_normal((b, C, 6, 6)).astype(np.float32) for b in (2, 1, 1))
    ladder = rng.standard_normal((2, 2, C, 6, 6)).astype(np.float32)
    state = RunState(latents, memory, ladder)
    gain, offset, mixing = np.zeros((N, 2, C)), np.zeros((N, 2, C)), np.zeros((N, 2, 5, C))
    prediction = made(target="whole_output", spec=LadderSpec((1,)), gain=gain, offset=offset, mixing=mixing)
    assert rectified(prediction, q, 4, state).tobytes() == q.tobytes()
    gain[4], offset[4] = 0.1, 0.2
    mixing[4, 0], mixing[4, 1] = np.arange(1, 6)[:, None], -np.arange(1, 6)[:, None]
    found = rectified(prediction, q, 4, state)
    for own, other, sign in ((0, 1, 1), (1, 0, -1)):
        mixed = q[other] + 2 * latents[0] + 3 * memory[0] + 4 * ladder[1, own] + 5 * ladder[1, other]
        assert np.allclose(found[own], 0.9 * q[own] - 0.2 - sign * mixed, atol=1e-5)
    mixing[4, :, 2:] = 0.0  # neither memory nor differences are read then
    poisoned = RunState(latents, memory * np.float32(np.nan), ladder * np.float32(np.nan))
    assert np.isfinite(rectified(prediction, q, 4, poisoned)).all()


def test_a_rectifier_of_zeros_changes_no_bit_of_a_run(staged: Any, staged_table: Any, staged_start: Any) -> None:
    plain = made(target="whole_output", spec=LadderSpec((1,)))
    zeros = {"gain": np.zeros((N, 2, C)), "offset": np.zeros((N, 2, C)), "mixing": np.zeros((N, 2, 5, C))}
    ends = [
        list(predicted_chain(staged, staged_table(), staged_start(SPLIT), GUIDANCE, each))[-1].next_latents
        for each in (plain, dataclasses.replace(plain, **zeros))  # type: ignore[arg-type]
    ]
    assert ends[0].tobytes() == ends[1].tobytes()


def ddim(alphas: Any) -> SolverTable:
    """Rows of DDIM for an epsilon network over cumulative alphas (n + 1)."""
    rows = []
    for now, after in itertools.pairwise(alphas):
        a = float(np.sqrt(after / now))
        b = float(np.sqrt(1 - after) - np.sqrt(after / now) * np.sqrt(1 - now))
        rows.append(SolverRow(a, b, 0.0, 0.0, 1 / float(np.sqrt(now)), -float(np.sqrt((1 - now) / now)), 1.0))
    return SolverTable(tuple(rows), tuple(range(len(rows))), 1.0)


def test_holding_epsilon_under_ddim_is_a_run_on_the_computed_timesteps() -> None:
    """Output reuse is step merging, whatever the mask: it has to be compared with the subset run, and holding v is not
    the same. In double, as it is an identity."""
    alphas = np.concatenate([np.linspace(0.05, 0.9, 8), [1.0]])
    mask, rng = (F, P, P, F, P, F, P, F), np.random.default_rng(0)
    x0 = rng.standard_normal(50)

    def epsilon(x: Any, alpha: float) -> Any:
        return np.tanh(x * alpha) + 0.3 * np.sin(5 * x)

    def run(steps: SolverTable, computed: Any, at: Any) -> Any:
        x, held = x0, x0
        for row, kind, alpha in zip(steps.rows, computed, at, strict=True):
            held = epsilon(x, alpha) if kind == F else held
            x = row.a * x + row.b * held
        return x

    kept = [i for i, kind in enumerate(mask) if kind == F]
    subset = run(ddim(alphas[[*kept, 8]]), [F] * len(kept), alphas[kept])
    assert np.abs(run(ddim(alphas), mask, alphas[:-1]) - subset).max() < 1e-12
    assert np.abs(run(ddim(alphas), (F,) * 8, alphas[:-1]) - subset).max() > 1e-2


def test_the_chain_merges_steps_too_when_it_holds_the_whole_epsilon(staged_start: Any) -> None:
    alphas = np.concatenate([np.linspace(0.05, 0.9, N), [1.0]])
    table, start = ddim(alphas), staged_start(SPLIT)

    def epsilon(latents: Any, step: int, embeds: Any) -> Any:
        shift = embeds.mean(axis=(1, 2))[:, None, None, None]
        return np.tanh(latents * np.float32(alphas[step]) + shift).astype(np.float32)

    found = list(predicted_chain(WholeOutput(epsilon), table, start, GUIDANCE, made(target="whole_output")))[
        -1
    ].next_latents
    kept = [SPLIT + i for i, kind in enumerate(MASK) if kind == F]
    merged, latents = ddim(alphas[[*kept, N]]), start.latents
    for row, step in zip(merged.rows, kept, strict=True):
        latents, _ = solver_step(row, latents, guided(epsilon(latents, step, start.prompt_embeds), GUIDANCE), None)
    assert np.allclose(found, latents, atol=2e-5)


def test_what_does_not_fit_is_named(staged: Any, staged_table: Any, staged_start: Any) -> None:
    def run(prediction: Prediction, network: Any = staged, split: int = SPLIT) -> Any:
        return list(predicted_chain(network, staged_table(), staged_start(split), GUIDANCE, prediction))

    with pytest.raises(PredictionError, match="another run"):
        run(made(), split=0)
    with pytest.raises(PredictionError, match="shallow path"):
        run(made(), WholeOutput(staged))
    with pytest.raises(PredictionError, match="without one"):
        run(made(target="whole_output", spec=LadderSpec((0, 1)), metric="l2"), WholeOutput(staged))
    with pytest.raises(PredictionError, match="no metric"):
        made(spec=LadderSpec((0, 1)))
    with pytest.raises(PredictionError, match="all or none"):
        made(gain=np.zeros((N, 2, C)))
    with pytest.raises(PredictionError, match="whole_output"):
        made(target="residual")
    with pytest.raises(TrajectoryError, match="step 2: the network gave 144 values"):
        run(made(target="whole_output"), WholeOutput(lambda x, step, embeds: np.full((2, C, 6, 6), np.nan, np.float32)))
