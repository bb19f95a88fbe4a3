"""Stages of a build: made once, taken over when nothing changed, made again when anything did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from latentrelay.export.parity import Sample
from latentrelay.export.reference_run import ReferenceRun
from latentrelay.export.sample_file import load_samples, save_samples
from latentrelay.export.stages import RECORD, StageStore, place_files, stage_digest


class Counting:
    """Writes one file and counts how often it was asked to."""

    def __init__(self, text: str = "content") -> None:
        self.calls, self.text = 0, text

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(self.text)


def test_a_stage_is_made_once_and_its_inputs_decide(tmp_path: Path) -> None:
    write, store = Counting(), StageStore(tmp_path)
    first = store.made("unet", "exporting", {"weights": "sha256:1", "size": (2, 3)}, write)
    again = StageStore(tmp_path)
    assert again.made("unet", "exporting", {"weights": "sha256:1", "size": [2, 3]}, write) == first
    assert (write.calls, store.reused, again.reused, list(again.seconds)) == (1, [], ["unet"], [])
    other = again.made("unet", "exporting", {"weights": "sha256:2", "size": [2, 3]}, write)
    assert write.calls == 2
    assert other != first
    assert first.is_dir()
    assert stage_digest(other) == stage_digest(first)  # the same files


@pytest.mark.parametrize("damage", ["changed", "removed", "added", "record"])
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: str) -> None:
    write, store = Counting(), StageStore(tmp_path)
    place = store.made("unet", "exporting", {"a": 1}, write)
    match damage:
        case "changed":
            (place / "sub" / "a.txt").write_text("other")
        case "removed":
            (place / "sub" / "a.txt").unlink()
        case "added":
            (place / "more.txt").write_text("")
        case _:
            (place / RECORD).write_text("{")
    assert store.made("unet", "exporting", {"a": 1}, write) == place
    assert write.calls == 2
    assert (place / "sub" / "a.txt").read_text() == "content"
    assert not (place / "more.txt").exists()


def test_a_stage_that_fails_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    kept = store.made("unet", "exporting", {"a": 1}, Counting())

    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.made("unet", "exporting", {"a": 2}, fail)
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    left = tmp_path / ".unet.killed.partial"  # as a killed process leaves it
    left.mkdir()
    (tmp_path / ".other.killed.partial").mkdir()
    (tmp_path / ".unet.1.under_way.partial").mkdir()  # process 1 is alive
    store.made("unet", "exporting", {"a": 3}, Counting())
    assert not left.exists()
    assert (tmp_path / ".other.killed.partial").exists()
    assert (tmp_path / ".unet.1.under_way.partial").exists()


def test_another_version_of_a_tool_is_another_stage(tmp_path: Path) -> None:
    write = Counting()
    first = StageStore(tmp_path, tools={"onnxruntime": "1.32.0"}).made("kernels", "counting", {}, write)
    again = StageStore(tmp_path, tools={"onnxruntime": "1.33.0"}).made("kernels", "counting", {}, write)
    assert (first != again, write.calls) == (True, 2)


def test_files_are_placed_without_the_record(tmp_path: Path) -> None:
    place = StageStore(tmp_path / "work").made("unet", "exporting", {}, Counting("x"))
    place_files(place, tmp_path / "bundle" / "unet")
    placed = [path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*.*")]
    assert placed == ["unet/sub/a.txt"]
    assert json.loads((place / RECORD).read_text())["inputs"] == {"tool_versions": {}}


def test_a_torch_run_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return generator.standard_normal(shape).astype(np.float32)

    run = ReferenceRun(
        tuple(array(1, 4, 2, 2) for _ in range(12)),
        tuple(array(1, 4, 2, 2) for _ in range(12)),
        array(2, 5, 8),
        np.arange(10).reshape(2, 5),
        7.3,
        tuple(array(1, 4, 2, 2) for _ in range(11)),
    )
    samples = {
        "unet": [
            Sample({"sample": array(2, 4), "a": array(1)}, {"z": array(3), "b": np.array(row)}) for row in range(3)
        ],
        "step_full": [Sample({"step": np.array(4), "latents": array(1, 4)}, {"next_latents": array(1)})],
    }
    save_samples(tmp_path, run, samples)
    again, cases = load_samples(tmp_path)
    assert again.guidance == 7.3
    assert np.array_equal(again.input_ids, run.input_ids)
    for field in ("latents", "x0_prev", "noise"):
        pairs = zip(getattr(run, field), getattr(again, field), strict=True)
        assert all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)
    for component, expected in samples.items():
        for mine, theirs in zip(expected, cases[component], strict=True):
            assert list(mine.inputs) == list(theirs.inputs)
            assert list(mine.outputs) == list(theirs.outputs)
            assert all(theirs.inputs[name].shape == mine.inputs[name].shape for name in mine.inputs)
            assert all(theirs.outputs[name].tobytes() == mine.outputs[name].tobytes() for name in mine.outputs)
