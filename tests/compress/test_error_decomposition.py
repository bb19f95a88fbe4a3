"""Shares of an error that is planted: each form removes what it can express, and noise stays."""

import numpy as np
import pytest
from latentrelay.compress.error_decomposition import FORMS, removed_shares
from latentrelay.compress.error_moments import Moments

SHAPE, GUIDANCE = (2, 1, 40, 40), 3.0


def moments(seed: int) -> Moments:
    """Step 0: a constant; 1: a gain on each branch; 2: the direction alone; 3: noise; 4: no sample."""
    rng, found = np.random.default_rng(seed), Moments.zeros(5, 1)
    for _ in range(4):
        for step in range(4):
            u = rng.standard_normal(SHAPE[1:])
            q = np.stack([u, u + 0.2 * rng.standard_normal(SHAPE[1:])])
            errors = [np.full(SHAPE, 0.1), 0.1 * q, np.stack([0 * u, 0.5 * (q[1] - q[0])]), rng.standard_normal(SHAPE)]
            found.add(step, q, errors[step], rng.standard_normal((1, *SHAPE[1:])), None)  # type: ignore[arg-type]
    return found


def test_each_form_removes_what_it_can_express() -> None:
    found = removed_shares(moments(0), moments(1), GUIDANCE, memory=False)
    assert tuple(found) == FORMS
    for form in ("offset", "affine", "branches", "joint"):
        assert found[form][0] == pytest.approx(1.0, abs=1e-3)
    for form in ("gain", "affine", "branches", "joint"):
        assert found[form][1] == pytest.approx(1.0, abs=1e-3)
    for form in ("branches", "joint"):
        assert found[form][2] == pytest.approx(1.0, abs=1e-3)
    assert found["affine"][2] < 0.5  # a branch's own output does not tell its share of the direction
    for form in FORMS:
        assert abs(found[form][3]) < 0.02
        assert np.isnan(found[form][4])
