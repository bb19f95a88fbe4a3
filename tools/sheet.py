"""A sheet of pictures with captions below them, as one PNG: what a person looks at before believing a score."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from latentrelay.runtime.picture import save_png
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_SIDE, _GAP, _LINE = 176, 10, 13


@dataclass(frozen=True)
class Cell:
    """One picture, float (H, W, 3) in 0..1, and its caption."""

    picture: NDArray[np.float32]
    caption: str


def save_sheet(rows: Sequence[Sequence[Cell]], path: Path, lines: int = 4) -> None:
    """Write the rows of cells; every picture is drawn 176 pixels wide."""
    font = ImageFont.load_default(size=11)
    height = _SIDE + lines * _LINE + _GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * (_SIDE + _GAP) + _GAP, len(rows) * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            x, y = _GAP + j * (_SIDE + _GAP), _GAP + i * height
            pixels = Image.fromarray(np.round(np.clip(cell.picture, 0, 1) * 255).astype(np.uint8))
            sheet.paste(pixels.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (x, y))
            for k, line in enumerate(textwrap.wrap(cell.caption, 32)[:lines]):
                draw.text((x, y + _SIDE + 2 + k * _LINE), line, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, path)
