"""Preview factors of a bundle: the linear map from latents to RGB that is nearest to what its own decoder makes.

In: the decoder that ships, and latents (1, C, h, w) as a run leaves them and the wire carries them, before any scaling.
Out: a `PreviewSpec` and how near it comes. A picture (h * d, w * d, 3) is averaged over the d x d pixels of each latent
and fitted by least squares with a small ridge. It is no decoder: one pixel a latent, no texture, no sharp edge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from latentrelay.compress.denoising_chain import Floats
from latentrelay.runtime.manifest import PreviewSpec
from numpy.typing import NDArray

FIT, HELD_OUT = 8, 4  # pictures
_RIDGE = 1e-3  # of the latents' mean variance
_COARSEST, _GRAIN = 16, 0.3  # of random latents: the widest patches in latents, and white noise on top of them
_SEED = 20261123
Decode = Callable[[Floats], Floats]


def fit_preview(
    decode: Decode, latents: Iterable[Floats], held_out: Iterable[Floats]
) -> tuple[PreviewSpec, dict[str, Any]]:
    """Factors fitted on `latents`; and on others the PSNR in dB of the preview to the averaged picture, with that of
    the fitted pictures' mean colour beside it. `decode`: latents -> (h, w, 3) in 0..1, averaged."""
    inputs, targets = _pixels(decode, latents)
    middle, colour = inputs.mean(axis=0), targets.mean(axis=0)
    centred = inputs - middle
    gram = centred.T @ centred / len(inputs)
    ridge = _RIDGE * max(float(np.trace(gram)) / len(gram), 1e-12) * np.eye(len(gram))
    weights = np.linalg.solve(gram + ridge, centred.T @ (targets - colour) / len(inputs)).T  # (3, C)
    bias = colour - weights @ middle
    others, wanted = _pixels(decode, held_out)
    return PreviewSpec(tuple(_rounded(row) for row in weights), _rounded(bias)), {
        "psnr_db": _psnr(others @ weights.T + bias, wanted),
        "mean_colour_psnr_db": _psnr(np.broadcast_to(colour, wanted.shape), wanted),
    }


def averaging(session: Any, scaling: float, shift: float, downscale: int) -> Decode:
    """The decoder graph in `session` (ONNX Runtime's), fed as the runtime feeds it, its picture averaged to the
    latents' grid."""

    def decode(latents: Floats) -> Floats:
        unscaled = np.asarray(latents, np.float32) / np.float32(scaling) + np.float32(shift)
        (sample,) = session.run(["sample"], {"latent_sample": unscaled})
        pixels = np.clip(sample[0].transpose(1, 2, 0) / 2 + 0.5, 0.0, 1.0)
        rows, columns = latents.shape[2:]
        averaged: Floats = pixels.reshape(rows, downscale, columns, downscale, 3).mean(axis=(1, 3))
        return averaged

    return decode


def random_latents(shape: Sequence[int], count: int, first: int = 0) -> Iterator[Floats]:
    """Latents (1, C, h, w) for a build that records no runs: flat patches of 2 to 16 latents, with some grain. White
    noise alone decodes to grey. `first`: how many draws were taken elsewhere."""
    _, channels, rows, columns = shape
    for index in range(first, first + count):
        rng = np.random.default_rng([_SEED, index])
        size = 2 ** (1 + index % int(np.log2(_COARSEST)))
        coarse = rng.standard_normal((1, channels, -(-rows // size), -(-columns // size)), dtype=np.float32)
        patches = coarse.repeat(size, axis=2).repeat(size, axis=3)[:, :, :rows, :columns]
        yield patches + np.float32(_GRAIN) * rng.standard_normal(patches.shape, dtype=np.float32)


def _pixels(decode: Decode, latents: Iterable[Floats]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latents (n, C) and colours (n, 3) of every latent pixel."""
    pairs = [(each[0].reshape(each.shape[1], -1).T, decode(each).reshape(-1, 3)) for each in latents]
    inputs, targets = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return inputs, targets


def _psnr(got: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    error = float(np.mean((np.clip(got, 0.0, 1.0) - wanted) ** 2))
    return round(float(-10 * np.log10(max(error, 1e-20))), 2)


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
