"""initial_noise against torch's own CPU generator."""

import numpy as np
import pytest
import torch
from latentrelay.runtime.errors import RequestError
from latentrelay.runtime.noise import initial_noise

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63]


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 3, 14, 15, 16, 17, 31, 32, 33, 100, 1000, 4096])
def test_noise_is_torchs(seed: int, size: int) -> None:
    assert np.abs(initial_noise(seed, (size,)) - torch_noise(seed, (size,))).max() <= 2e-6


def test_shape_is_filled_in_c_order() -> None:
    noise = initial_noise(3, (1, 4, 8, 10))
    assert noise.dtype == np.float32
    assert np.abs(noise - torch_noise(3, (1, 4, 8, 10))).max() <= 2e-6


def test_a_million_values_have_torchs_tails() -> None:
    noise = initial_noise(11, (1, 4, 512, 512))
    assert np.abs(noise - torch_noise(11, (1, 4, 512, 512))).max() <= 5e-6
    assert np.isfinite(noise).all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_misuse(seed: int) -> None:
    with pytest.raises(RequestError, match="seed"):
        initial_noise(seed, (16,))
