"""`latentrelay build`: a folder nobody prepared, and what it refuses by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in half precision, other widths, heads and text width than any other test's."""
    work = tmp_path_factory.mktemp("source")
    pipeline = tiny.make_pipeline(work / "work", widths=(12, 24), heads=3, text_dim=24, seed=5)
    return Path(tiny.save_pipeline(pipeline, work / "pipeline", half=True))


def test_a_folder_nobody_prepared(folder: Path, command: Run, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    precision = ("--precision", "fp32")
    done = command("build", "-m", folder, "-d", "pixel-8", "-o", bundle, "--num-steps", 4, *precision, "--json")
    assert done.status == 0, done.err
    document = done.json
    assert document["bundle"] == str(bundle)
    assert document["precision"] == "fp32"
    assert {"text_encoder", "unet", "step_full", "vae_decoder"} <= set(document["parity_db"])
    assert min(document["parity_db"].values()) >= 50.0
    assert all(value >= 0 for value in document["seconds"].values())
    verified = command("verify", bundle, "--json").json
    assert (verified["ok"], verified["digest"]) == (True, document["digest"])
    painted = command("generate", "-b", bundle, "-p", "a cat", "-o", tmp_path / "a.png", "--json").json
    assert painted["steps"] == {"cloud": 0, "device": 4}
    again = command("build", "-m", folder, "-d", "pixel-8", "-o", bundle, "--json")
    assert again.status == 2
    assert "overwrite" in again.json["reason"]


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    [
        ("model_index.json", "_class_name", "StableDiffusionXLPipeline", "pipeline class (SDXL)"),
        ("model_index.json", "vae", ["diffusers", "VQModel"], "vae"),
        ("model_index.json", "text_encoder", ["transformers", "T5EncoderModel"], "text_encoder"),
    ],
)
def test_an_unsupported_part_is_named(
    file: str, key: str, value: Any, words: str, folder: Path, command: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "pipeline"
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_dir():
            (copy / path.name).symlink_to(path)
    index = json.loads((folder / file).read_text())
    (copy / file).write_text(json.dumps({**index, key: value}))
    done = command("build", "-m", copy, "-d", "pixel-8", "-o", tmp_path / "b", "--json")
    assert (done.status, done.json["ok"], done.json["error"]) == (3, False, "UnsupportedSourceError")
    assert words in done.json["reason"]
    assert not (tmp_path / "b").exists()


def test_a_unet_with_class_embeddings_is_named(tiny: Any, command: Run, tmp_path: Path) -> None:
    pipeline = tiny.make_pipeline(tmp_path / "work", class_embed_type="timestep")
    folder = tiny.save_pipeline(pipeline, tmp_path / "pipeline")
    done = command("build", "-m", folder, "-d", "pixel-8", "-o", tmp_path / "b", "--json")
    assert done.status == 3
    assert "class embeddings" in done.json["reason"]


def test_unknown_devices_and_missing_models_are_misuse(folder: Path, command: Run, tmp_path: Path) -> None:
    done = command("build", "-m", folder, "-d", "pixel-9", "-o", tmp_path / "b", "--json")
    assert (done.status, done.json["error"]) == (2, "UnknownProfileError")
    assert "'pixel-8'" in done.json["reason"]
    done = command("build", "-m", tmp_path / "none", "-d", "pixel-8", "-o", tmp_path / "b", "--json")
    assert (done.status, done.json["error"]) == (2, "SourceError")


def test_weights_that_are_not_there_are_a_failure_in_words(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrelay.reference import pipeline

    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "pipeline.py"))  # a package installed without weights
    done = command("build", "-d", "pixel-8", "-o", tmp_path / "b", "--json")
    assert (done.status, done.json["ok"]) == (1, False)
    assert "latentrelay.reference.train" in done.json["reason"]


def test_a_relative_path_that_is_not_there_never_asks_a_hub(command: Run, tmp_path: Path) -> None:
    for words in ("build", "serve"):
        rest = ("-d", "pixel-8", "-o", tmp_path / "b") if words == "build" else ()
        done = command(words, "-m", "./none-of-these", *rest, "--json")
        assert done.status == 2
        assert "no such model" in done.json["reason"]
