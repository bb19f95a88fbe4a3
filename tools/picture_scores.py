"""How near two pictures are (PSNR, SSIM), and how a set of pictures scores against a baseline, paired by caption.

Pictures are uint8 (N, H, W, 3), as a PNG holds them. PSNR has peak 255 and is capped at 100 dB, what equal pictures
count as (pictures that differ at all stay below 98 dB up to 256x256). SSIM is Wang et al. 2004 as scikit-image computes
it with `gaussian_weights=True, use_sample_covariance=False`: 11x11 Gaussian of sigma 1.5, each channel by itself, the
mean over the positions where the window fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from latentrelay.runtime.errors import RequestError
from numpy.typing import NDArray

EQUAL_DB = 100.0
_REACH, _SIGMA = 5, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_FRECHET_DRAWS = 200

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def psnr_db(pictures: Bytes, references: Bytes) -> Floats:
    """(N,) decibels of (N, H, W, 3) pictures against as many references."""
    gap = pictures.astype(np.float64) - references
    squared = np.square(gap).mean((1, 2, 3))
    decibels: Floats = 20 * np.log10(255.0) - 10 * np.log10(np.maximum(squared, 1e-12))
    return np.minimum(decibels, EQUAL_DB)


def ssim(pictures: Bytes, references: Bytes) -> Floats:
    """(N,) structural similarities, 1 for equal pictures. Raises RequestError on sides below 11 pixels."""
    if min(pictures.shape[1:3]) <= 2 * _REACH:
        raise RequestError("the pictures are too small for SSIM", got=pictures.shape[1:3], expected="11 pixels a side")
    x, y = (values.transpose(0, 3, 1, 2).astype(np.float64) for values in (pictures, references))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    both = _blurred(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * both + _C2)
    found: Floats = (top / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean((1, 2, 3))
    return found


def _blurred(values: Floats) -> Floats:
    """Gaussian means where the window fits, (N, 3, H, W) to (N, 3, H - 10, W - 10), as two products with a band."""
    down, across = (_band(side) for side in values.shape[2:])
    blurred: Floats = down @ values @ across.T
    return blurred


def _band(side: int) -> Floats:
    taps = np.exp(-0.5 * (np.arange(-_REACH, _REACH + 1) / _SIGMA) ** 2)
    rows = side - 2 * _REACH
    band = np.zeros((rows, side))
    for i, tap in enumerate(taps / taps.sum()):
        band[np.arange(rows), np.arange(rows) + i] = tap
    return band


@dataclass(frozen=True, eq=False)
class Scored:
    """N pictures' scores, row i being caption i: accuracy (N,) and exact (N,) by the judge, its features (N, 64), and
    PSNR and SSIM (N,) to the baseline's picture."""

    accuracy: Floats
    exact: Floats
    psnr_db: Floats
    ssim: Floats
    features: Floats

    def arrays(self) -> dict[str, Floats]:
        """By field name, for a file."""
        return dict(vars(self))

    @classmethod
    def joined(cls, parts: Sequence[Scored]) -> Scored:
        """The parts one after the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def score_pictures(judge: Any, pictures: Bytes, references: Bytes, captions: Sequence[Any]) -> Scored:
    """Have the judge read (N, 128, 128, 3) pictures and compare them with the references."""
    import torch
    from latentrelay.reference import judge as judging

    scaled = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    readings, features = judging.read(judge, scaled)
    scores = [judging.score(reading, caption) for reading, caption in zip(readings, captions, strict=True)]
    return Scored(
        accuracy=np.array([item.accuracy for item in scores]),
        exact=np.array([float(item.exact) for item in scores]),
        psnr_db=psnr_db(pictures, references),
        ssim=ssim(pictures, references),
        features=features,
    )


def summary(found: Scored, baseline: Scored, renderings: Any) -> dict[str, Any]:
    """The figures of one row: means, and differences to the baseline with bootstrap 95 % intervals, paired by caption.

    `renderings` are the judge's statistics that Frechet distances are measured to.
    """
    from latentrelay.reference.judge import Statistics, frechet_distance
    from latentrelay.tools.evaluate import bootstrap_interval

    own, other = (frechet_distance(Statistics.of(each.features), renderings) for each in (found, baseline))
    gaps = found.accuracy - baseline.accuracy
    return {
        "attribute_accuracy": float(found.accuracy.mean()),
        "attribute_accuracy_difference": float(gaps.mean()),
        "attribute_accuracy_difference_95": list(bootstrap_interval(gaps.tolist())),
        "exact_scene_rate": float(found.exact.mean()),
        "frechet_distance": own,
        "frechet_ratio": own / other,
        "frechet_ratio_95": _ratio_interval(found.features, baseline.features, renderings),
        "psnr_db": float(found.psnr_db.mean()),
        "ssim": float(found.ssim.mean()),
    }


def _ratio_interval(found: Floats, baseline: Floats, renderings: Any) -> list[float]:
    """Bootstrap 95 % interval of the ratio of Frechet distances; both sides draw the same captions, seed fixed."""
    draws = np.random.default_rng(0).integers(0, len(found), size=(_FRECHET_DRAWS, len(found)))
    values, vectors = np.linalg.eigh(renderings.covariance)
    half = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    ratios = [_distance(found[rows], renderings, half) / _distance(baseline[rows], renderings, half) for rows in draws]
    return [float(end) for end in np.percentile(ratios, [2.5, 97.5])]


def _distance(features: Floats, renderings: Any, half: Floats) -> float:
    """`judge.frechet_distance` with the renderings' root at hand, which makes the eigenvalues a symmetric matrix's."""
    gap, covariance = features.mean(0) - renderings.mean, np.cov(features, rowvar=False)
    cross = np.sqrt(np.linalg.eigvalsh(half @ covariance @ half).clip(0)).sum()
    return float(gap @ gap + np.trace(covariance) + np.trace(renderings.covariance) - 2 * cross)
