"""Put a student that `latentrelay compress` made among the reference's weights, its U-Net in float16, with its Plan.

`python -m latentrelay.tools.release_student STUDENT [--to FOLDER]`. What ships is what was measured: the digest
in the Plan is that of the rounded weights, the rest of the Plan is taken over.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from latentrelay.compress.plan import Plan
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.reference.pipeline import reference_path
from latentrelay.runtime.digest import weights_digest


def release(student: Path, out: Path) -> str:
    """Write `out`/unet (float16) and the Plan; the digest of the released weights. An earlier release is replaced."""
    plan = Plan.load(student)
    unet: Any = StudentUNet2DConditionModel.from_pretrained(student / "unet", torch_dtype=torch.float16)
    beside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    unet.save_pretrained(beside / "unet", safe_serialization=True)
    config = beside / "unet" / "config.json"
    plain = {key: value for key, value in json.loads(config.read_text()).items() if key != "_name_or_path"}
    config.write_text(json.dumps(plain, indent=2) + "\n")
    digest = weights_digest((name, tensor.float().numpy()) for name, tensor in unet.state_dict().items())
    compression = {**plan.recipe.compression, "student_digest": digest}
    Plan(replace(plan.recipe, compression=compression), plan.tables).save(beside)
    if (out / "README.md").is_file():
        shutil.copyfile(out / "README.md", beside / "README.md")
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside.rename(out)
    return digest


def main(
    student: Annotated[Path, typer.Argument(help="The folder that `latentrelay compress` wrote.")],
    to: Annotated[Path | None, typer.Option(help="Instead of the reference's own folder of students.")] = None,
) -> None:
    """Release a student of the reference."""
    out = (to or reference_path() / "students") / student.resolve().name
    typer.echo(f"{out}: {release(student, out)}")


if __name__ == "__main__":
    typer.run(main)
