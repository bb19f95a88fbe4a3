"""Few-step distillation from a folder and a file of prompts, tiny: what it leaves, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import LCMScheduler
from latentrelay.compress.lora import Adapter, merge
from latentrelay.runtime.errors import RequestError
from latentrelay.tools import few_step
from latentrelay.tools.few_step import FewStepRecipe

RECIPE = FewStepRecipe(trajectories=8, steps=3, batch=8, rank=2)


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    pipeline = tiny.make_pipeline(tmp_path / "made", prediction_type="v_prediction")
    (tmp_path / "prompts.txt").write_text("a red cat\n\na thing on the other thing\n")
    return Path(tiny.save_pipeline(pipeline, tmp_path / "model"))


def distil(folder: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "model": str(folder),
        "student": None,
        "prompts": folder.parent / "prompts.txt",
        "guidance": 3.0,
        "recipe": RECIPE,
        "trajectories": None,
        "as_json": True,
    }
    few_step.run(folder.parent / "out", **{**arguments, **changes})


def test_it_leaves_adapters_that_make_a_few_step_model(
    folder: Path, tiny: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_step, "_SHARD", 4)
    distil(folder)
    document = json.loads(capsys.readouterr().out)
    path = Path(document["lora"])
    assert document["bytes"] == path.stat().st_size
    assert len(list((folder.parent / "out" / "trajectories").glob("trajectories-*.npz"))) == 2
    pipeline = tiny.make_pipeline(folder.parent / "again", prediction_type="v_prediction")
    (merged,) = merge(pipeline, [Adapter(path)])
    assert merged.few_step == {"guidance": 3.0, "num_steps": [4, 8]}
    assert isinstance(pipeline.scheduler, LCMScheduler)
    before = path.read_bytes()
    distil(folder)  # everything is there: nothing is trained again
    assert path.read_bytes() == before


def test_it_needs_prompts_and_a_model_that_was_not_distilled_yet(folder: Path, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="needs prompts"):
        distil(folder, prompts=None)
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        distil(folder, prompts=tmp_path / "empty.txt")
    with pytest.raises(RequestError, match="unknown target"):
        distil(folder, recipe=FewStepRecipe(target="both"))
    few = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "few", sampler="lcm"), tmp_path / "few-model")
    with pytest.raises(RequestError, match="distilled to few steps already"):
        distil(few, prompts=tmp_path / "prompts.txt")


def test_an_output_of_another_training_is_refused_and_stays(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(few_step, "_SHARD", 4)
    distil(folder)
    path = Path(json.loads(capsys.readouterr().out)["lora"])
    before = path.read_bytes()
    (tmp_path / "others.txt").write_text("a blue dog\n")
    with pytest.raises(RequestError, match="prompts differ"):
        distil(folder, prompts=tmp_path / "others.txt")
    with pytest.raises(RequestError, match="guidance differ"):
        distil(folder, guidance=2.0)
    assert path.read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("mine")
    with pytest.raises(RequestError, match="not a few-step training"):
        few_step.run(
            tmp_path / "mine",
            model=str(folder),
            student=None,
            prompts=tmp_path / "prompts.txt",
            guidance=3.0,
            recipe=RECIPE,
            trajectories=None,
            as_json=True,
        )
    assert [each.name for each in (tmp_path / "mine").iterdir()] == ["keep.txt"]
