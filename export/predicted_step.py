"""What predicted steps add to the step graph, as small torch modules: ladders, selection, prediction, rectifier.

`LadderUpdate`: a stream's value y (2,C,h,w) and its ladder (M1,2,C,h,w) -> the ladder after a computed step.
`Guess`: ladders [and a probe] -> the predicted stream (2,C,h,w) [and how tokens chose]. `FullTail`, `PredictedTail`:
everything behind the network of a computed and of a predicted step. Every table is gathered by
`at = split_row * N + step`; ranks are static and there is no control flow: what a step does not use is selected away,
since a ladder that was never written may hold anything. compress/predicted_chain.py is the same in NumPy. A
reconstruction in the spirit of TAP (arXiv 2603.03792) and ERTACache (arXiv 2508.21091).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from latentrelay.compress.plan import Plan
from latentrelay.export.errors import ExportError
from latentrelay.export.step_graph import StepTail
from numpy.typing import NDArray
from torch import Tensor, nn

_TINY = 1e-20  # of a norm that is divided by, as in compress/token_selection.py
_FIXED_REGRESSORS = 3  # the other branch, the latents, the solver's memory; then two a rung from 1 on


def required(plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A plan's ladder rows (R, N, M1, 1 + M1) and candidate rows (R, N, P, M1). Raises ExportError without them."""
    update, candidates = plan.tables.ladder_update, plan.tables.candidates
    if update is None or candidates is None:
        raise ExportError("the plan predicts no steps", got="no ladder tables", expected="ladder_update, candidates")
    return update, candidates


def _table(values: NDArray[Any]) -> Tensor:
    """(R, N, ...) -> (R * N, ...) float32, to be gathered by `at`."""
    return torch.from_numpy(values.astype(np.float32)).flatten(0, 1)


def _any(values: NDArray[Any], *axes: int) -> NDArray[np.bool_]:
    """Whether anything along the axes is not 0."""
    found: NDArray[np.bool_] = np.any(values != 0.0, axis=axes)
    return found


class LadderUpdate(nn.Module):
    """`L'_o = U[o,0] y + sum_p U[o,1+p] L_p`, in float32, whatever the ladder is kept in."""

    update: Tensor
    reads: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        update, _ = required(plan)
        self.entries = _any(update, 0, 1)  # those that some step has: the others get no node
        self.register_buffer("update", _table(update))
        self.register_buffer("reads", _table(update) != 0.0)

    def forward(self, y: Tensor, ladder: Tensor, at: Tensor) -> Tensor:
        """y (2,C,h,w) f32, ladder (M1,2,C,h,w) f32 or f16, at i64 () -> the new ladder, of the old one's dtype."""
        update, reads, zero = self.update[at], self.reads[at], torch.zeros(())
        rungs = []
        for rung, entries in enumerate(self.entries):
            total = update[rung, 0] * y
            for old in range(len(entries) - 1):
                if entries[1 + old]:
                    term = update[rung, 1 + old] * ladder[old].float()
                    total = total + torch.where(reads[rung, 1 + old], term, zero)
            rungs.append(total.to(ladder.dtype))
        return torch.stack(rungs)


