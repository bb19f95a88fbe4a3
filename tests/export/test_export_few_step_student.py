"""A student made from the plain model, under the few-step model: only with consistency adapters of its own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from latentrelay.compress.lora import FEW_STEP, Adapter, LowRankUpdate
from latentrelay.compress.plan import PlanSource, full_plan
from latentrelay.compress.solver_tables import solver_table
from latentrelay.export.errors import UnsupportedSourceError
from latentrelay.export.source import load_source
from latentrelay.export.student import with_student
from safetensors.torch import save_file


def adapters_of(unet: Any, path: Path) -> Adapter:
    update = LowRankUpdate(unet, rank=2)
    with torch.no_grad():
        for up in update.up:
            up.fill_(0.01)
    save_file(update.tensors(), path, {FEW_STEP: json.dumps({"guidance": 4.0, "num_steps": [4, 8]})})
    return Adapter(path)


def test_the_plain_models_student_fits_the_few_step_model_with_adapters_of_its_own(tiny: Any, tmp_path: Path) -> None:
    model = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "made"), tmp_path / "model")
    plain = load_source(str(model))
    few = load_source(str(model), loras=[adapters_of(plain.pipeline.unet, tmp_path / "teacher.safetensors")])
    assert (plain.base_digest, few.base_digest) == (None, plain.digest)
    assert few.digest != plain.digest
    assert isinstance(few.pipeline.scheduler, LCMScheduler)

    student = tiny.make_unet(widths=(8, 12), heads=1)
    folder = tmp_path / "student"
    student.save_pretrained(folder / "unet")
    table = solver_table(plain.pipeline.scheduler, 25)
    made_from = PlanSource(plain.model, plain.digest, plain.family)
    full_plan(made_from, {}, "dpmsolver++", "DPMSolverMultistepScheduler", "sha256:0", table).save(folder)

    assert with_student(plain, folder)[0].digest == plain.digest
    with pytest.raises(UnsupportedSourceError, match="made from another model"):
        with_student(few, folder)
    source, record = with_student(few, folder, [adapters_of(student, tmp_path / "student.safetensors")])
    assert source.digest == few.digest
    assert [each["file"] for each in record["adapters"]] == ["student.safetensors"]
    assert isinstance(source.pipeline.scheduler, LCMScheduler)
    other = load_source(tiny.make_pipeline(tmp_path / "other", seed=9))
    with pytest.raises(UnsupportedSourceError, match="made from another model"):
        with_student(other, folder, [Adapter(tmp_path / "student.safetensors")])
