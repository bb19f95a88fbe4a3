"""A student's folder: a diffusers pipeline of its parts with plan.json, written beside its place and renamed into it.

What may be replaced is only what this made: a folder whose plan.json says that a compression wrote it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentrelay.runtime.errors import RequestError


def check_student_output(output: Path, *, overwrite: bool) -> None:
    """Raise RequestError unless `output` is free, an empty folder, or a student that may be replaced."""
    if not (output.exists() or output.is_symlink()):
        return
    if output.is_symlink() or not output.is_dir():
        raise RequestError("the output is not a folder", got=str(output), do="Choose another output folder.")
    if not any(output.iterdir()):
        return
    if not _is_student(output):
        raise RequestError(
            "the output folder holds something that is not a student", got=str(output), do="Choose another folder."
        )
    if not overwrite:
        raise RequestError("the output folder is a student already", got=str(output), do="Give --overwrite.")


@contextmanager
def student_folder(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `output` to write into; renamed to it on success, removed on any failure."""
    check_student_output(output, overwrite=overwrite)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield partial
        partial.chmod(0o755)
        check_student_output(output, overwrite=overwrite)  # again: a training may have passed
        if output.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
            os.rename(output, retired / "student")
            try:
                os.rename(partial, output)
            except OSError:
                os.rename(retired / "student", output)
                raise
            finally:
                shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_student(folder: Path) -> bool:
    try:
        document = json.loads((folder / "plan.json").read_bytes())
        return bool(document["recipe"]["compression"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def roundtrip_identical(student: Any, folder: Path, tokens: int) -> bool:
    """Whether the U-Net saved in `folder` loads to the same weights and the same output, bit for bit.

    Weights of both are laid out afresh before they run (`student` is changed so): where a tensor begins in memory,
    which a memory-mapped file decides, and its channels' order, which training changes, may change a sum's rounding.
    """
    import torch
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    again: Any = StudentUNet2DConditionModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    for network in (student.eval(), again.eval()):
        for parameter in network.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    loaded = again.state_dict()
    if not all(torch.equal(tensor, loaded[name]) for name, tensor in student.state_dict().items()):
        return False
    side = 2 ** (len(student.config.block_out_channels) + 1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, student.config.in_channels, side, side, generator=generator)
    states = torch.randn(1, tokens, student.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        wanted, got = (network(latents, torch.tensor([500]), states).sample for network in (student, again))
    return torch.equal(wanted, got)
