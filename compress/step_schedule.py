"""Static schedules of computed and predicted steps, searched on an error matrix without a single call of a network.

In: an error matrix E (N, N), E[c, i] the relative error of reusing step c's output at step i, a segment
`first` .. `last_excl` - 1, and a threshold or a number of computed steps. Out: a mask, one "full" or "predicted" a step
of the segment. First and last step are always computed, runs of predicted steps are capped. The threshold search is
the one of ERTACache (arXiv 2508.21091, a reconstruction); the dynamic programme minimises the sum of what each
predicted step is expected to add to the final latents. Masks only: what a predicted step does is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from latentrelay.compress.error_matrix import ErrorMatrix
from latentrelay.compress.error_propagation import final_gains
from latentrelay.compress.errors import ScheduleError
from latentrelay.compress.solver_tables import SolverTable
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Mask = tuple[Literal["full", "predicted"], ...]
MAX_RUN = 3


def threshold_mask(
    errors: ErrorMatrix | Doubles, first: int, last_excl: int, limit: float, max_run: int | None = MAX_RUN
) -> Mask:
    """Greedy, in the order of the run: a step is predicted while E from the last computed step is below `limit`.

    A limit of 0 predicts nothing. `max_run` caps how many steps in a row are predicted (None: no cap). Raises
    ScheduleError for a segment that the matrix does not cover.
    """
    values = _segment(errors, first, last_excl)
    n, computed = len(values), [0]
    for step in range(1, n - 1):
        run = step - computed[-1]
        if not values[computed[-1], step] < limit or (max_run is not None and run > max_run):
            computed.append(step)
    return _mask(n, [*computed, n - 1])


def mask_by_budget(
    errors: ErrorMatrix | Doubles, first: int, last_excl: int, computed: int, max_run: int | None = MAX_RUN
) -> Mask:
    """The threshold search's mask with `computed` steps computed, or the nearest below where no threshold gives that.

    Every threshold at which the search could change is tried, since it is only roughly monotone in the threshold: a
    bisection may miss a budget that can be reached. Raises ScheduleError where the cap asks for more computed steps.
    """
    values = _segment(errors, first, last_excl)
    _check_budget(len(values), computed, max_run)
    limits = np.unique(values[np.triu_indices(len(values), 1)]) if len(values) > 1 else np.zeros(0)
    masks = [threshold_mask(values, 0, len(values), limit, max_run) for limit in (0.0, *np.nextafter(limits, np.inf))]
    within = [mask for mask in masks if mask.count("full") <= computed]  # the last limit gives what the cap allows
    return max(within, key=lambda mask: mask.count("full"))  # of equal ones the first, which has the smallest limit


def optimal_mask(
    errors: ErrorMatrix | Doubles,
    first: int,
    last_excl: int,
    computed: int,
    weights: Sequence[float] | Doubles | None = None,
    max_run: int | None = MAX_RUN,
) -> Mask:
    """Exactly `computed` computed steps with the least sum over predicted steps of weights[i] E[c(i), i].

    `weights` (N,) by step in the whole run, see `step_weights`; None counts steps alike. A dynamic programme over (last
    computed step, steps computed so far); of equal sums the one whose computed steps come earlier. Raises ScheduleError
    for a budget that the cap or the segment's length does not allow.
    """
    values = _segment(errors, first, last_excl)
    n = len(values)
    _check_budget(n, computed, max_run)
    weight = np.ones(n) if weights is None else np.asarray(weights, np.float64)[first:last_excl]
    if weight.shape != (n,) or not np.isfinite(weight).all() or (weight < 0).any():
        raise ScheduleError("weights of steps", got=weight.shape, expected=f"({n},) finite numbers, 0 or more")
    reach = n - 1 if max_run is None else max_run + 1  # how far the next computed step may be
    # between[c, d]: what the predicted steps after c cost where d is the next computed step
    between = np.array([[float(weight[c + 1 : d] @ values[c, c + 1 : d]) for d in range(n)] for c in range(n)])
    best = np.full((computed + 1, n), np.inf)
    came_from = np.zeros((computed + 1, n), dtype=int)
    best[1, 0] = 0.0
    for count in range(2, computed + 1):
        for step in range(1, n):
            candidates = range(max(0, step - reach), step)
            costs = [best[count - 1, c] + between[c, step] for c in candidates]
            pick = int(np.argmin(costs))
            best[count, step], came_from[count, step] = costs[pick], candidates[pick]
    chosen = [n - 1]
    for count in range(computed, 1, -1):
        chosen.append(int(came_from[count, chosen[-1]]))
    return _mask(n, chosen)


def uniform_mask(first: int, last_excl: int, computed: int) -> Mask:
    """`computed` computed steps spread evenly over the segment, its first and last among them (its first, if one)."""
    n = last_excl - first
    if not 1 <= computed <= max(n, 1) or n < 1:
        raise ScheduleError("computed steps", got=computed, expected=f"1..{n}, the steps of the segment")
    return _mask(n, list(_uniform_steps(n, computed)))


def mask_cost(
    errors: ErrorMatrix | Doubles, first: int, mask: Sequence[str], weights: Sequence[float] | Doubles | None = None
) -> float:
    """The sum that `optimal_mask` minimises, of any mask: over predicted steps weights[i] E[c(i), i]."""
    values = _segment(errors, first, first + len(mask))
    weight = np.ones(first + len(mask)) if weights is None else np.asarray(weights, np.float64)
    total, last = 0.0, 0
    for step, kind in enumerate(mask):
        if kind == "full":
            last = step
        else:
            total += float(weight[first + step] * values[last, step])
    return total


def step_weights(table: SolverTable, norms: Sequence[float] | Doubles, jacobian: Doubles | None = None) -> Doubles:
    """(N,) how much a relative error of 1 at step i moves the final latents, by compress/error_propagation.py.

    |gain_i| norms[i], where gain_i is what a unit error of e at step i does to the final latents and `norms` (N,) is
    the size of e there (its mean |.|), so that weights[i] E[c, i] is in units of the final latents and the sum over
    predicted steps bounds their error (it adds magnitudes). `jacobian` (N,) as `fit_jacobian` measures it; None: 0,
    the network does not answer a displacement.
    """
    answer = np.zeros(len(table.rows)) if jacobian is None else jacobian
    weights: Doubles = np.abs(final_gains(table, answer)) * np.asarray(norms, np.float64)
    return weights


def _segment(errors: ErrorMatrix | Doubles, first: int, last_excl: int) -> Doubles:
    """The segment's own matrix (n, n)."""
    values = errors.values if isinstance(errors, ErrorMatrix) else np.asarray(errors, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not 0 <= first < last_excl <= len(values):
        expected = "a square matrix and 0 <= first < last_excl <= its steps"
        raise ScheduleError("segment", got=f"{values.shape}, {first}..{last_excl}", expected=expected)
    part: Doubles = values[first:last_excl, first:last_excl]
    missing = ~np.isfinite(part) & np.triu(np.ones(part.shape, dtype=bool), 1)
    if missing.any():
        c, i = (int(axis[0]) + first for axis in np.nonzero(missing))
        do = "Profile runs that cover the segment."
        raise ScheduleError(f"the error of reusing step {c} at step {i} is not known", got=values[c, i], do=do)
    return part


def _check_budget(n: int, computed: int, max_run: int | None) -> None:
    least = min(n, 2) if max_run is None else min(n, 1 + -(-(n - 1) // (max_run + 1)))
    if not least <= computed <= n:
        got = f"{computed} of {n} steps, at most {max_run} predicted in a row"
        raise ScheduleError("computed steps", got=got, expected=f"{least}..{n}")


def _uniform_steps(n: int, computed: int) -> set[int]:
    return {0} | {int(step) for step in np.floor(np.linspace(0, n - 1, computed) + 0.5)}


def _mask(n: int, computed: Sequence[Any]) -> Mask:
    kept = set(computed)
    return tuple("full" if step in kept else "predicted" for step in range(n))
