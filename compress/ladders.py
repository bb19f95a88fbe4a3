"""Difference ladders: what is kept of a stream at computed steps, and the rows that predict from it at the others.

In: a split's mask, the abscissa of every step (its index, or its log-SNR) and which orders and horizons are allowed.
Out: float64 tables for the step graphs, `update` (N, M+1, 2+M) and `candidates` (N, P, M+1), M the highest order. A
rung is a backward difference over the latest gap (Taylor: coefficients u^o / o!) or a divided difference (Newton, whose
prediction passes through the older anchors too). A reconstruction in the spirit of TAP (arXiv 2603.03792) and
TaylorSeer (arXiv 2503.06923). It knows positions of steps only, never a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from latentrelay.compress.errors import PredictionError
from latentrelay.compress.solver_tables import SolverTable
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Abscissa = Literal["step", "logsnr"]
LadderKind = Literal["backward", "newton"]
MAX_ORDER = 2


@dataclass(frozen=True)
class LadderSpec:
    """Which predictors a predicted step may choose from.

    `orders` out of 0..2; `abscissa` and `kind` of the differences; `horizon` (lambda, in steps): besides the step's own
    position those up to `horizon` steps earlier are candidates; `clip_horizon` leaves out positions before the last
    computed step. Raises PredictionError.
    """

    orders: tuple[int, ...] = (1,)
    abscissa: Abscissa = "step"
    kind: LadderKind = "backward"
    horizon: int = 0
    clip_horizon: bool = False

    def __post_init__(self) -> None:
        orders = tuple(sorted(set(self.orders)))
        if not orders or orders != tuple(self.orders) or not 0 <= orders[0] <= orders[-1] <= MAX_ORDER:
            raise PredictionError("ladder orders", got=self.orders, expected=f"ascending numbers out of 0..{MAX_ORDER}")
        if self.abscissa not in ("step", "logsnr") or self.kind not in ("backward", "newton") or self.horizon < 0:
            raise PredictionError(
                "ladder",
                got=(self.abscissa, self.kind, self.horizon),
                expected="step | logsnr, backward | newton, a horizon of 0 or more",
            )

    @property
    def rungs(self) -> int:
        """M + 1."""
        return self.orders[-1] + 1

    def axis(self, table: SolverTable, prediction_type: str) -> Doubles:
        """The abscissa (N,) of this spec; the log-SNR needs the network's prediction type."""
        if self.abscissa == "step":
            return np.arange(len(table.rows), dtype=np.float64)
        return log_snr(table, prediction_type)


def log_snr(table: SolverTable, prediction_type: str) -> Doubles:
    """(N,) log(alpha^2 / sigma^2) of every step's sample, read off its row's `x0 = p x + q e`.

    `prediction_type`: "epsilon" (q = -sigma / alpha) or "v_prediction" (p = s alpha, q = -sigma for unit-variance
    samples). Not for LCM, whose x0 holds boundary scalings. Raises PredictionError for another type, and where a step
    has no finite ratio (a schedule that begins at pure noise): use the abscissa "step" there.
    """
    if prediction_type not in ("epsilon", "v_prediction"):
        raise PredictionError("log-SNR", got=prediction_type, expected="epsilon | v_prediction")
    ratios = [row.q if prediction_type == "epsilon" else row.q * row.s / row.p if row.p else 0.0 for row in table.rows]
    if not all(ratio < 0.0 and math.isfinite(ratio) for ratio in ratios) or table.needs_noise:
        raise PredictionError(
            "this schedule has no log-SNR at every step", got=ratios, expected="sigma / alpha > 0", do="Use steps."
        )
    found = np.array([-2.0 * math.log(-ratio) for ratio in ratios])
    if not (np.diff(found) > 0.0).all():
        raise PredictionError("the log-SNR does not rise with the steps", got=found.tolist(), do="Use steps.")
    return found


