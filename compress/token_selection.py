"""Which candidate predictor each token takes: the one that would have predicted the probe best.

In: a predicted step's candidate rows (P, M+1), the probe's ladder (M+1, 2, C, h, w) and the probe of the present input
(2, C, h, w). Out: the chosen row per guidance branch and token (2, h, w), and how far off the chosen rows are. All
candidates are linear in the same rungs, so their errors are quadratic forms of one small Gram matrix a token and no
(P, 2, C, h, w) array is ever built. A reconstruction in the spirit of TAP (arXiv 2603.03792).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from latentrelay.compress.errors import PredictionError
from numpy.typing import NDArray

Metric = Literal["l2", "cosine"]
METRICS: tuple[Metric, ...] = ("l2", "cosine")
Choice = Literal["l2", "cosine", "random"]  # "random" is a control for evaluations; no plan and no graph has it
_TINY = np.float32(1e-20)


def select(
    candidates: NDArray[np.float64], probe_ladder: NDArray[np.floating], probe: Floats, metric: Metric
) -> tuple[NDArray[np.int64], np.float32]:
    """The chosen row (2, h, w), the first of equals, and `probe_error`: squares that the chosen rows leave over the
    probe's own, whatever the metric. In float32. Every row begins with 1 (rung 0 is the last computed value); rungs
    that no row uses are not read. Raises PredictionError for an unknown metric."""
    rows, ladder = _used(candidates, probe_ladder)
    rest = probe - ladder[0]
    squares = _quadratic(rows[:, 1:], ladder[1:], probe) - 2.0 * _linear(rows[:, 1:], ladder[1:], rest)
    index = (squares if metric == "l2" else _cosine_distance(rows, ladder, probe, metric)).argmin(axis=0)
    left = np.take_along_axis(squares, index[None], axis=0)[0] + np.square(rest).sum(axis=1)
    total = np.square(probe).sum(dtype=np.float32)
    return index, np.float32(np.maximum(left, 0.0).sum(dtype=np.float32) / max(total, _TINY))


def row_errors(
    candidates: NDArray[np.float64], probe_ladder: NDArray[np.floating], probe: Floats, metric: Metric
) -> Floats:
    """Every candidate's error (P, 2, h, w) on the probe by the Gram form: squares over channels, or 1 - cosine."""
    rows, ladder = _used(candidates, probe_ladder)
    if metric != "l2":
        return _cosine_distance(rows, ladder, probe, metric)
    rest = probe - ladder[0]
    squares = _quadratic(rows[:, 1:], ladder[1:], probe) - 2.0 * _linear(rows[:, 1:], ladder[1:], rest)
    found: Floats = np.maximum(squares + np.square(rest).sum(axis=1), np.float32(0.0))
    return found


def select_brute_force(
    candidates: NDArray[np.float64], probe_ladder: NDArray[np.floating], probe: Floats, metric: Metric
) -> tuple[NDArray[np.int64], np.float32]:
    """The same by building every candidate's prediction, in float64: what `select` is tested against."""
    z = probe.astype(np.float64)
    squares, errors = [], []
    for row in candidates:
        predicted = sum(weight * probe_ladder[rung].astype(np.float64) for rung, weight in enumerate(row) if weight)
        squares.append(np.square(predicted - z).sum(axis=1))
        norms = np.square(predicted).sum(axis=1) * np.square(z).sum(axis=1)
        errors.append(1.0 - (predicted * z).sum(axis=1) / np.sqrt(np.maximum(norms, _TINY)))
    chosen = np.stack(squares if metric == "l2" else errors).argmin(axis=0)
    left = np.take_along_axis(np.stack(squares), chosen[None], axis=0).sum()
    return chosen, np.float32(left / max(np.square(z).sum(), _TINY))


def combine(
    candidates: NDArray[np.float64], ladder: NDArray[np.floating], index: NDArray[np.int64] | None
) -> NDArray[np.float32]:
    """The predicted stream (2, C, h, w), `sum_o w_o L_o` in float32: w is each token's chosen row, or the first one
    where `index` is None. Rungs whose coefficients are all 0 are not read."""
    rows = candidates.astype(np.float32)
    predicted = None
    for rung, weights in enumerate(rows.T):
        if weights.any():
            weight = weights[0] if index is None else weights[index][:, None]  # (2, 1, h, w)
            term = weight * ladder[rung].astype(np.float32)
            predicted = term if predicted is None else predicted + term
    return np.zeros(ladder.shape[1:], dtype=np.float32) if predicted is None else predicted


def _used(candidates: NDArray[np.float64], ladder: NDArray[np.floating]) -> tuple[Floats, list[Floats]]:
    """Rows (P, rungs) and rungs that any row but rung 0 reads, float32."""
    rows = candidates.astype(np.float32)
    used = [rung for rung in range(rows.shape[1]) if rung == 0 or rows[:, rung].any()]
    return rows[:, used], [ladder[rung].astype(np.float32) for rung in used]


def _cosine_distance(rows: Floats, ladder: list[Floats], probe: Floats, metric: str) -> Floats:
    """1 - cosine of every row's prediction with the probe, (P, 2, h, w)."""
    if metric != "cosine":
        raise PredictionError("unknown metric", got=metric, expected=" | ".join(METRICS))
    norms = _quadratic(rows, ladder, probe) * np.square(probe).sum(axis=1)
    distance: Floats = 1.0 - _linear(rows, ladder, probe) / np.sqrt(np.maximum(norms, _TINY))
    return distance


def _quadratic(weights: Floats, rungs: list[Floats], like: Floats) -> Floats:
    """c' G c per token, (P, 2, h, w)."""
    found = np.zeros((len(weights), like.shape[0], *like.shape[2:]), dtype=np.float32)
    for i, left in enumerate(rungs):
        for j, right in enumerate(rungs[: i + 1]):
            pair = weights[:, i] * weights[:, j] * np.float32(1.0 if i == j else 2.0)
            found += pair[:, None, None, None] * (left * right).sum(axis=1)
    return found


def _linear(weights: Floats, rungs: list[Floats], other: Floats) -> Floats:
    """c . d per token, (P, 2, h, w)."""
    found = np.zeros((len(weights), other.shape[0], *other.shape[2:]), dtype=np.float32)
    for i, rung in enumerate(rungs):
        found += weights[:, i, None, None, None] * (rung * other).sum(axis=1)
    return found
