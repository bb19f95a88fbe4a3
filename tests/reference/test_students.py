"""The released students: sizes, what their Plans say, and that they are the networks that were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latentrelay.compress.plan import Plan
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from latentrelay.reference.pipeline import load, reference_path
from latentrelay.reference.students import CLASS_PARAMETERS, RELEASED_FOR, student_path
from latentrelay.runtime.digest import weights_digest

NAMES = ("phone-high", "phone-mid", "pi")
MIB = 1 << 20


@pytest.fixture(scope="module", params=NAMES)
def student(request: pytest.FixtureRequest) -> tuple[str, Path, Any]:
    folder = reference_path() / "students" / request.param
    unet = StudentUNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return request.param, folder, unet.eval()


def test_every_class_of_profile_has_a_student() -> None:
    for student_class in CLASS_PARAMETERS:
        assert (student_path(student_class) / "unet" / "config.json").is_file()
    assert set(RELEASED_FOR.values()) == set(NAMES)


def test_a_student_is_what_its_plan_says(student: tuple[str, Path, Any]) -> None:
    name, folder, unet = student
    record = Plan.load(folder).recipe.compression
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == record["parameters"] <= CLASS_PARAMETERS[name]
    digest = weights_digest((key, tensor.numpy()) for key, tensor in unet.state_dict().items())
    assert digest == record["student_digest"]
    assert record["held_out_after"] < record["held_out_before"]
    widths = record["shape"]["widths"]
    assert unet.config.resnet_mid_channels.items() <= widths.items()


@torch.no_grad()
def test_a_student_predicts_what_the_teacher_does(student: tuple[str, Path, Any]) -> None:
    """On noise and an empty prompt at a middle timestep: closer than a tenth of the teacher's power."""
    _, _, unet = student
    pipeline = load()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    tokens = pipeline.tokenizer(
        ["a large red star on sand", ""], padding="max_length", max_length=32, return_tensors="pt"
    )
    states = pipeline.text_encoder(tokens.input_ids)[0]
    wanted = pipeline.unet(latents, torch.tensor([500, 900]), states).sample
    got = unet(latents, torch.tensor([500, 900]), states).sample
    assert (got - wanted).square().mean() < 0.1 * wanted.square().mean()


def test_the_weights_keep_to_their_budget() -> None:
    weights = reference_path()

    def size(*folders: str) -> float:
        return (
            sum(path.stat().st_size for folder in folders for path in (weights / folder).rglob("*.safetensors")) / MIB
        )

    assert size("students") <= 12
    assert size("few_step") <= 5
    assert size("vae", "light_vae") <= 8
    assert size(".") <= 48
    teacher = sum(parameter.numel() for parameter in load().unet.parameters())
    assert CLASS_PARAMETERS["phone-mid"] <= 0.27 * teacher
