"""Sources: what loads, what is refused and by which name, and that a refusal or a failure leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from latentrelay.compress.errors import UnsupportedSchedulerError
from latentrelay.export import export, load_source
from latentrelay.export.errors import OutputExistsError, ParityError, SourceError, UnsupportedSourceError
from latentrelay.runtime.errors import RequestError


@pytest.fixture(scope="module")
def folder(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("source")
    return Path(tiny.save_pipeline(tiny.make_pipeline(work / "made"), work / "pipeline"))


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def test_a_folder_loads_in_float32_with_the_digest_of_its_weights(tiny: Any, folder: Path, tmp_path: Path) -> None:
    from_folder = load_source(str(folder))
    from_memory = load_source(tiny.make_pipeline(tmp_path))
    assert from_folder.digest == from_memory.digest
    assert from_folder.digest.startswith("sha256:")
    assert {p.dtype for p in from_folder.pipeline.unet.parameters()} == {torch.float32}
    assert load_source(tiny.make_pipeline(tmp_path, seed=1)).digest != from_folder.digest


def test_half_precision_weights_load_as_float32(tiny: Any, tmp_path: Path) -> None:
    half = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "made"), tmp_path / "half", half=True)
    source = load_source(str(half))
    for part in ("unet", "vae", "text_encoder"):
        assert {p.dtype for p in getattr(source.pipeline, part).parameters()} == {torch.float32}


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"_class_name": "StableDiffusionXLPipeline"}, "SDXL"),
        ({"_class_name": "StableDiffusionInpaintPipeline"}, "inpainting"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae"),
        ({"vae": [None, None]}, "vae"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet"),
    ],
)
def test_an_unsupported_index_is_named_before_weights_are_read(
    folder: Path, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    copy = copy_of(folder, tmp_path)
    edit_index(copy, **changes)
    with pytest.raises(UnsupportedSourceError) as caught:
        load_source(str(copy))
    assert part in caught.value.part
    assert caught.value.exit_status == 3


@pytest.mark.parametrize(
    ("unet", "part"),
    [
        ({"in_channels": 9}, "inpainting"),
        ({"out_channels": 8}, "output channels"),
        ({"num_class_embeds": 3}, "class embeddings"),
        ({"class_embed_type": "timestep"}, "class embeddings"),
        ({"time_cond_proj_dim": 8}, "LCM"),
        ({"cross_attention_dim": 24}, "cross-attention width"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 8,
            },
            "SDXL",
        ),
    ],
)
def test_an_unsupported_unet_is_named(tiny: Any, tmp_path: Path, unet: dict[str, Any], part: str) -> None:
    pipeline = tiny.make_pipeline(tmp_path)
    pipeline.unet = tiny.make_unet(**unet)
    with pytest.raises(UnsupportedSourceError, match=part):
        load_source(pipeline)


def test_pickles_and_missing_things_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    weights = next((copy / "unet").glob("*.safetensors"))
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(SourceError, match="unet has no safetensors weights"):
        load_source(str(copy))
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(SourceError, match="safetensors"):
        load_source(str(tmp_path / "model.ckpt"))
    with pytest.raises(SourceError, match="not found"):
        load_source(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"model_index\.json"):
        load_source(str(tmp_path / "empty"))


def test_an_output_that_is_not_a_bundle_is_never_touched(tiny_pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match="not a bundle"):
        export(tiny_pipeline, "pixel-8", tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def test_a_bundle_is_replaced_only_when_asked(tiny_pipeline: Any, tiny_bundle: Path) -> None:
    with pytest.raises(OutputExistsError, match="already"):
        export(tiny_pipeline, "pixel-8", tiny_bundle)


def test_a_failed_export_leaves_nothing_behind(
    tiny_pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrelay.export import bundle_job

    def fail(*_: Any) -> None:
        raise ParityError("unet", 12.0, 60.0)

    monkeypatch.setattr(bundle_job.BundleJob, "_unet", fail)
    with pytest.raises(ParityError, match="unet"):
        export(tiny_pipeline, "pixel-8", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_sizes_steps_and_samplers_are_checked_first(tiny: Any, tiny_pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSourceError, match="height"):
        export(tiny_pipeline, "pixel-8", tmp_path / "b", height=17)
    with pytest.raises(UnsupportedSourceError, match="number of steps"):
        export(tiny_pipeline, "pixel-8", tmp_path / "b", num_steps=0)
    other = tiny.make_pipeline(tmp_path / "made", scheduler_overrides={"prediction_type": "sample"})
    with pytest.raises(UnsupportedSchedulerError, match="prediction_type"):
        export(other, "pixel-8", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_pipeline_given_keeps_its_scheduler(tiny_export: Any, tiny_pipeline: Any) -> None:
    assert isinstance(tiny_pipeline.unet, UNet2DConditionModel)
    assert tiny_export.bundle.is_dir()
    assert tiny_pipeline.scheduler.config.algorithm_type == "dpmsolver++"


def test_local_paths_stay_out_of_the_bundle(folder: Path) -> None:
    assert load_source(str(folder)).model == "pipeline"
    assert load_source(str(folder), name="mine").model == "mine"


def test_guidance_below_one_is_refused(tiny_pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="guidance"):
        export(tiny_pipeline, "pixel-8", tmp_path / "b", guidance=0.5)
