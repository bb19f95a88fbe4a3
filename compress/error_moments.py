"""Second moments of a quantised network's outputs and errors, per step and channel: all that a fit needs, and small.

In: per step noise_pred q (2, C, h, w), its error against the float network, the latents and the solver's memory (1, C,
h, w). Kept: `sums` (N, C, 7, 7) float64 over REGRESSORS and the two branches' errors, so that moments of parts of the
data add up to those of the whole. The two outputs are held as the unconditional one and the guidance direction
(conditional minus unconditional), because that direction is small and would drown in the correlation of the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Regressor = Literal["unconditional", "direction", "latents", "memory", "one"]
REGRESSORS: tuple[Regressor, ...] = ("unconditional", "direction", "latents", "memory", "one")
_COUNT = len(REGRESSORS)
RIDGE = 1e-4  # relative to each regressor's own power


@dataclass(eq=False)
class Moments:
    """`sums[i, c]` = weighted sum over pixels and runs of y y', y = (REGRESSORS, error of the unconditional branch,
    error of the direction); `runs` (N,) how many runs each step has seen. `add` modifies in place."""

    sums: Doubles
    runs: NDArray[np.int64]

    @classmethod
    def zeros(cls, num_steps: int, channels: int) -> Moments:
        """Nothing seen yet."""
        return cls(np.zeros((num_steps, channels, _COUNT + 2, _COUNT + 2)), np.zeros(num_steps, np.int64))

    def add(
        self, step: int, noise_pred: Floats, error: Floats, latents: Floats, memory: Floats | None, weight: float = 1.0
    ) -> None:
        """One run's step: noise_pred and error (2, C, h, w), latents and memory (1, C, h, w)."""
        channels = noise_pred.shape[1]
        read = np.zeros_like(latents) if memory is None else memory
        rows = np.concatenate([noise_pred, error, latents, read]).astype(np.float64).reshape(6, channels, -1)
        u, c, e_u, e_c, x, m = rows
        y = np.stack([u, c - u, x, m, np.ones_like(u), e_u, e_c - e_u])  # (7, C, P)
        self.sums[step] += weight * np.einsum("icp,jcp->cij", y, y)
        self.runs[step] += 1

    def merged(self, other: Moments) -> Moments:
        """Of both; neither is modified."""
        return Moments(self.sums + other.sums, self.runs + other.runs)


def regress(moments: Doubles, regressors: tuple[Regressor, ...], target: Doubles, ridge: float = RIDGE) -> Doubles:
    """Least squares of one step: moments (C, 7, 7), target (2,), the weights of the two errors -> (C, 5), a coefficient
    a regressor, 0 for those that are not in `regressors`."""
    chosen = [REGRESSORS.index(name) for name in regressors]
    gram = moments[:, chosen][:, :, chosen]
    products = moments[:, chosen, _COUNT:] @ target  # (C, chosen)
    found = np.zeros((len(moments), _COUNT))
    found[:, chosen] = damped_least_squares(gram, products, ridge)
    return found


def damped_least_squares(gram: Doubles, products: Doubles, ridge: float = RIDGE) -> Doubles:
    """Per channel: gram (C, R, R), products (C, R) -> coefficients (C, R). `ridge` is relative to each regressor's own
    power; one that is always 0 gets 0."""
    power = np.einsum("cii->ci", gram)
    silent = np.where(power > 0.0, 0.0, 1.0)  # not a singular matrix
    damped = gram + np.einsum("ci,ij->cij", ridge * power + silent, np.eye(gram.shape[1]))
    found: Doubles = np.linalg.solve(damped, products[..., None])[..., 0]
    return found


def guided_squares(moments: Doubles, guidance: float, correction: Doubles) -> Doubles:
    """Sum of squares of the guided error that a correction leaves, per channel.

    moments (C, 7, 7), correction (C, 2, 5): what is subtracted from the unconditional branch and from the direction.
    """
    scales = np.array([1.0, guidance])
    left = np.concatenate([-np.einsum("b,cbr->cr", scales, correction), np.tile(scales, (len(moments), 1))], axis=1)
    squares: Doubles = np.einsum("ci,cij,cj->c", left, moments, left)
    return squares
