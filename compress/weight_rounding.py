"""Weights to integers with a scale per group of inputs: nearest, best scales, and error feedback.

In: a weight matrix (out, in) float32 (a convolution's as (out, in * kh * kw)) and, where there is one, what its inputs
look like: their second moments (in,) or their Gram matrix (in, in), sums over calibration tokens. Out: `RoundedWeight`,
symmetric codes without zero points. Error feedback is the column-by-column update of GPTQ (arXiv 2210.17323) in plain
column order, with scales searched per group as it is reached; all results are rounded by the same scales at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from latentrelay.compress.errors import PrecisionError
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_SHRINK = np.linspace(0.6, 1.0, 9)  # of the scale that just reaches the group's extreme value
_DAMPING = 0.01  # of the Gram matrix's mean diagonal, added to it
_BLOCK = 64  # columns between two updates of all later ones


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """`codes` (out, in) int8 in -2^(bits-1) .. 2^(bits-1)-1; `scales` (out, ceil(in / group)) float32, of either sign:
    the code range has one more value below zero, which goes to the side where the group reaches further."""

    codes: NDArray[np.int8]
    scales: Floats
    bits: int
    group: int

    def dense(self) -> Floats:
        """What the device multiplies by, (out, in) float32."""
        spread = np.repeat(self.scales, self.group, axis=1)[:, : self.codes.shape[1]]
        return self.codes * spread


def round_nearest(weight: Floats, bits: int, group: int = 0) -> RoundedWeight:
    """Every weight to its nearest code, scales from each group's extreme value; `group` 0 is a whole row.

    Raises PrecisionError unless bits is 4 or 8 and the weight is finite.
    """
    group = _checked(weight, bits, group)
    grouped = _grouped(weight, group)
    scales = _reaching(grouped, bits)
    return _assemble(_codes(grouped, scales, bits), scales, weight.shape[1], bits, group)


def round_best_scales(weight: Floats, bits: int, group: int = 0, moments: Doubles | None = None) -> RoundedWeight:
    """The same with each group's scale chosen by the error it leaves: 18 candidates of both signs, then a refit.

    `moments` (in,): mean squares of the inputs, the weight of each column's error; None counts all the same.
    """
    group = _checked(weight, bits, group)
    grouped = _grouped(weight, group)
    importance = _grouped(_importance(weight.shape[1], moments)[None, :], group)
    scales = _best_scales(grouped, importance, bits)
    return _assemble(_codes(grouped, scales, bits), scales, weight.shape[1], bits, group)


def round_with_feedback(weight: Floats, bits: int, group: int, gram: Doubles) -> RoundedWeight:
    """Column by column, each column's rounding error carried into the columns that are still to come.

    `gram` (in, in): sum of x x^T over the layer's inputs; singular ones are damped. Raises PrecisionError where its
    shape is not the weight's.
    """
    group = _checked(weight, bits, group)
    columns = weight.shape[1]
    if gram.shape != (columns, columns):
        raise PrecisionError("a Gram matrix does not fit", got=gram.shape, expected=(columns, columns))
    factor = _inverse_factor(gram)
    importance = _importance(columns, np.diagonal(gram))
    rest = weight.astype(np.float64)
    codes = np.zeros(weight.shape, dtype=np.int8)
    scales = np.zeros((weight.shape[0], -(-columns // group)), dtype=np.float32)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = np.zeros((weight.shape[0], stop - start))
        for j in range(start, stop):
            if j % group == 0:
                # What the block's earlier columns still owe to this group, so that its scale sees the true weights.
                end = min(j + group, columns)
                ahead = rest[:, j:end].copy()
                if end > stop:
                    ahead[:, stop - j :] -= errors[:, : j - start] @ factor[start:j, stop:end]
                scales[:, j // group] = _best_scales(ahead[:, None, :], importance[None, None, j:end], bits)[:, 0]
            scale = scales[:, j // group].astype(np.float64)
            codes[:, j] = _codes(rest[:, j, None, None], scale[:, None], bits)[:, 0, 0]
            error = (rest[:, j] - codes[:, j] * scale) / factor[j, j]
            rest[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return RoundedWeight(codes, scales, bits, group)


def relative_error(weight: Floats, got: Floats, gram: Doubles | None = None, moments: Doubles | None = None) -> float:
    """Share of the layer's output energy that the difference of two weights makes: tr(D G D^T) / tr(W G W^T).

    With `moments` alone the inputs count as uncorrelated; with neither as white.
    """
    difference, base = got.astype(np.float64) - weight, weight.astype(np.float64)
    if gram is not None:
        return float(np.sum((difference @ gram) * difference) / max(np.sum((base @ gram) * base), 1e-300))
    importance = _importance(weight.shape[1], moments)
    return float(np.sum(difference**2 * importance) / max(np.sum(base**2 * importance), 1e-300))


def _checked(weight: Floats, bits: int, group: int) -> int:
    if bits not in (4, 8):
        raise PrecisionError("weights cannot have so many bits", got=bits, expected="4 or 8")
    if weight.ndim != 2 or not np.isfinite(weight).all():
        got = f"{weight.shape}, {int(weight.size - np.isfinite(weight).sum())} values not finite"
        raise PrecisionError("a weight cannot be rounded", got=got, expected="a finite matrix (out, in)")
    return group or weight.shape[1]


def _importance(columns: int, moments: Doubles | None) -> Doubles:
    if moments is None:
        return np.ones(columns)
    if moments.shape != (columns,):
        raise PrecisionError("second moments do not fit", got=moments.shape, expected=(columns,))
    mean = float(np.mean(moments))
    return np.maximum(moments / mean, 1e-6) if mean > 0 else np.ones(columns)


def _grouped(matrix: NDArray[np.floating], group: int) -> Doubles:
    """(rows, columns) -> (rows, groups, group), zeros after the last column."""
    rows, columns = matrix.shape
    groups = -(-columns // group)
    padded = np.zeros((rows, groups * group))
    padded[:, :columns] = matrix
    return padded.reshape(rows, groups, group)


def _reaching(grouped: Doubles, bits: int) -> Floats:
    """Scales (rows, groups) whose lowest code is each group's extreme value; 1 where a group is all zeros."""
    at = np.abs(grouped).argmax(-1)
    extreme = np.take_along_axis(grouped, at[..., None], -1)[..., 0]
    scales = (extreme / -(1 << (bits - 1))).astype(np.float32)
    scales[scales == 0.0] = 1.0
    return scales


