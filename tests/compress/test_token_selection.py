"""Choice per token: the Gram form is brute force, tokens and branches do not see each other, poison is not read."""

from typing import Any

import numpy as np
import pytest
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.ladders import LadderSpec, ladder_rows
from latentrelay.compress.token_selection import combine, row_errors, select, select_brute_force

MASK = ("full",) * 3 + ("predicted",) * 6
SPEC = LadderSpec((0, 1, 2), horizon=4)
ROWS = ladder_rows(MASK, 0, 9, SPEC, np.arange(9.0))[1][8]


@pytest.fixture
def streams() -> tuple[Any, Any, Any]:
    """A probe's ladder, the probe of now, and the ladder of a wider stream on the same tokens."""
    rng = np.random.default_rng(0)
    ladder = (
        rng.standard_normal((3, 2, 5, 6, 7)).astype(np.float32) * np.array([1, 0.1, 0.01])[:, None, None, None, None]
    )
    now = ladder[0] + rng.standard_normal((2, 1, 6, 7)).astype(np.float32) * 4 * ladder[1]
    feature = rng.standard_normal((3, 2, 11, 6, 7)).astype(np.float32)
    return ladder.astype(np.float32), now.astype(np.float32), feature


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_gram_form_is_brute_force(streams: Any, metric: Any) -> None:
    ladder, now, _ = streams
    index, error = select(ROWS, ladder, now, metric)
    expected, expected_error = select_brute_force(ROWS, ladder, now, metric)
    assert np.array_equal(index, expected)
    assert error == pytest.approx(expected_error, rel=1e-4)
    assert error.dtype == np.float32
    assert len(np.unique(index)) > 3  # a choice, not a constant
    chosen = np.take_along_axis(row_errors(ROWS, ladder, now, metric), index[None], axis=0)[0]
    assert np.array_equal(chosen, row_errors(ROWS, ladder, now, metric).min(axis=0))


def test_l2_by_hand() -> None:
    ladder = np.array([[[[[1.0]]], [[[1.0]]]], [[[[1.0]]], [[[1.0]]]]], np.float32)  # rungs 1 and 1, both branches
    now = np.array([[[[3.0]]], [[[1.2]]]], np.float32)
    index, error = select(np.array([[1.0, 0.0], [1.0, 2.0]]), ladder, now, "l2")
    assert index.ravel().tolist() == [1, 0]  # 3 is 1 + 2, 1.2 is nearer to 1
    assert error == pytest.approx(0.2**2 / (3.0**2 + 1.2**2), rel=1e-5)


def test_cosine_does_not_see_scale() -> None:
    ladder = np.zeros((2, 2, 2, 1, 1), np.float32)
    ladder[0, :, 0], ladder[1, :, 1] = 1.0, 1.0  # (1, 0), and a rung towards (0, 1)
    now = np.tile(np.array([5.0, 5.0], np.float32)[None, :, None, None], (2, 1, 1, 1))
    assert select(np.array([[1.0, 0.0], [1.0, 1.0]]), ladder, now, "cosine")[0].ravel().tolist() == [1, 1]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_permuting_tokens_permutes_and_branches_are_apart(streams: Any, metric: Any) -> None:
    ladder, now, feature = streams
    order = np.random.default_rng(1).permutation(42)

    def permuted(values: Any) -> Any:
        return values.reshape(*values.shape[:-2], 42)[..., order].reshape(values.shape)

    index = select(ROWS, ladder, now, metric)[0]
    moved = select(ROWS, permuted(ladder), permuted(now), metric)[0]
    assert np.array_equal(moved, permuted(index))
    assert np.array_equal(combine(ROWS, permuted(feature), moved), permuted(combine(ROWS, feature, index)))
    for branch in (0, 1):
        alone = select(ROWS, ladder[:, branch : branch + 1], now[branch : branch + 1], metric)[0]
        assert np.array_equal(alone[0], index[branch])


def test_each_token_takes_its_row(streams: Any) -> None:
    _, _, feature = streams
    index = np.random.default_rng(2).integers(len(ROWS), size=(2, 6, 7))
    expected = np.einsum("bhwo,obchw->bchw", ROWS[index], feature.astype(np.float64))
    assert np.allclose(combine(ROWS, feature, index), expected, atol=1e-4)
    assert np.allclose(combine(ROWS, feature, None), np.einsum("o,obchw->bchw", ROWS[0], feature), atol=1e-4)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_rungs_that_no_row_uses_are_not_read(streams: Any, metric: Any) -> None:
    ladder, now, feature = streams
    rows = np.array([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    poisoned, spoilt = ladder.copy(), feature.copy()
    poisoned[2], spoilt[2] = np.nan, np.nan
    index, error = select(rows, poisoned, now, metric)
    assert np.array_equal(index, select(rows, ladder, now, metric)[0])
    assert np.isfinite(error)
    assert np.array_equal(combine(rows, spoilt, index), combine(rows, feature, index))


def test_order_0_is_the_held_value_bit_for_bit(streams: Any) -> None:
    _, _, feature = streams
    assert combine(np.array([[1.0, 0.0, 0.0]]), feature, None).tobytes() == feature[0].tobytes()


def test_an_unknown_metric_is_named(streams: Any) -> None:
    ladder, now, _ = streams
    with pytest.raises(PredictionError, match=r"l2 \| cosine"):
        select(ROWS, ladder, now, "l1")  # type: ignore[arg-type]
