"""A user's own pictures as training latents: a folder of images with captions, encoded once by the source pipeline.

In: a folder with `metadata.jsonl` (one JSON object a line, `file_name` and `text`, as Hugging Face's imagefolder has
it) and a StableDiffusionPipeline. Out: `LatentData` for distill_unet.py, read from float16 shards on disk; a killed
encoding goes on with the next shard. Pictures are scaled to cover the square and cropped at the centre.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentrelay.compress.errors import TrainingError
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

SHARD = 64


@dataclass(frozen=True)
class ImageLatents:
    """Scaled latents (n, C, h, w) and text states (n, T, D) in float16, mapped from disk; `empty` (T, D)."""

    latents: Sequence[NDArray[np.float16]]
    states: Sequence[NDArray[np.float16]]
    empty: NDArray[np.float16]
    identity: str

    def __len__(self) -> int:
        """How many pictures."""
        return sum(len(shard) for shard in self.latents)

    def batch(self, rng: np.random.Generator, count: int, caption_dropout: float) -> tuple[Tensor, Tensor]:
        """See `LatentData.batch`."""
        rows = [divmod(int(row), SHARD) for row in rng.integers(0, len(self), size=count)]
        context = np.stack([self.states[shard][row] for shard, row in rows]).astype(np.float32)
        context[rng.random(count) < caption_dropout] = self.empty.astype(np.float32)
        latents = np.stack([self.latents[shard][row] for shard, row in rows]).astype(np.float32)
        return torch.from_numpy(latents), torch.from_numpy(context)


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """Picture files with their captions. Raises TrainingError naming the line that is wrong."""
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise TrainingError(
            "the data folder has no captions",
            got=str(folder),
            expected="metadata.jsonl in it",
            do='Write one line a picture: {"file_name": "a.png", "text": "..."}.',
        )
    rows: list[tuple[Path, str]] = []
    try:
        lines = metadata.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{metadata} cannot be read ({error})", expected="UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path, text = folder / row["file_name"], str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{metadata}, line {number} is not a caption ({error})",
                got=line[:120],
                expected='{"file_name": "...", "text": "..."}',
            ) from error
        if not path.is_file():
            raise TrainingError(f"{metadata}, line {number} names a file that is not there", got=str(path))
        rows.append((path, text))
    if len(rows) < 2:
        raise TrainingError("the data folder has too few pictures", got=len(rows), expected="at least 2")
    return rows


def encode_folder(
    pipeline: Any, folder: Path, cache: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[ImageLatents, ImageLatents]:
    """Training and held-out latents (a twentieth of the pictures, at least one) of a folder of captioned pictures.

    `cache` holds one folder for this source and these files. Raises TrainingError for captions and pictures that
    cannot be read.
    """
    rows = read_captions(folder)
    held = max(1, len(rows) // 20)
    place = cache / _identity(pipeline, rows)[:16]
    place.mkdir(parents=True, exist_ok=True)
    empty = _states(pipeline, [""])[0]
    parts = []
    for name, part in (("train", rows[:-held]), ("held-out", rows[-held:])):
        latents, states = [], []
        for first in range(0, len(part), SHARD):
            paths = [place / f"{name}-{kind}-{first // SHARD:05d}.npy" for kind in ("latents", "states")]
            if not all(path.exists() for path in paths):
                shard = part[first : first + SHARD]
                _save(paths[0], _latents(pipeline, [path for path, _ in shard]))
                _save(paths[1], _states(pipeline, [text for _, text in shard]))
            latents.append(np.load(paths[0], mmap_mode="r"))
            states.append(np.load(paths[1], mmap_mode="r"))
            if progress is not None:
                progress(min(first + SHARD, len(part)), len(part))
        parts.append(ImageLatents(latents, states, empty, f"{name} {_identity(pipeline, rows)}"))
    return parts[0], parts[1]


@torch.no_grad()
def _latents(pipeline: Any, paths: Sequence[Path]) -> NDArray[np.float16]:
    """(n, C, h, w), scaled; the distribution's mean."""
    size, factor = pipeline.unet.config.sample_size, 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
    found = [
        pipeline.vae.encode(_picture(path, (columns * factor, rows * factor))).latent_dist.mean.float()
        for path in paths
    ]
    scaled: Tensor = torch.cat(found) * pipeline.vae.config.scaling_factor
    return np.asarray(scaled.half())


def _picture(path: Path, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), size, Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise TrainingError(
            f"{path} is not a picture that can be read ({error})", do="Remove or replace it."
        ) from error
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


@torch.no_grad()
def _states(pipeline: Any, texts: Sequence[str]) -> NDArray[np.float16]:
    """(n, T, D)."""
    tokenizer = pipeline.tokenizer
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    states: Tensor = pipeline.text_encoder(tokens.input_ids)[0]
    return np.asarray(states.half())


def _identity(pipeline: Any, rows: Sequence[tuple[Path, str]]) -> str:
    """A digest of the captions, the files' names, sizes and dates, and the encoders' weights."""
    digest = hashlib.sha256()
    for path, text in rows:
        stat = path.stat()
        digest.update(json.dumps([path.name, stat.st_size, stat.st_mtime_ns, text]).encode())
    for part in (pipeline.vae, pipeline.text_encoder):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, array: NDArray[np.float16]) -> None:
    beside = path.with_name(f".{path.name}.tmp.npy")
    np.save(beside, array)
    beside.replace(path)
