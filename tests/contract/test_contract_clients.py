"""Whole handoffs by every client that the contract knows: the same request gives the same latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Call = Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]


@pytest.mark.parametrize(("split", "dtype"), [(0, "float16"), (2, "float16"), (2, "float32"), (4, "float32")])
def test_a_handoff_crosses_whole(service: Any, handoff_client: Call, split: int, dtype: str) -> None:
    request = service.body(split=split, dtype=dtype, seed=61, deterministic=True)
    latents, meta = handoff_client(request)
    shape = (1, 4, *(side // service.facts["size_multiple"] for side in (request["height"], request["width"])))
    assert latents.shape == shape
    assert latents.dtype == np.dtype(dtype)
    assert np.isfinite(latents).all()
    assert (meta["next_step"], meta["num_steps"], meta["seed"]) == (split, 4, 61)
    assert meta["model_digest"] == service.facts["model"]["digest"]
    again, _ = handoff_client(request)
    np.testing.assert_array_equal(latents, again)


def test_seeds_differ(service: Any, handoff_client: Call) -> None:
    first, _ = handoff_client(service.body(seed=1))
    second, _ = handoff_client(service.body(seed=2))
    assert not np.array_equal(first, second)