class Selection(nn.Module):
    """The candidate row of each branch and token: the one that would have predicted the probe best, by Gram sums."""

    pairs: Tensor
    rows: Tensor
    reads: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        _, candidates = required(plan)
        self.metric = str(plan.recipe.prediction["metric"])
        self.rungs = candidates.shape[3]
        rows = candidates.astype(np.float32)
        pairs = [rows[..., i] * rows[..., j] * np.float32(1 if i == j else 2) for i, j in self._pairs(0)]
        self.register_buffer("pairs", torch.from_numpy(np.stack(pairs, axis=2)).flatten(0, 1))  # (R*N, pairs, P)
        self.register_buffer("rows", _table(candidates))  # (R*N, P, M1)
        self.register_buffer("reads", _table(_any(candidates, 2)) != 0.0)  # (R*N, M1)

    def forward(self, probe: Tensor, ladder: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """probe (2,C,h,w), ladder (M1,2,C,h,w) -> row by branch and token i64 (2,h,w), choices i64 (P,) (how often each
        row was chosen), probe_error f32 () (squares that the chosen rows leave over the probe's own)."""
        rungs = [ladder[rung].float() for rung in range(self.rungs)]
        reads, rest = self.reads[at], probe - rungs[0]
        squares = self._quadratic(1, rungs, reads, at) - 2.0 * self._linear(1, rungs, rest, reads, at)
        squares = torch.clamp_min(squares + _summed(rest, rest), 0.0)  # (P, 2, h, w)
        own = _summed(probe, probe)  # (2, h, w)
        if self.metric == "l2":
            index = squares.argmin(dim=0)
            left = squares.amin(dim=0)
        else:
            norms = torch.clamp_min(self._quadratic(0, rungs, reads, at) * own, _TINY)
            index = (1.0 - self._linear(0, rungs, probe, reads, at) / torch.sqrt(norms)).argmin(dim=0)
            left = torch.gather(squares, 0, index[None])[0]
        count = squares.shape[0]
        choices = torch.stack([(index == row).sum() for row in range(count)])
        return index, choices, left.sum() / torch.clamp_min(own.sum(), _TINY)

    def _pairs(self, first: int) -> list[tuple[int, int]]:
        return [(i, j) for i in range(first, self.rungs) for j in range(first, i + 1)]

    def _quadratic(self, first: int, rungs: list[Tensor], reads: Tensor, at: Tensor) -> Tensor:
        """c' G c over the rungs from `first` on, (P, 2, h, w); a sum over a rung that is not read is 0."""
        pairs, places, zero = self.pairs[at], self._pairs(0), torch.zeros(())
        total = zero
        for i, j in self._pairs(first):
            gram = torch.where(reads[i] & reads[j], _summed(rungs[i], rungs[j]), zero)
            total = total + pairs[places.index((i, j))][:, None, None, None] * gram
        return total

    def _linear(self, first: int, rungs: list[Tensor], other: Tensor, reads: Tensor, at: Tensor) -> Tensor:
        """c . d over the rungs from `first` on, d = <L_o, other> by token."""
        rows, zero = self.rows[at], torch.zeros(())
        total = zero
        for i in range(first, self.rungs):
            total = total + rows[:, i, None, None, None] * torch.where(reads[i], _summed(rungs[i], other), zero)
        return total


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """(2,C,h,w) twice -> sums of products over channels (2,h,w)."""
    return (left * right).sum(dim=1)


class Guess(nn.Module):
    """The predicted stream: `sum_o w_o L_o`, w each token's row where a probe chooses, else the step's only row."""

    rows: Tensor
    reads: Tensor

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        _, candidates = required(plan)
        self.num_steps = plan.recipe.num_steps
        self.selects = candidates.shape[2] > 1
        self.selection = Selection(plan) if self.selects else None
        self.rungs = [rung for rung in range(candidates.shape[3]) if candidates[..., rung].any()]
        used = candidates[_any(candidates, 2, 3)]  # rows of predicted steps
        self.reuses = bool((used[..., 0] == 1.0).all())  # 1 times a rung is the rung
        self.register_buffer("rows", _table(candidates))
        self.register_buffer("reads", _table(_any(candidates, 2)) != 0.0)

    def forward(
        self,
        step: Tensor,
        split_row: Tensor,
        feature_ladder: Tensor,
        probe_ladder: Tensor | None = None,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """-> the stream (2,C,h,w) f32 and, where a probe chooses, choices (P,) and probe_error ()."""
        at = split_row * self.num_steps + step
        rows, reads, zero = self.rows[at], self.reads[at], torch.zeros(())
        index: Tensor | None = None
        chosen: list[Tensor] = []
        if self.selection is not None and probe is not None and probe_ladder is not None:
            index, *chosen = self.selection(probe, probe_ladder, at)
        total = None
        for rung in self.rungs:
            term = feature_ladder[rung].float()
            if rung > 0 or not self.reuses:
                weight = rows[0, rung] if index is None else rows[:, rung][index][:, None]  # (2, 1, h, w)
                term = torch.where(reads[rung], weight * term, zero) if rung > 0 else weight * term
            total = term if total is None else total + term
        if total is None:
            raise ExportError("the plan's candidate rows are all zeros", expected="one that reads a rung")
        return (total, *chosen)


class Rectifier(nn.Module):
    """`(1 - gain) q - offset - sum_j mixing_j regressor_j`, rows by split and step; rows of zeros change nothing.

    `steps` is the kind of step that the graph is for: the others' rows are left out, since a predicted step that is
    computed after all runs the computed steps' graph, and without a rectifier. Without rows no node is exported.
    """

    kept: Tensor
    offset: Tensor
    mixing: Tensor
    mixes: Tensor
    active: Tensor

    def __init__(self, plan: Plan, steps: str) -> None:
        super().__init__()
        tables = plan.tables
        update, candidates = required(plan)
        here = _any(update if steps == "full" else candidates, 2, 3)  # (R, N)
        gain, offset, mixing = tables.rectifier_gain, tables.rectifier_offset, tables.rectifier_mixing
        self.enabled = False
        self.regressors: tuple[int, ...] = ()
        if gain is None or offset is None or mixing is None:
            return
        gain, offset = gain * here[..., None, None], offset * here[..., None, None]
        mixing = mixing * here[..., None, None, None]
        active = _any(gain, 2, 3) | _any(offset, 2, 3) | _any(mixing, 2, 3, 4)
        self.enabled = bool(active.any())
        self.regressors = tuple(int(j) for j in np.flatnonzero(_any(mixing, 0, 1, 2, 4)))
        self.register_buffer("kept", _table(1.0 - gain)[..., None, None])
        self.register_buffer("offset", _table(offset)[..., None, None])
        self.register_buffer("mixing", _table(mixing)[..., None, None])
        self.register_buffer("mixes", _table(_any(mixing, 2, 4)) != 0.0)  # (R * N, regressors)
        self.register_buffer("active", torch.from_numpy(active.reshape(-1)))

    @property
    def reads_ladder(self) -> bool:
        """Whether some row reads a rung of the ladder."""
        return any(j >= _FIXED_REGRESSORS for j in self.regressors)

    def forward(self, q: Tensor, at: Tensor, latents: Tensor, x0_prev: Tensor | None, ladder: Tensor | None) -> Tensor:
        """q (2,C,h,w), latents and x0_prev (1,C,h,w), ladder (M1,2,C,h,w) as the step read it -> (2,C,h,w)."""
        if not self.enabled:
            return q
        row, mixes = self.mixing[at], self.mixes[at]  # (2, J, C, 1, 1), (J,)
        found = q * self.kept[at] - self.offset[at]
        for j in self.regressors:
            value = _regressor(j, q, latents, x0_prev, ladder)
            if value is not None:  # selected, not multiplied by 0: what was never written may hold anything
                found = found - row[:, j] * torch.where(mixes[j], value, torch.zeros(()))
        return torch.where(self.active[at], found, q)


def _regressor(j: int, q: Tensor, latents: Tensor, x0_prev: Tensor | None, ladder: Tensor | None) -> Tensor | None:
    """Regressor j, (2,C,h,w) or (1,C,h,w); None where this graph has none of it."""
    if j == 0:
        return torch.cat([q[1:2], q[0:1]])
    if j < _FIXED_REGRESSORS:
        return latents if j == 1 else x0_prev
    if ladder is None:
        return None
    rung, others = divmod(j - _FIXED_REGRESSORS, 2)
    own = ladder[1 + rung].float()
    return torch.cat([own[1:2], own[0:1]]) if others else own


class PredictedTail(nn.Module):
    """What follows a predicted step's stream: compensation of a network's output, rectifier, guidance, solver."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.num_steps = plan.recipe.num_steps
        self.has_grids = plan.tables.grid_solver is not None
        self.deep = plan.recipe.prediction["target"] == "deep_feature"
        self.tail = StepTail(plan)
        self.rectifier = Rectifier(plan, "predicted")

    def forward(
        self,
        noise_pred: Tensor,
        latents: Tensor,
        step: Tensor,
        split_row: Tensor,
        guidance: Tensor,
        x0_prev: Tensor | None = None,
        feature_ladder: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """noise_pred (2,C,h,w): the shallow path's output, or the predicted one, which was compensated before it was
        kept; `feature_ladder` where the rectifier reads it -> next_latents [, next_x0_prev]."""
        at = split_row * self.num_steps + step
        q = self.tail.compensation(noise_pred, step, latents, x0_prev) if self.deep else noise_pred
        q = self.rectifier(q, at, latents, x0_prev, feature_ladder)
        return self.tail.advance(q, latents, step, at if self.has_grids else step, guidance, x0_prev)


class FullTail(nn.Module):
    """What follows a computed step's network: compensation, ladders, rectifier, guidance, solver."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.num_steps = plan.recipe.num_steps
        self.has_grids = plan.tables.grid_solver is not None
        self.deep = plan.recipe.prediction["target"] == "deep_feature"
        self.tail = StepTail(plan)
        self.update = LadderUpdate(plan)
        self.rectifier = Rectifier(plan, "full")

    def forward(
        self,
        noise_pred: Tensor,
        latents: Tensor,
        step: Tensor,
        split_row: Tensor,
        guidance: Tensor,
        feature_ladder: Tensor,
        x0_prev: Tensor | None = None,
        feature: Tensor | None = None,
        probe_ladder: Tensor | None = None,
        probe: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`feature` (2,Cf,h,w) for the target deep_feature, probe and its ladder where tokens choose ->
        next_latents [, next_x0_prev], next_feature_ladder [, next_probe_ladder]."""
        at = split_row * self.num_steps + step
        q = self.tail.compensation(noise_pred, step, latents, x0_prev)
        ladders = [self.update(feature if self.deep and feature is not None else q, feature_ladder, at)]
        if probe_ladder is not None and probe is not None:
            ladders.append(self.update(probe, probe_ladder, at))
        q = self.rectifier(q, at, latents, x0_prev, None)
        results = self.tail.advance(q, latents, step, at if self.has_grids else step, guidance, x0_prev)
        return (*results, *ladders)
