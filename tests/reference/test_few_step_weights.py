"""The shipped few-step adapters: their share of the weights, what they say of themselves, and that they fit."""

from pathlib import Path

import pytest
from latentrelay.compress.lora import Adapter, merge
from latentrelay.reference.pipeline import GUIDANCE, load, reference_path
from latentrelay.tools.models import FEW_STEP, FEW_STEP_STUDENT, few_step_adapters, merging

try:
    FOLDER = reference_path() / "few_step"
except FileNotFoundError:
    FOLDER = Path("absent")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the few-step adapters are not in this checkout")


def test_both_files_share_five_mebibytes() -> None:
    files = sorted(FOLDER.glob("*.safetensors"))
    assert [path.name for path in files] == [f"{FEW_STEP_STUDENT}_lora.safetensors", "teacher_lora.safetensors"]
    assert sum(path.stat().st_size for path in files) <= 5 * 2**20


def test_the_teachers_adapters_change_every_layer_and_bring_the_scheduler() -> None:
    pipeline = load()
    before = pipeline.unet.mid_block.resnets[0].conv1.weight.detach().clone()
    adapt = merging(FEW_STEP)
    assert adapt is not None
    adapt(pipeline)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    change = (pipeline.unet.mid_block.resnets[0].conv1.weight.detach() - before).norm() / before.norm()
    assert float(change) > 0.01


def test_the_students_adapters_fit_the_released_student() -> None:
    from latentrelay.compress.student_unet import StudentUNet2DConditionModel

    folder = reference_path() / "students" / FEW_STEP_STUDENT / "unet"
    if not folder.is_dir():
        pytest.skip("the released student is not in this checkout")
    pipeline = load()
    pipeline.unet = StudentUNet2DConditionModel.from_pretrained(folder).float()
    (merged,) = merge(pipeline, [Adapter(few_step_adapters(FEW_STEP_STUDENT))])
    assert merged.layers == 244
    assert merged.few_step == {"guidance": GUIDANCE, "num_steps": [4, 8]}
