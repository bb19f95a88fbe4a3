"""The noise after the initial noise, against torch's own generator."""

import numpy as np
import pytest
import torch
from latentrelay.runtime.noise import NoiseStream, initial_noise

SHAPES = [(1, 4, 8, 8), (1, 4, 3, 5), (1, 4, 16, 16)]  # 256 values, 60 (ragged: a last group of 16 anew), 1,024


@pytest.mark.parametrize("shape", SHAPES)
def test_draw_after_draw_is_torchs(shape: tuple[int, ...]) -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    stream = NoiseStream(7, shape)
    for _ in range(5):
        np.testing.assert_allclose(stream.draw(), torch.randn(shape, generator=generator).numpy(), atol=2e-6)


def test_the_first_draw_is_the_initial_noise_and_skipping_is_drawing() -> None:
    shape = (1, 4, 8, 8)
    stream, behind = NoiseStream(11, shape), NoiseStream(11, shape)
    np.testing.assert_array_equal(stream.draw(), initial_noise(11, shape))
    stream.draw()
    behind.skip(2)
    np.testing.assert_array_equal(stream.draw(), behind.draw())
    assert not np.array_equal(stream.draw(), initial_noise(11, shape))
