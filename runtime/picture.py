"""Pixels to a PNG file: pillow imported when used, the file replaced in one move or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from latentrelay.runtime.errors import MissingExtraError, RequestError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def to_image(pixels: NDArray[np.float32]) -> Image:
    """An 8-bit RGB pillow image of pixels (H, W, 3) in 0..1."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("PIL", None, purpose="Making a picture") from error
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise RequestError("the pixels have a wrong shape", got=pixels.shape, expected="(H, W, 3)")
    return Image.fromarray((pixels.clip(0.0, 1.0) * 255).round().astype(np.uint8))


def save_png(image: Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG beside its target and move it there, so that no reader sees half a file. Returns the path."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 is not what a picture should have
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target
