"""`evaluate --sweep` on a tiny 128-pixel pipeline: what a row holds, that the pieces join, resuming, and refusals.

The networks are random, so scores mean nothing here; the figures that can be known (FLOPs, bytes, the all-cloud row,
a student that is the teacher) are checked against the parts they come from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import array_cache
from latentrelay.tools.sweep import parse_splits

Run = Callable[..., Any]
STEPS, COUNT, SEED = 4, 3, 5
ROW = {
    "student",
    "split",
    "decoder",
    "attribute_accuracy",
    "attribute_accuracy_difference",
    "attribute_accuracy_difference_95",
    "exact_scene_rate",
    "frechet_distance",
    "frechet_ratio",
    "frechet_ratio_95",
    "psnr_db",
    "ssim",
    "cloud_flops",
    "cloud_flops_saving",
    "cloud_flops_saving_without_decode",
    "cloud_decode_flops",
    "device_flops",
    "device_decode_flops",
    "cloud_seconds",
    "cloud_decode_seconds",
    "device_seconds",
    "device_decode_seconds",
    "handoff_bytes",
    "wire_bytes",
}
TIMES = {"cloud_seconds", "cloud_decode_seconds", "device_seconds", "device_decode_seconds"}


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of 16x16 latents and 128 pixels, with a student that is the teacher itself, released and as a copy."""
    folder = tmp_path_factory.mktemp("model")
    pipeline = tiny.make_pipeline(
        folder / "work", vae_widths=(8, 8, 8, 8), sample_size=16, max_length=32, prediction_type="v_prediction"
    )
    tiny.save_pipeline(pipeline, folder / "model")
    pipeline.unet.save_pretrained(folder / "model" / "students" / "itself" / "unet", safe_serialization=True)
    shutil.copytree(folder / "model" / "students" / "itself", folder / "copy")
    return Path(folder / "model")


@pytest.fixture
def sweep(model: Path, command: Run) -> Run:
    """`sweep(folder, *more)`: three captions of the gate split, four steps."""

    def run(output: Path, *more: object) -> Any:
        size = ("--captions", COUNT, "--seed", SEED, "--num-steps", STEPS, "--split", "gate")
        return command("evaluate", "--sweep", "--model", model, *size, "--json", "-o", output, *more)

    return run


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep that `document` makes; its cache serves the other tests (copied where they change it)."""
    return tmp_path_factory.mktemp("sweep") / "out"


@pytest.fixture
def document(sweep: Run, model: Path, kept: Path) -> dict[str, Any]:
    """Both students, splits 0, 2 and 4; made once."""
    if (kept / "sweep.json").exists():
        return dict(json.loads((kept / "sweep.json").read_text()))
    done = sweep(kept, "--splits", "2,0", "--student", "itself", "--student", model.parent / "copy")
    assert done.status == 0
    assert json.loads((kept / "sweep.json").read_text()) == done.json
    return dict(done.json)


def assert_same_rows(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The first student's rows, seconds left out, are the same but for the last bits of what was computed twice; these
    pictures differ from the all-cloud ones in a few last bits too, so their PSNR is loose."""
    rows, others = ([row for row in each["rows"] if row["student"] == "itself"] for each in (first, second))
    assert len(rows) == len(others) == 3
    for row, other in zip(rows, others, strict=True):
        for name in ROW - TIMES:
            value = row[name]
            close = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)
            assert other[name] == (pytest.approx(value, abs=6) if name == "psnr_db" else close), name


