"""PSNR and SSIM against values by hand and by scikit-image; summaries of pairs whose differences are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.picture_scores import EQUAL_DB, Scored, psnr_db, ssim, summary


def flat(value: int, side: int = 16) -> Any:
    return np.full((1, side, side, 3), value, np.uint8)


def test_psnr_by_hand() -> None:
    assert psnr_db(flat(100), flat(110))[0] == pytest.approx(20 * np.log10(255 / 10))
    assert psnr_db(flat(7), flat(7))[0] == EQUAL_DB
    one = flat(7)
    one[0, 0, 0, 0] += 1
    assert psnr_db(one, flat(7))[0] == pytest.approx(20 * np.log10(255) + 10 * np.log10(16 * 16 * 3))
    both = psnr_db(np.concatenate([flat(0), flat(5)]), np.concatenate([flat(255), flat(5)]))
    assert both.tolist() == pytest.approx([0.0, EQUAL_DB])


def test_ssim_of_flat_pictures_by_hand() -> None:
    """Without variance only the luminance term is left: (2 a b + c) / (a a + b b + c), c = 2.55 squared."""
    c = 2.55**2
    assert ssim(flat(100), flat(110))[0] == pytest.approx((2 * 100 * 110 + c) / (100**2 + 110**2 + c))
    assert ssim(flat(9), flat(9))[0] == pytest.approx(1.0)


def test_ssim_as_scikit_image_computes_it() -> None:
    """scikit-image 0.26.0: structural_similarity(a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=255)."""
    y, x = np.mgrid[0:24, 0:32]
    a = np.stack([(x * 8) % 256, (y * 10) % 256, (x * y) % 256], -1).astype(np.uint8)
    b = np.clip(a.astype(int) + ((x * 7 + y * 13) % 23 - 11)[..., None], 0, 255).astype(np.uint8)
    assert ssim(a[None], b[None])[0] == pytest.approx(0.9274063947584973, abs=1e-9)


def test_small_pictures_are_refused() -> None:
    with pytest.raises(RequestError, match="11 pixels"):
        ssim(flat(0, 10), flat(0, 10))


def scored(accuracy: Any, features: Any) -> Scored:
    count = len(accuracy)
    return Scored(np.asarray(accuracy), np.zeros(count), np.full(count, 30.0), np.full(count, 0.5), features)


def test_a_summary_of_known_differences() -> None:
    from latentrelay.reference.judge import Statistics

    rng = np.random.default_rng(1)
    accuracy, features = rng.random(200), rng.normal(size=(200, 4))
    baseline = scored(accuracy, features)
    renderings = Statistics(np.zeros(4), np.eye(4))
    same = summary(scored(accuracy, features), baseline, renderings)
    assert same["attribute_accuracy_difference_95"] == [0.0, 0.0]
    assert same["frechet_ratio"] == pytest.approx(1.0)
    assert same["frechet_ratio_95"] == pytest.approx([1.0, 1.0])

    worse = summary(scored(accuracy - 0.25, features + 3.0), baseline, renderings)
    assert worse["attribute_accuracy_difference"] == pytest.approx(-0.25)
    assert worse["attribute_accuracy_difference_95"] == pytest.approx([-0.25, -0.25])  # paired: no spread is left
    assert worse["attribute_accuracy"] == pytest.approx(accuracy.mean() - 0.25)
    shifted = np.square(features.mean(0) + 3.0).sum() - np.square(features.mean(0)).sum()
    assert worse["frechet_distance"] - same["frechet_distance"] == pytest.approx(shifted)
    low, high = worse["frechet_ratio_95"]
    assert 5 < low < high

    noisy = summary(scored(accuracy + rng.choice([-0.5, 0.5], 200), features), baseline, renderings)
    low, high = noisy["attribute_accuracy_difference_95"]
    assert low < noisy["attribute_accuracy_difference"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(200), rel=0.15)


def test_distances_of_draws_are_the_judges_distances() -> None:
    from latentrelay.reference.judge import Statistics, frechet_distance
    from latentrelay.tools.picture_scores import _distance

    rng = np.random.default_rng(2)
    renderings = Statistics.of(rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)))
    values, vectors = np.linalg.eigh(renderings.covariance)
    half = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    for count in (40, 3):  # the second: fewer rows than features, a singular covariance
        features = rng.normal(size=(count, 6)) @ rng.normal(size=(6, 6)) + 1
        expected = frechet_distance(Statistics.of(features), renderings)
        assert _distance(features, renderings, half) == pytest.approx(expected, rel=1e-6)


def test_joining_keeps_the_order() -> None:
    parts = [scored([0.1, 0.2], np.zeros((2, 4))), scored([0.3], np.ones((1, 4)))]
    whole = Scored.joined(parts)
    assert whole.accuracy.tolist() == [0.1, 0.2, 0.3]
    assert whole.features.shape == (3, 4)
    assert Scored(**whole.arrays()).accuracy.tolist() == [0.1, 0.2, 0.3]
