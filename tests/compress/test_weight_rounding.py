"""Rounding of weights: codes and scales by hand, the order of the methods, branches, and what is refused."""

import numpy as np
import pytest
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.low_rank import with_low_rank
from latentrelay.compress.precision import LayerRule
from latentrelay.compress.weight_fit import InputStatistics, fit_weight
from latentrelay.compress.weight_rounding import (
    relative_error,
    round_best_scales,
    round_nearest,
    round_with_feedback,
)


def correlated(columns: int = 96, out: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, inputs whose columns depend on each other and differ in size, and their Gram matrix."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((out, columns)).astype(np.float32)
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + 0.3 * np.eye(columns)
    x = rng.standard_normal((1500, columns)) @ mixing * rng.permutation(np.geomspace(0.2, 5.0, columns))
    return weight, x, x.T @ x


def test_nearest_by_hand():
    weight = np.array([[0.8, -0.2, 0.36, 0.0, -1.6, 0.4, 0.2, 0.12]], dtype=np.float32)
    rounded = round_nearest(weight, 4, 4)
    # 0.8 / -8 = -0.1 reaches 0.8 with code -8; -1.6 / -8 = 0.2 reaches -1.6 with code -8
    np.testing.assert_allclose(rounded.scales, [[-0.1, 0.2]], rtol=1e-6)
    assert rounded.codes.tolist() == [[-8, 2, -4, 0, -8, 2, 1, 1]]
    np.testing.assert_allclose(rounded.dense(), [[0.8, -0.2, 0.4, 0.0, -1.6, 0.4, 0.2, 0.2]], atol=1e-6)


def test_a_row_of_zeros_stays_zero():
    assert not round_nearest(np.zeros((2, 8), np.float32), 4, 4).dense().any()
    assert not round_best_scales(np.zeros((2, 8), np.float32), 4, 4).dense().any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 16, 32, 36])
def test_error_is_half_a_scale_at_most_and_codes_fit(bits, group):
    weight = correlated()[0]
    rounded = round_nearest(weight, bits, group)
    half = 1 << (bits - 1)
    assert rounded.codes.min() >= -half
    assert rounded.codes.max() <= half - 1
    spread = np.repeat(np.abs(rounded.scales), rounded.group, axis=1)[:, : weight.shape[1]]
    inside = np.abs(weight) <= (half - 1.5) * spread
    assert (np.abs(rounded.dense() - weight) <= 0.501 * spread)[inside].all()


def test_relative_error_is_the_outputs():
    weight, x, gram = correlated()
    got = round_nearest(weight, 4, 32).dense()
    want = np.sum((x @ (got - weight).T) ** 2) / np.sum((x @ weight.T) ** 2)
    assert relative_error(weight, got, gram) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("group", [16, 32, 96, 0])
def test_each_method_beats_the_simpler_one_where_inputs_depend_on_each_other(group):
    weight, _, gram = correlated()
    nearest, best = round_nearest(weight, 4, group), round_best_scales(weight, 4, group, np.diagonal(gram))
    feedback = round_with_feedback(weight, 4, group, gram)
    errors = [relative_error(weight, each.dense(), gram) for each in (nearest, best, feedback)]
    assert errors[1] < errors[0]
    assert errors[2] < 0.8 * errors[1]  # about 1 dB and more


def test_feedback_is_nearest_where_inputs_are_white():
    weight = correlated()[0]
    rounded = round_with_feedback(weight, 4, 32, np.eye(weight.shape[1]))
    np.testing.assert_array_equal(rounded.dense(), round_best_scales(weight, 4, 32).dense())


def test_feedback_survives_inputs_that_never_move():
    weight, _, gram = correlated()
    gram[:, 5] = gram[5, :] = 0.0
    assert np.isfinite(round_with_feedback(weight, 4, 32, gram).dense()).all()
    assert np.isfinite(round_with_feedback(weight, 4, 32, np.zeros_like(gram)).dense()).all()


def test_branch_takes_what_is_of_low_rank():
    weight, _, gram = correlated()
    rng = np.random.default_rng(4)
    outlier = rng.standard_normal((40, 2)) @ rng.standard_normal((2, 96)) * 10
    hard = (weight * 0.05 + outlier).astype(np.float32)
    branch, rounded = with_low_rank(hard, 2, lambda target: round_nearest(target, 4, 32), gram=gram)
    error = relative_error(hard, rounded.dense() + branch.dense(), gram)
    assert error < 1e-3 * relative_error(hard, round_nearest(hard, 4, 32).dense(), gram)
    np.testing.assert_array_equal(branch.up, branch.up.astype(np.float16).astype(np.float32))


def test_fit_keeps_the_best_and_says_what_it_compared():
    weight, _, gram = correlated()
    seen = InputStatistics(gram, np.diagonal(gram))
    fit = fit_weight(weight, LayerRule("int4", "dynamic", group=32), seen)
    assert set(fit.error_db) == {"nearest", "best scales", "error feedback"}
    assert fit.method == max(fit.error_db, key=lambda name: fit.error_db[name]) == "error feedback"
    want = -10 * np.log10(relative_error(weight, fit.dense(), gram))
    assert fit.error_db[fit.method] == pytest.approx(want, abs=1e-3)


def test_fit_of_a_convolution_weighs_input_channels():
    weight = np.random.default_rng(5).standard_normal((8, 6, 3, 3)).astype(np.float32)
    seen = InputStatistics(None, np.array([1e4, 1.0, 1.0, 1.0, 1.0, 1.0]))
    fit = fit_weight(weight, LayerRule("int4", "float32", group=18), seen)
    evenly = round_best_scales(weight.reshape(8, -1), 4, 18).dense()
    loud = [float(np.sum((got - weight.reshape(8, -1))[:, :9] ** 2)) for got in (fit.dense(), evenly)]
    assert loud[0] < 0.9 * loud[1]  # the loud channel's nine taps are the ones that are kept
    assert fit.method == "best scales"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w: round_nearest(w, 3), "so many bits, got 3, expected 4 or 8"),
        (lambda w: round_nearest(w * np.nan, 4), "values not finite"),
        (lambda w: round_with_feedback(w, 4, 32, np.eye(5)), "Gram matrix does not fit"),
        (lambda w: round_best_scales(w, 4, 32, np.ones(5)), "second moments do not fit"),
        (lambda w: with_low_rank(w, 40, lambda t: round_nearest(t, 4)), "no branch of this rank, got 40"),
        (lambda w: fit_weight(w, LayerRule()), "weights to round, got float32"),
        (lambda w: fit_weight(w[:, :, None, None], LayerRule("int4", "float32", 0, 2)), "stands beside linears only"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(PrecisionError, match=words):
        call(correlated()[0])