def test_the_rows(document: dict[str, Any], kept: Path) -> None:
    assert [(row["student"], row["split"]) for row in document["rows"]] == [
        (name, split) for name in ("itself", "copy") for split in (0, 2, STEPS)
    ]
    for row in [*document["rows"], document["cloud_latents_decoded_on_device"]]:
        assert set(row) == ROW
    table = (kept / "sweep.md").read_text().splitlines()
    assert sum(line.startswith("| itself") for line in table) == 3
    assert sum(line.startswith("| cloud latents") for line in table) == 1
    assert (kept / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not list(kept.glob(".*"))


def test_the_all_cloud_row(document: dict[str, Any]) -> None:
    whole = [row for row in document["rows"] if row["split"] == STEPS]
    assert {**whole[0], "student": ""} == {**whole[1], "student": ""}
    row = whole[0]
    assert (row["psnr_db"], row["ssim"], row["frechet_ratio"]) == (100.0, pytest.approx(1.0), 1.0)
    assert row["attribute_accuracy_difference_95"] == [0.0, 0.0]
    assert (row["cloud_flops_saving"], row["device_flops"], row["device_seconds"]) == (0.0, 0, 0.0)
    assert (row["handoff_bytes"], row["wire_bytes"] > 0) == (0, True)
    assert row["attribute_accuracy"] == pytest.approx(document["all_cloud"]["attribute_accuracy"])
    assert row["frechet_distance"] == pytest.approx(document["all_cloud"]["frechet_distance"])


def test_flops_are_sums_of_the_counted_parts(document: dict[str, Any]) -> None:
    for name, student in document["students"].items():
        part = student["flops"]
        rows = {row["split"]: row for row in document["rows"] if row["student"] == name}
        whole = STEPS * part["cloud_step"] + part["text_encoder"]
        assert rows[STEPS]["cloud_flops"] == whole + part["cloud_decode"]
        assert rows[2]["cloud_flops"] == 2 * part["cloud_step"] + part["text_encoder"]
        assert rows[2]["device_flops"] == 2 * part["device_step"] + part["text_encoder"] + part["device_decode"]
        assert rows[2]["cloud_flops_saving"] == 1 - rows[2]["cloud_flops"] / (whole + part["cloud_decode"])
        assert rows[2]["cloud_flops_saving_without_decode"] == 1 - rows[2]["cloud_flops"] / whole
        assert (rows[0]["cloud_flops"], rows[0]["cloud_flops_saving"], rows[0]["handoff_bytes"]) == (0, 1.0, 0)
        assert part["device_decode"] == part["cloud_decode"]  # no light VAE here
        assert part["device_step"] == part["cloud_step"]
        assert student["parameters_ratio"] == 1.0


def test_a_student_that_is_the_teacher_ends_where_the_cloud_does(document: dict[str, Any]) -> None:
    """Latents, solver memory, seeds, prompts and guidance all cross: what is left is float16 on the wire."""
    rows = {row["split"]: row for row in document["rows"] if row["student"] == "itself"}
    assert rows[0]["psnr_db"] > 60
    assert rows[2]["psnr_db"] > 55
    assert document["cloud_latents_decoded_on_device"]["psnr_db"] > 55
    assert max(rows[0]["psnr_db"], rows[2]["psnr_db"]) < 100
    assert document["engine_agreement_db"] > 60


def test_the_teachers_states_are_the_engines(model: Path, tmp_path: Path) -> None:
    """Row by row of a batch, after every step, latents and memory, within rounding of what a cloud hands over."""
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.requests import RunRequest
    from latentrelay.reference import pipeline as reference
    from latentrelay.tools.teacher_runs import Teacher

    pipeline = reference.load(model)
    engine = Engine(pipeline, name="tiny")
    teacher = Teacher(pipeline, engine.digest, STEPS, 4.0, array_cache.ArrayCache(tmp_path))
    prompts, seeds = ["a red cat", "", "the cat in a ring"], [1, 2**32 + 1, 99]
    batch = teacher.batch(prompts, seeds)
    assert batch.pictures.shape == (3, 128, 128, 3)
    stronger = Teacher(pipeline, engine.digest, STEPS, 8.0, teacher.cache).batch(prompts, seeds)
    assert not np.array_equal(stronger.latents, batch.latents)  # other settings do not meet what is kept
    assert np.array_equal(teacher.batch(prompts, seeds).latents, batch.latents)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        for split in range(1, STEPS):
            request = RunRequest(
                prompt=prompt, seed=seed, guidance=4.0, height=128, width=128, num_steps=STEPS, split=split
            )
            handoff, (latents, memory) = engine.run(request), batch.handoff(row, split)
            assert latents.dtype == np.float16
            np.testing.assert_allclose(latents, handoff.latents, rtol=2e-3, atol=2e-3)
            np.testing.assert_allclose(memory, handoff.x0_prev, rtol=2e-3, atol=2e-3)


def test_a_killed_sweep_goes_on_and_ends_the_same(
    sweep: Run, document: dict[str, Any], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write, written = tmp_path / "out", array_cache._write, []
    shutil.copytree(kept / "cache" / "bundles", output / "cache" / "bundles")

    def dying(path: Path, arrays: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(path, arrays)
        written.append(path)

    monkeypatch.setattr(array_cache, "_write", dying)
    assert sweep(output, "--splits", "0,2", "--student", "itself").status == 130
    assert not (output / "sweep.json").exists()
    monkeypatch.setattr(array_cache, "_write", write)
    before = {path: path.stat().st_mtime_ns for path in written}
    done = sweep(output, "--splits", "0,2", "--student", "itself")
    assert {path: path.stat().st_mtime_ns for path in written} == before
    assert_same_rows(done.json, document)


def test_what_is_spoilt_on_disk_is_made_again(sweep: Run, document: dict[str, Any], kept: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(kept, output)
    for entry in (output / "cache" / "device").iterdir():
        entry.write_bytes(entry.read_bytes()[:100])
    done = sweep(output, "--splits", "0,2", "--student", "itself")
    assert "made again" in done.err
    assert_same_rows(done.json, document)


@pytest.mark.slow
def test_a_spoilt_bundle_is_built_again(sweep: Run, document: dict[str, Any], kept: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(kept, output)
    (bundle,) = (output / "cache" / "bundles").iterdir()
    weights = bundle / "unet" / "model.onnx_data"
    intact = weights.read_bytes()
    weights.write_bytes(intact[:7] + bytes([intact[7] ^ 1]) + intact[8:])
    assert sweep(output, "--splits", "0", "--student", "itself").status == 0
    assert weights.read_bytes() == intact


def test_a_smaller_student_is_counted_as_such(model: Path, tiny: Any, tmp_path: Path) -> None:
    from latentrelay.compress.flops import unet_step_flops
    from latentrelay.reference import pipeline as reference
    from latentrelay.tools.students import load
    from latentrelay.tools.sweep_rows import count
    from latentrelay.tools.teacher_runs import Teacher

    pipeline = reference.load(model)
    teacher = Teacher(pipeline, "sha256:0", STEPS, 4.0, array_cache.ArrayCache(tmp_path))
    tiny.make_unet(widths=(4, 8), sample_size=16).save_pretrained(tmp_path / "narrow", safe_serialization=True)
    flops = count(teacher, load("narrow", tmp_path / "narrow", pipeline), None)
    assert flops.device_step == unet_step_flops(tiny.make_unet(widths=(4, 8), sample_size=16), 16, 16, 32)
    assert flops.cloud_step == unet_step_flops(pipeline.unet, 16, 16, 32) > 2 * flops.device_step
    assert flops.num_steps == STEPS


def test_splits_that_are_asked_for() -> None:
    assert parse_splits(None, 25) == [0, 2, 5, 8, 10, 15, 20, 25]
    assert parse_splits(None, 9) == [0, 2, 5, 8, 9]
    assert parse_splits(" 8,2, 8", 25) == [2, 8, 25]
    for words in ("26", "-1", "8,", "x", "1.5", "", "8;9", "²"):
        with pytest.raises(RequestError, match="--splits"):
            parse_splits(words, 25)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--splits", "2,9"), "--splits"),
        (("--student", "nobody"), "nobody"),
        (("--student", "itself", "--student", "itself"), "same name"),
        (("--captions", 1), "too few captions"),
        (("--model", "reference-few-step"), "full-length"),
        (("--split", "train"), "data split"),
        (("--decoder", "heavy"), "no such decoder"),
        (("--decoder", "light"), "light_vae"),
    ],
)
def test_misuse_is_said_before_any_work(sweep: Run, tmp_path: Path, more: tuple[object, ...], said: str) -> None:
    done = sweep(tmp_path / "out", *more)
    assert (done.status, done.json["ok"]) == (2, False)
    assert said in done.json["reason"]
    assert not (tmp_path / "out").exists()


def test_students_that_do_not_fit(sweep: Run, tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    tiny.make_unet(sample_size=16, text_dim=32).save_pretrained(folder, safe_serialization=True)
    done = sweep(tmp_path / "out", "--student", folder)
    assert done.status == 2
    assert "cross_attention_dim" in done.json["reason"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet3DConditionModel"}))
    assert "UNet3DConditionModel" in sweep(tmp_path / "out", "--student", folder).json["reason"]
    (folder / "config.json").write_text("{")
    assert "not JSON" in sweep(tmp_path / "out", "--student", folder).json["reason"]


def test_a_model_without_students_and_one_of_another_size(tiny: Any, command: Run, tmp_path: Path) -> None:
    small = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "small")
    done = command("evaluate", "--sweep", "--model", small, "--captions", 2, "--json", "-o", tmp_path / "out")
    assert (done.status, "no student" in done.json["reason"]) == (2, True)
    student = ("--student", small / "unet")
    done = command("evaluate", "--sweep", "--model", small, *student, "--captions", 2, "--json", "-o", tmp_path / "out")
    assert (done.status, "128 pixels" in done.json["reason"]) == (2, True)
