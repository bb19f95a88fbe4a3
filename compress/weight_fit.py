"""How one layer's weights are turned into integers: every method tried, the one with the least output error kept.

In: a layer's float weights (out, in[, kh, kw]), its `LayerRule` and what calibration saw at its input. Out: a
`WeightFit`: codes, scales, the low-rank branch where the rule has one, and the error of each method, so that a report
shows what was compared. The error is the share of the layer's output energy over calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.low_rank import LowRank, with_low_rank
from latentrelay.compress.precision import LayerRule
from latentrelay.compress.weight_rounding import (
    Doubles,
    Floats,
    RoundedWeight,
    relative_error,
    round_best_scales,
    round_nearest,
    round_with_feedback,
)

_BITS = {"int8": 8, "int4": 4}
NEAREST, BEST_SCALES, FEEDBACK = "nearest", "best scales", "error feedback"


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """Sums over a layer's calibration inputs: `gram` (in, in) of x x^T, or only `moments` (in,) of x^2 for layers whose
    Gram matrix would be too large, and for convolutions, where it is per input channel."""

    gram: Doubles | None
    moments: Doubles


@dataclass(frozen=True, eq=False)
class WeightFit:
    """The result: `rounded` (out, in * kh * kw), `branch` or None, and `error_db` by method (output error, higher is
    better); `method` is the one kept."""

    rounded: RoundedWeight
    branch: LowRank | None
    method: str
    error_db: Mapping[str, float]

    def dense(self) -> Floats:
        """What the layer multiplies by, (out, in * kh * kw) float32."""
        return self.rounded.dense() if self.branch is None else self.rounded.dense() + self.branch.dense()


def fit_weight(weight: Floats, rule: LayerRule, seen: InputStatistics | None = None) -> WeightFit:
    """Round one layer's weights by every method that its rule and statistics allow.

    8 bits: to the nearest. 4 bits: nearest, best scales, and with a Gram matrix error feedback; each with the rule's
    branch where `rule.rank` > 0. Raises PrecisionError for a rule without integer weights, or a branch on a
    convolution.
    """
    if rule.weights not in _BITS:
        raise PrecisionError("weights to round", got=rule.weights, expected=" | ".join(_BITS))
    if rule.rank and weight.ndim != 2:
        raise PrecisionError("a low-rank branch stands beside linears only", got=f"rank {rule.rank}", expected="0")
    matrix = weight.reshape(weight.shape[0], -1)
    bits = _BITS[rule.weights]
    gram, moments = _statistics(weight, seen)
    if bits == 8:
        rounded = round_nearest(matrix, bits, rule.group)
        return WeightFit(rounded, None, NEAREST, {NEAREST: _db(matrix, rounded.dense(), gram, moments)})
    fits = {
        name: _with_branch(matrix, name, bits, rule, gram, moments)
        for name in (NEAREST, BEST_SCALES, *((FEEDBACK,) if gram is not None else ()))
    }
    error_db = {name: _db(matrix, _dense(*fit), gram, moments) for name, fit in fits.items()}
    kept = max(error_db, key=lambda name: error_db[name])
    rounded, branch = fits[kept]
    return WeightFit(rounded, branch, kept, error_db)


def _with_branch(
    matrix: Floats, method: str, bits: int, rule: LayerRule, gram: Doubles | None, moments: Doubles | None
) -> tuple[RoundedWeight, LowRank | None]:
    def rounding(target: Floats) -> RoundedWeight:
        if method == FEEDBACK and gram is not None:
            return round_with_feedback(target, bits, rule.group, gram)
        if method == BEST_SCALES:
            return round_best_scales(target, bits, rule.group, moments)
        return round_nearest(target, bits, rule.group)

    if not rule.rank:
        return rounding(matrix), None
    branch, rounded = with_low_rank(matrix, rule.rank, rounding, gram=gram, moments=moments)
    return rounded, branch


def _statistics(weight: Floats, seen: InputStatistics | None) -> tuple[Doubles | None, Doubles | None]:
    """Gram matrix and second moments per column of the flattened weight; a channel's moment holds for all its taps."""
    if seen is None:
        return None, None
    taps = math.prod(weight.shape[2:])
    return (seen.gram if weight.ndim == 2 else None), np.repeat(seen.moments, taps)


def _dense(rounded: RoundedWeight, branch: LowRank | None) -> Floats:
    return rounded.dense() if branch is None else rounded.dense() + branch.dense()


def _db(weight: Floats, got: Floats, gram: Doubles | None, moments: Doubles | None) -> float:
    return round(-10.0 * math.log10(max(relative_error(weight, got, gram, moments), 1e-20)), 3)