def ladder_rows(
    mask: Sequence[str], split: int, num_steps: int, spec: LadderSpec, axis: Doubles
) -> tuple[Doubles, Doubles]:
    """Tables of one split: mask of the steps split..N-1 ("full" | "predicted"), `axis` (N,) strictly monotone.

    Returns `update` (N, M1, 1 + M1), zeros but at computed steps, and `candidates` (N, P, M1), zeros but at predicted
    steps; P is the most distinct rows that any step has, the last row of a step with fewer is repeated. The first
    computed step fills rung 0 only: nothing older is read. Raises PredictionError.
    """
    _check(mask, split, num_steps, axis)
    update = np.zeros((num_steps, spec.rungs, 1 + spec.rungs))
    anchors: list[int] = []  # computed steps, the latest first
    rows: dict[int, Doubles] = {}
    for step, kind in enumerate(mask, start=split):
        if kind == "full":
            anchors.insert(0, step)
            update[step] = _update(axis[anchors[: spec.rungs]], spec)
        else:
            rows[step] = _candidates(step, anchors[: spec.rungs], spec, axis)
    width = max((len(found) for found in rows.values()), default=1)
    candidates = np.zeros((num_steps, width, spec.rungs))
    for step, found in rows.items():
        candidates[step] = found[np.minimum(np.arange(width), len(found) - 1)]
    return update, candidates


def push(ladder: NDArray[np.floating], y: NDArray[np.float32], update: Doubles) -> NDArray[np.floating]:
    """The ladder (M1, ...) after a computed step with the stream's value y (...), by one row (M1, 1 + M1) of `update`.

    A new array of the old ladder's dtype, computed in float32; neither input is modified or kept. An entry of the old
    ladder whose coefficients are 0 is not read.
    """
    pushed = np.zeros((len(update), *y.shape), dtype=np.float32)
    for rung, row in enumerate(update.astype(np.float32)):
        terms = [c * value.astype(np.float32) for c, value in zip(row, (y, *ladder), strict=True) if c != 0.0]
        if terms:
            pushed[rung] = sum(terms[1:], start=terms[0])
    return pushed.astype(ladder.dtype)


def _update(anchors: Doubles, spec: LadderSpec) -> Doubles:
    """(M1, 1 + M1) from the abscissas of the computed steps so far, the latest first."""
    update = np.zeros((spec.rungs, 1 + spec.rungs))
    update[0, 0] = 1.0
    for rung in range(1, len(anchors)):
        gap = anchors[0] - anchors[rung if spec.kind == "newton" else 1]
        update[rung] = update[rung - 1] / gap
        update[rung, rung] -= 1.0 / gap  # column `rung` is the old ladder's rung below
    return update


def _candidates(step: int, anchors: Sequence[int], spec: LadderSpec, axis: Doubles) -> Doubles:
    """Distinct rows (P, M1) in ascending order; orders that the ladder does not reach yet become the highest it has."""
    at = axis[list(anchors)]
    found = []
    for order in sorted({min(order, len(anchors) - 1) for order in spec.orders}):
        for position in range(step - spec.horizon, step + 1):
            if spec.clip_horizon and position < anchors[0]:
                continue
            row = np.zeros(spec.rungs)
            row[: order + 1] = _coefficients(_position(axis, position), at, order, spec)
            found.append(row)
    return np.unique(np.round(np.array(found), 12), axis=0)


def _coefficients(position: float, anchors: Doubles, order: int, spec: LadderSpec) -> Doubles:
    """(order + 1,) over the rungs, at an abscissa."""
    if spec.kind == "newton":
        return np.cumprod(np.concatenate([[1.0], position - anchors[:order]]))
    u = position - anchors[0]
    return np.array([u**rung / math.factorial(rung) for rung in range(order + 1)])


def _position(axis: Doubles, step: int) -> float:
    """The abscissa of a step; before the run's first, the first gap goes on."""
    return float(axis[step] if step >= 0 else axis[0] + step * (axis[1] - axis[0]))


def _check(mask: Sequence[str], split: int, num_steps: int, axis: Doubles) -> None:
    if not 0 <= split <= num_steps or len(mask) != num_steps - split:
        raise PredictionError(f"the mask of split {split}", got=f"{len(mask)} steps", expected=f"{num_steps} - split")
    if any(kind not in ("full", "predicted") for kind in mask) or (mask and mask[0] != "full"):
        raise PredictionError(
            f"the mask of split {split}", got=list(mask), expected="full | predicted, the first step full"
        )
    gaps = np.diff(axis)
    if axis.shape != (num_steps,) or not np.isfinite(axis).all() or not ((gaps > 0).all() or (gaps < 0).all()):
        raise PredictionError("the abscissa", got=axis.tolist(), expected=f"{num_steps} strictly monotone numbers")