def _codes(grouped: NDArray[np.floating], scales: NDArray[np.floating], bits: int) -> NDArray[np.int8]:
    half = 1 << (bits - 1)
    return np.clip(np.rint(grouped / scales[..., None]), -half, half - 1).astype(np.int8)


def _best_scales(grouped: Doubles, importance: Doubles, bits: int) -> Floats:
    values, weights = grouped.astype(np.float32), np.broadcast_to(importance, grouped.shape).astype(np.float32)
    best = _reaching(grouped, bits)
    lowest = _group_error(values, weights, best, bits)
    for factor in (*_SHRINK, *(-_SHRINK)):
        best, lowest = _better(best, lowest, values, weights, _reaching(grouped, bits) * np.float32(factor), bits)
    codes = _codes(values, best, bits).astype(np.float32)
    energy = np.einsum("rgi,rgi->rg", weights * codes, codes)
    refit = np.divide(np.einsum("rgi,rgi->rg", weights * codes, values), energy, out=best.copy(), where=energy > 0)
    return _better(best, lowest, values, weights, refit, bits)[0]


def _better(
    best: Floats, lowest: Floats, values: Floats, weights: Floats, scales: Floats, bits: int
) -> tuple[Floats, Floats]:
    scales = np.where(scales == 0.0, np.float32(1.0), scales)
    error = _group_error(values, weights, scales, bits)
    return np.where(error < lowest, scales, best), np.minimum(error, lowest)


def _group_error(values: Floats, weights: Floats, scales: Floats, bits: int) -> Floats:
    half = np.float32(1 << (bits - 1))
    difference = values / scales[..., None]
    np.clip(np.rint(difference), -half, half - 1, out=difference)
    difference *= scales[..., None]
    difference -= values
    error: Floats = np.einsum("rgi,rgi->rg", weights * difference, difference)
    return error


def _inverse_factor(gram: Doubles) -> Doubles:
    """Upper Cholesky factor of the damped Gram matrix's inverse; row j scales the feedback of column j."""
    damped = np.array(gram, dtype=np.float64)
    size = len(damped)
    mean = float(np.mean(np.diagonal(damped)))
    damped[np.arange(size), np.arange(size)] += _DAMPING * mean if mean > 0 else 1.0
    factor: Doubles = np.linalg.cholesky(np.linalg.inv(damped)).T
    return factor


def _assemble(codes: NDArray[np.int8], scales: Floats, columns: int, bits: int, group: int) -> RoundedWeight:
    flat = codes.reshape(codes.shape[0], -1)[:, :columns]
    return RoundedWeight(np.ascontiguousarray(flat), scales.astype(np.float32), bits, group)
