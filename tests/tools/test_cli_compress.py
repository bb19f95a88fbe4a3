"""`latentrelay compress`: a folder nobody prepared becomes a student that diffusers loads, with a Plan; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latentrelay.compress.plan import Plan
from latentrelay.compress.student_unet import StudentUNet2DConditionModel
from PIL import Image

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder: 16x16 pixels, a U-Net of two levels."""
    work = tmp_path_factory.mktemp("source")
    return Path(tiny.save_pipeline(tiny.make_pipeline(work / "work", seed=7, layers_per_block=2), work / "pipeline"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty captioned pictures of several sizes."""
    place = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        pixels = rng.integers(0, 255, size=(20 + number % 5, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"the cat {number}"}))
    (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return place


def compress(command: Run, folder: Path, pictures: Path, out: Path, *more: object) -> Any:
    fixed = ("--data", pictures, "--batch", 4, "--learning-rate", "1e-3")
    return command("compress", "-m", folder, "-o", out, *fixed, *more, "--json")


@pytest.fixture(scope="module")
def made(folder: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One student, made once: its folder and what the command printed."""
    from latentrelay.tools.compress import Training, run

    out = tmp_path_factory.mktemp("student") / "small"
    printed: list[Any] = []
    patch = pytest.MonkeyPatch()
    patch.setattr("latentrelay.tools.compress.emit", lambda document, *_: printed.append(document))
    run(
        out, model=str(folder), geometry=None, device=None, recipe=None, parameters=20_000, allocation="sensitivity",
        loras=(), light_vae=None, training=Training(steps=4, batch=4, learning_rate=1e-3, data=pictures),
        scores="measured", revision=None, config=None, work=None, profiles=None, overwrite=False, as_json=True,
    )  # fmt: skip
    patch.undo()
    return out, printed[0]


def test_the_document_says_what_was_made(made: tuple[Path, dict[str, Any]]) -> None:
    out, document = made
    assert 19_000 < document["parameters"] <= document["target_parameters"] == 20_000
    assert document["parameters"] < document["source_parameters"]
    assert document["roundtrip_identical"] is True
    assert document["held_out_before"] > 0
    assert document["held_out_after"] > 0
    assert document["distillation"]["recipe"]["steps"] == 4
    student: Any = StudentUNet2DConditionModel.from_pretrained(out / "unet")
    assert document["block_mid_channels"] == list(student.config.resnet_mid_channels.values())
    assert document["self_attention_heads"] == list(student.config.self_attention_heads.values())
    assert sum(parameter.numel() for parameter in student.parameters()) == document["parameters"]
    for name in ("scores.png", "losses.png"):
        with Image.open(out / name) as plot:
            assert plot.size[0] > 300


def test_diffusers_loads_and_runs_the_folder(made: tuple[Path, dict[str, Any]]) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(made[0], safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.unet) is StudentUNet2DConditionModel
    picture = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    assert picture.images.shape == (1, 16, 16, 3)
    assert np.isfinite(picture.images).all()


def test_the_plan_records_every_decision(made: tuple[Path, dict[str, Any]]) -> None:
    out, document = made
    plan = Plan.load(out)
    record = plan.recipe.compression
    for key in ("parameters", "scores", "shape", "budget", "distillation", "held_out_before", "held_out_after"):
        assert record[key] == document[key], key
    assert len(record["shape"]["widths"]) > 5
    assert {each["blocks"]["layers"] for each in record["shape"]["considered"]} == {None, 1}
    assert record["student_digest"].startswith("sha256:")


def test_a_bundle_of_the_student_finishes_the_source_s_handoffs(
    made: tuple[Path, dict[str, Any]], folder: Path, command: Run, serve_cloud: Any, tmp_path: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    bundle = tmp_path / "bundle"
    built = command(
        "build", "-m", folder, "--student", made[0], "-d", "pixel-8", "-o", bundle, "--num-steps", 4, "--json"
    )
    assert built.status == 0, built.err
    plan = Plan.load(bundle)
    assert plan.recipe.compression["student_digest"] == made[1]["student_digest"]
    source = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    with serve_cloud(source, name="source") as url:
        painted = command(
            "generate", "-b", bundle, "-p", "a cat", "--cloud", url, "--split", 2, "-o", tmp_path / "a.png", "--json"
        )
    assert painted.status == 0, painted.err
    assert painted.json["steps"] == {"cloud": 2, "device": 2}


def test_a_student_of_another_model_is_refused(
    made: tuple[Path, dict[str, Any]], tiny: Any, command: Run, tmp_path: Path
) -> None:
    other = tiny.make_pipeline(tmp_path / "work", seed=8)
    tiny.save_pipeline(other, tmp_path / "other")
    done = command(
        "build", "-m", tmp_path / "other", "--student", made[0], "-d", "pixel-8", "-o", tmp_path / "b", "--json"
    )
    assert done.status == 3
    assert "another model" in done.json["reason"]
    assert not (tmp_path / "b").exists()


def test_a_killed_run_resumes_to_the_same_student(
    folder: Path, pictures: Path, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import latentrelay.compress.training as training

    arguments = ("--parameters", 22_000, "--scores", "prior", "--steps", 40)
    whole = compress(command, folder, pictures, tmp_path / "whole", *arguments)
    assert whole.status == 0, whole.err
    left = [33]  # the scorer draws 8 before and some at each checkpoint: beyond the first
    draw = training.BatchRng.of.__func__  # type: ignore[attr-defined]

    def cut(cls: Any, seed: int, step: int) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return draw(cls, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(training.BatchRng, "of", classmethod(cut))
        killed = compress(command, folder, pictures, tmp_path / "cut", *arguments)
    assert killed.status == 130
    assert not (tmp_path / "cut").exists()
    resumed = compress(command, folder, pictures, tmp_path / "cut", *arguments)
    assert resumed.status == 0, resumed.err
    weights = [
        (tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


def test_what_cannot_be_is_said_and_leaves_nothing(
    folder: Path, pictures: Path, made: tuple[Path, dict[str, Any]], command: Run, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--parameters", 500), 3, "at least"),
        (("--recipe", "hybrid-sd-224m"), 3, "another network|levels|layers"),
        (("--recipe", "no-such"), 2, "hybrid-sd-224m"),
        (("--parameters", 20_000, "--allocation", "random"), 2, "uniform"),
        (("--parameters", 20_000, "--scores", "none"), 2, "prior"),
        ((), 2, "--device"),
        (("--parameters", 20_000, "--geometry", "sd14"), 2, "--geometry"),
    ]
    import re

    for arguments, status, words in cases:
        done = compress(command, folder, pictures, out, *arguments)
        assert done.status == status, (arguments, done.err)
        assert re.search(words, done.json["reason"]), done.json
        assert not out.exists()
    no_data = command("compress", "-m", folder, "-o", out, "--parameters", 20_000, "--scores", "prior", "--json")
    assert no_data.status != 0
    assert "--data" in no_data.json["reason"]
    again = compress(command, folder, pictures, made[0], "--parameters", 20_000)
    assert again.status == 2
    assert "--overwrite" in again.json["reason"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep.txt").write_text("mine")
    refused = compress(command, folder, pictures, mine, "--parameters", 20_000, "--overwrite")
    assert refused.status == 2
    assert (mine / "keep.txt").read_text() == "mine"


def test_pictures_that_cannot_be_read_are_named(folder: Path, pictures: Path, command: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(pictures, bad)
    (bad / "3.png").write_bytes(b"not a picture")
    done = compress(command, folder, bad, tmp_path / "s", "--parameters", 20_000, "--scores", "prior", "--steps", 1)
    assert done.status == 1
    assert "3.png" in done.json["reason"]
    with (bad / "metadata.jsonl").open("a") as lines:
        lines.write('{"file_name": "gone.png", "text": "x"}\n')
    done = compress(command, folder, bad, tmp_path / "s", "--parameters", 20_000, "--scores", "prior", "--steps", 1)
    assert done.status == 1
    assert "line 41" in done.json["reason"]


def test_a_full_disk_leaves_the_earlier_student(
    folder: Path, pictures: Path, made: tuple[Path, dict[str, Any]], process: Run, tmp_path: Path
) -> None:
    """The largest file that may be written is smaller than the student's weights: what a full disk does, repeatably."""
    import subprocess
    import sys

    earlier = tmp_path / "student"
    shutil.copytree(made[0], earlier)
    before = (earlier / "plan.json").read_bytes()
    words = ["compress", "-m", str(folder), "-o", str(earlier), "--parameters", "22000", "--scores", "prior"]
    words += ["--steps", "0", "--overwrite", "--json"]
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); "
        f"from latentrelay.tools.cli import main; main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["ok"] is False
    assert (earlier / "plan.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")) == []
