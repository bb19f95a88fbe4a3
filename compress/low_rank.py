"""A float branch of low rank beside 4-bit weights: W x ~ Q x + U (V x), after SVDQuant (arXiv 2411.05007).

In: a weight (out, in), the rank, how the remainder is rounded, and the inputs' second moments or Gram matrix. Out: the
two factors and the rounded remainder. The singular vectors are taken in the metric of the inputs, which does what
SVDQuant's smoothing does for columns that see large activations; then remainder and branch are refitted to each other
a few times. Activations are not smoothed in the graph: a branch here corrects weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from latentrelay.compress.errors import PrecisionError
from latentrelay.compress.weight_rounding import Doubles, Floats, RoundedWeight, relative_error

_ROUNDS = 4
_DAMPING = 1e-4  # of the largest eigenvalue: directions that calibration hardly saw keep a say


@dataclass(frozen=True, eq=False)
class LowRank:
    """`up` (out, rank) and `down` (rank, in), float32 values that are exact in float16, as they are stored."""

    up: Floats
    down: Floats

    def dense(self) -> Floats:
        """The branch as one matrix (out, in)."""
        product: Floats = self.up @ self.down
        return product


def with_low_rank(
    weight: Floats,
    rank: int,
    rounding: Callable[[Floats], RoundedWeight],
    *,
    gram: Doubles | None = None,
    moments: Doubles | None = None,
) -> tuple[LowRank, RoundedWeight]:
    """The best branch and rounded remainder of a few alternations, by the layer's output error.

    `rounding` turns a remainder (out, in) into codes. Raises PrecisionError unless 1 <= rank < min(out, in).
    """
    if not 1 <= rank < min(weight.shape):
        raise PrecisionError("no branch of this rank", got=rank, expected=f"1 .. {min(weight.shape) - 1}")
    root, inverse = _metric(weight.shape[1], gram, moments)
    found: tuple[float, LowRank, RoundedWeight] | None = None
    target = weight
    for _ in range(_ROUNDS):
        branch = _truncated(target, rank, root, inverse)
        rounded = rounding(weight - branch.dense())
        error = relative_error(weight, rounded.dense() + branch.dense(), gram, moments)
        if found is None or error < found[0]:
            found = (error, branch, rounded)
        target = weight - rounded.dense()
    if found is None:
        raise PrecisionError("no branch was fitted", got=_ROUNDS, expected="at least one round")
    return found[1], found[2]


def _metric(columns: int, gram: Doubles | None, moments: Doubles | None) -> tuple[Doubles, Doubles]:
    """S and its inverse, both (in, in), with S S^T the inputs' Gram matrix up to scale."""
    if gram is None:
        scale = np.ones(columns) if moments is None else np.sqrt(np.maximum(moments, moments.max() * _DAMPING))
        return np.diag(scale), np.diag(1.0 / scale)
    values, vectors = np.linalg.eigh(gram)
    scale = np.sqrt(np.maximum(values, values.max() * _DAMPING))
    return vectors * scale, (vectors / scale).T


def _truncated(target: Floats, rank: int, root: Doubles, inverse: Doubles) -> LowRank:
    left, singular, right = np.linalg.svd(target.astype(np.float64) @ root, full_matrices=False)
    share = np.sqrt(singular[:rank])  # both factors of one size, so that neither leaves float16's range
    up, down = left[:, :rank] * share, (share[:, None] * right[:rank]) @ inverse
    return LowRank(_as_stored(up), _as_stored(down))


def _as_stored(factor: Doubles) -> Floats:
    limit = float(np.finfo(np.float16).max)
    return np.clip(factor, -limit, limit).astype(np.float16).astype(np.float32)
