"""One step's correction: a method's coefficients from that step's moments, and as tables of the two branches.

In: moments (C, 7, 7) of error_moments.py. Out: (2, 5, C): per regressor what is subtracted from the unconditional
branch and from the guidance direction; `branch_tables` turns it into the gain, offset and mixing of the step graph.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from latentrelay.compress.error_moments import REGRESSORS, Doubles, Regressor, regress

Method = Literal["none", "ptqd", "gain", "affine", "joint"]
METHODS: tuple[Method, ...] = ("none", "ptqd", "gain", "affine", "joint")
MAX_GAIN = 0.2  # beyond it a gain is a fit gone wrong; the guidance direction, mostly noise late in a run, has its own
MAX_SHRINKAGE = 0.9


def _regressors(method: Method, memory: bool) -> tuple[Regressor, ...]:
    joint: tuple[Regressor, ...] = ("latents", "memory") if memory else ("latents",)
    return ("unconditional", "direction", *(joint if method == "joint" else ()), "one")


def closed_row(moments: Doubles, method: Method, guidance: float, memory: bool) -> Doubles:
    """The same from closed-loop moments, whose first error is all that the guided output is off by.

    What the direction explains is taken from the direction, divided by the scale: a run at another scale is corrected
    in proportion to how much it amplifies the direction's error.
    """
    found = regress(moments, _regressors(method, memory), np.array([1.0, 0.0]))
    correction = np.zeros((2, len(REGRESSORS), len(found)))
    correction[0] = found.T
    correction[1, 1], correction[0, 1] = np.clip(found[:, 1] / guidance, -MAX_SHRINKAGE, MAX_SHRINKAGE), 0.0
    if method != "joint":
        correction[0, 0] = np.clip(correction[0, 0], -MAX_GAIN, MAX_GAIN)
    return correction


def open_row(moments: Doubles, method: Method, guidance: float, memory: bool) -> Doubles:
    """Open loop; `memory`: whether the solver has any at this step. PTQD's holds at the scale `guidance` only."""
    u, d, one = (REGRESSORS.index(name) for name in ("unconditional", "direction", "one"))
    e_u, e_d, found = len(REGRESSORS), len(REGRESSORS) + 1, np.zeros((2, len(REGRESSORS), len(moments)))
    if method == "joint":
        for branch, target in enumerate(np.eye(2)):
            found[branch] = regress(moments, _regressors(method, memory), target).T
        found[0, 0], found[1, 1] = np.clip(found[0, 0], -1, 1), np.clip(found[1, 1], -MAX_SHRINKAGE, MAX_SHRINKAGE)
        return found
    if method == "ptqd":
        scales = np.zeros((2, moments.shape[-1]))  # rows: the guided output q and its error e
        scales[0, [u, d]], scales[1, [e_u, e_d]] = (1.0, guidance), (1.0, guidance)
        pairs = np.einsum("ai,cij,bj->cab", scales, moments, scales)
        means = (moments[:, one] @ scales.T) / moments[:, one, one][:, None]
        bias = means[:, 1]
        covariance = pairs / moments[:, one, one][:, None, None] - np.einsum("ca,cb->cab", means, means)
        qq, qe, ee = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
        slope = max(0.0, float((qe - ee).sum() / (qq - 2 * qe + ee).sum()))  # of e on r = q - e
        found[0, u], found[1, d] = slope / (1 + slope), slope / (1 + slope)
        found[0, one] = bias / (1 + slope)
        return found
    for branch in (0, 1):  # the branch's own output and error: u, e_u, or u + d, e_u + e_d
        own = np.zeros((3, moments.shape[-1]))
        own[0, [u, d][: 1 + branch]], own[1, one], own[2, [e_u, e_d][: 1 + branch]] = 1.0, 1.0, 1.0
        pairs = np.einsum("ai,cij,bj->cab", own, moments, own)
        chosen = [0] if method == "gain" else [0, 1]
        gram, products = pairs[:, chosen][:, :, chosen], pairs[:, chosen, 2]
        gram = gram * (1.0 + 1e-4 * np.eye(len(chosen)))
        solved = np.linalg.solve(gram, products[..., None])[..., 0]
        gain = np.clip(solved[:, 0], -MAX_GAIN, MAX_GAIN)
        offset = np.zeros_like(gain) if method == "gain" else (products[:, 1] - gain * gram[:, 0, 1]) / gram[:, 1, 1]
        if branch == 0:
            found[0, u], found[0, one] = gain, offset
        else:  # conditional = unconditional + direction
            found[1, u], found[1, d], found[1, one] = gain - found[0, u], gain, offset - found[0, one]
    return found


def branch_tables(corrections: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """(N, 2, 5, C), of the unconditional branch and the direction -> gain, offset, mixing of the two branches."""
    conditional = corrections[:, 0] + corrections[:, 1]
    both = np.stack([corrections[:, 0], conditional], axis=1)  # (N, 2, 5, C), by regressor
    of_unconditional, of_conditional = both[:, :, 0] - both[:, :, 1], both[:, :, 1]
    gain = np.stack([of_unconditional[:, 0], of_conditional[:, 1]], axis=1)
    other = np.stack([of_conditional[:, 0], of_unconditional[:, 1]], axis=1)
    return gain, both[:, :, 4].copy(), np.stack([other, both[:, :, 2], both[:, :, 3]], axis=2)


def branch_corrections(gain: Doubles, offset: Doubles, mixing: Doubles) -> Doubles:
    """The inverse of `branch_tables` for one step: gain, offset (2, C), mixing (2, 3, C) -> (C, 2, 5)."""
    of_unconditional = np.stack([gain[0], mixing[1, 0]])  # (branch, C): coefficient of the unconditional output
    of_conditional = np.stack([mixing[0, 0], gain[1]])
    both = np.stack([of_unconditional + of_conditional, of_conditional, mixing[:, 1], mixing[:, 2], offset], axis=1)
    both[1] -= both[0]
    return both.transpose(2, 0, 1)
