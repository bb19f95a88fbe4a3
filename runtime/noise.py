"""The noise of a seed: torch's CPU generator, reproduced in NumPy.

A seed means the same picture as in diffusers: `initial_noise(seed, shape)` agrees with
`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` to a few units in the last place. What is
reproduced is aten's `normal_fill` (16 values or more) and its scalar double path (fewer). `NoiseStream` goes on where
the initial noise ends: what the second, third, ... `torch.randn` of the same generator give.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from latentrelay.runtime.errors import RequestError
from numpy.typing import NDArray

GENERATOR_KIND = "torch-cpu-mt19937"


def initial_noise(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal float32 noise of `shape` for `seed` (0 .. 2**64 - 1; like torch, only the low 32 bits count)."""
    return NoiseStream(seed, shape).draw()


class NoiseStream:
    """Draw after draw of one `shape` from a seed's generator: the initial noise first, then one draw for each sampler
    step that adds noise. `skip` moves past draws that another machine has used, so a run may be cut anywhere.

    Shapes of 16 values or more only, but for the first draw: torch keeps the second value of a scalar pair for later.
    """

    def __init__(self, seed: int, shape: Sequence[int]) -> None:
        if not 0 <= seed < 2**64:
            raise RequestError(
                "the seed is out of range", got=seed, expected="0 .. 2**64 - 1", do="Choose another seed."
            )
        # RandomState(int) seeds MT19937 by Knuth's rule, as torch does; random_raw gives its 32-bit words.
        self._words = np.random.MT19937()
        self._words._legacy_seeding(seed & 0xFFFFFFFF)
        self._shape, self._size = tuple(shape), math.prod(shape)

    def draw(self) -> NDArray[np.float32]:
        """The next noise, standard normal float32 of `shape`."""
        fill = _filled if self._size >= 16 else _scalar
        return fill(self._words, self._size).reshape(self._shape)

    def skip(self, draws: int) -> None:
        """Leave out `draws` draws."""
        for _ in range(draws):
            self.draw()


def _filled(words: np.random.MT19937, size: int) -> NDArray[np.float32]:
    """Box-Muller within groups of 16 uniforms: value j pairs with value j + 8. The last 16 are drawn anew if ragged."""
    noise = _uniform24(words, size)
    whole = size - size % 16
    noise[:whole] = _box_muller(noise[:whole])
    if size % 16:
        noise[-16:] = _box_muller(_uniform24(words, 16))
    return noise


def _uniform24(words: np.random.MT19937, size: int) -> NDArray[np.float32]:
    bits = words.random_raw(size) & 0xFFFFFF
    return bits.astype(np.float32) * np.float32(2.0**-24)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    pairs = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - pairs[:, 0]))
    theta = np.float32(2.0 * math.pi) * pairs[:, 1]
    return np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).astype(np.float32).reshape(-1)


def _scalar(words: np.random.MT19937, size: int) -> NDArray[np.float32]:
    """Fewer than 16 values: 53-bit uniforms, one Box-Muller pair after the other, in double precision."""
    pairs = (size + 1) // 2
    raw = words.random_raw(4 * pairs).reshape(pairs, 2, 2)
    uniform = (((raw[..., 0] << np.uint64(32)) | raw[..., 1]) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log1p(-uniform[:, 1]))
    theta = 2.0 * math.pi * uniform[:, 0]
    values = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1).reshape(-1)
    return values[:size].astype(np.float32)
