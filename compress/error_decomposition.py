"""What share of each step's quantisation error a static correction can know at all, form by form, held out.

In: moments of the deployed network's errors on runs to fit on and on held-out runs. Out: per form (N,) the share of the
held-out guided error's power that is gone with that form's coefficients; below 0 they make it worse. The rest belongs
to the prompt and the noise, and no table indexed by step and channel takes it back. It is one step's share, not the
final latents': a form that shrinks outputs at every step lowers each step's error and still bends the run. "joint"
reads the float run's own latents and memory here; a device's hold errors too, so its share is a ceiling.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from latentrelay.compress.compensation_rows import Method, open_row
from latentrelay.compress.error_moments import REGRESSORS, Doubles, Moments, Regressor, guided_squares, regress

Form = Literal["offset", "ptqd", "gain", "affine", "branches", "joint"]
_METHODS: dict[Form, Method] = {"ptqd": "ptqd", "gain": "gain", "affine": "affine"}
_REGRESSORS: dict[Form, tuple[Regressor, ...]] = {
    "offset": ("one",),
    "branches": ("unconditional", "direction", "one"),
    "joint": REGRESSORS,
}
FORMS: tuple[Form, ...] = ("offset", "ptqd", "gain", "affine", "branches", "joint")


def removed_shares(fitted: Moments, held_out: Moments, guidance: float, memory: bool) -> dict[Form, Doubles]:
    """(N,) by form; NaN at steps without samples. `memory`: whether the solver has one (from step 1 on)."""
    shares: dict[Form, Doubles] = {form: np.full(len(fitted.sums), np.nan) for form in FORMS}
    for step in np.flatnonzero(np.minimum(fitted.runs, held_out.runs)):
        seen, held = fitted.sums[step], held_out.sums[step]
        without = guided_squares(held, guidance, np.zeros((len(held), 2, len(REGRESSORS)))).sum()
        for form in FORMS:
            left = guided_squares(held, guidance, _coefficients(seen, form, guidance, memory and step > 0)).sum()
            shares[form][step] = 1.0 - left / without
    return shares


def _coefficients(moments: Doubles, form: Form, guidance: float, memory: bool) -> Doubles:
    """(C, 2, 5)."""
    if form in _METHODS:
        return open_row(moments, _METHODS[form], guidance, memory).transpose(2, 0, 1)
    regressors = tuple(name for name in _REGRESSORS[form] if memory or name != "memory")
    found = np.zeros((len(moments), 2, len(REGRESSORS)))
    found[:, 0] = regress(moments, regressors, np.array([1.0, guidance]))
    return found
