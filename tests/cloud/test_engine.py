"""The engine against diffusers: the same latents after any number of steps, whole state handed over, errors by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from latentrelay.cloud.cancel import Cancellation
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import ModelLoadError, ModelRefusedError, ProblemError, RunCancelled
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.requests import RunRequest
from latentrelay.runtime.errors import NonFiniteError
from latentrelay.runtime.handoff import Handoff, prompt_digest
from latentrelay.runtime.noise import initial_noise

STEPS = 6


def request(**changes: Any) -> RunRequest:
    fields: dict[str, Any] = {
        "prompt": "the red cat",
        "negative_prompt": "on",
        "seed": 11,
        "guidance": 5.0,
        "height": 16,
        "width": 16,
        "num_steps": STEPS,
        "split": 3,
        "dtype": "float32",
    }
    return RunRequest(**{**fields, **changes})


def diffusers_latents(pipeline: Any, scheduler: Any, wanted: RunRequest) -> list[np.ndarray[Any, Any]]:
    """The latents after each step of a whole diffusers run, as its step callback sees them."""
    seen: list[np.ndarray[Any, Any]] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].numpy().copy())
        return {}

    before, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        pipeline(
            wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            guidance_scale=wanted.guidance,
            num_inference_steps=wanted.num_steps,
            height=wanted.height,
            width=wanted.width,
            generator=torch.Generator("cpu").manual_seed(wanted.seed),
            output_type="latent",
            callback_on_step_end=keep,
        )
    finally:
        pipeline.scheduler = before
    return seen


@pytest.mark.parametrize("num_steps", [STEPS, 16])
@pytest.mark.parametrize(("sampler", "kind"), [("ddim", DDIMScheduler), ("dpmsolver++", DPMSolverMultistepScheduler)])
def test_every_split_equals_diffusers(tiny: Any, tmp_path: Path, sampler: str, kind: Any, num_steps: int) -> None:
    pipeline = tiny.make_pipeline(tmp_path, sampler=sampler)
    engine = Engine(pipeline, name="tiny")
    assert engine.default_sampler == sampler
    wanted = request(num_steps=num_steps, split=num_steps)
    reference = diffusers_latents(pipeline, kind.from_config(pipeline.scheduler.config), wanted)
    for split in range(1, num_steps + 1, 1 if num_steps == STEPS else 5):
        handoff = engine.run(request(num_steps=num_steps, split=split))
        np.testing.assert_array_equal(handoff.latents, reference[split - 1])
        assert handoff.meta.next_step == split
        assert (handoff.x0_prev is not None) == (sampler == "dpmsolver++" and split < num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_rest_of_the_run_from_a_handoff_equals_the_whole_run(
    tiny: Any, tmp_path: Path, prediction_type: str
) -> None:
    pipeline = tiny.make_pipeline(tmp_path, prediction_type=prediction_type)
    engine = Engine(pipeline, name="tiny")
    whole = engine.run(request(split=STEPS)).latents
    embeds = torch.cat([engine.encode(["on"]), engine.encode(["the red cat"])])
    for split in range(1, STEPS):
        handoff = engine.run(request(split=split))
        assert handoff.meta.prediction_type == prediction_type
        assert handoff.x0_prev is not None
        scheduler = engine.schedules.plain("dpmsolver++")
        scheduler.set_timesteps(STEPS)
        scheduler.model_outputs = [None, torch.from_numpy(np.array(handoff.x0_prev))]
        scheduler.lower_order_nums = min(split, 2)
        latents = torch.from_numpy(np.array(handoff.latents))
        with torch.inference_mode():
            for timestep in scheduler.timesteps[split:]:
                both = pipeline.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=embeds).sample
                uncond, cond = both.chunk(2)
                latents = scheduler.step(uncond + 5.0 * (cond - uncond), timestep, latents).prev_sample
        np.testing.assert_array_equal(latents.numpy(), whole)


def test_no_step_is_the_seeds_noise(engine: Engine) -> None:
    handoff = engine.run(request(split=0))
    torch_noise = torch.randn((1, 4, 8, 8), generator=torch.Generator("cpu").manual_seed(11)).numpy()
    np.testing.assert_array_equal(handoff.latents, torch_noise)
    np.testing.assert_allclose(handoff.latents, initial_noise(11, (1, 4, 8, 8)), atol=1e-6)
    assert handoff.x0_prev is None
    assert handoff.meta.init_noise_sigma == 1.0


def test_metadata_says_what_was_run(engine: Engine) -> None:
    meta = engine.run(request()).meta
    served = engine.capabilities()
    scheduler = engine.schedules.plain("dpmsolver++")
    scheduler.set_timesteps(STEPS)
    assert meta.timesteps == tuple(scheduler.timesteps.tolist())
    assert meta.model_digest == served["model"]["digest"] == engine.digest
    assert meta.scheduler_digest == served["samplers"]["dpmsolver++"]["scheduler_digest"]
    assert meta.scheduler_class == "DPMSolverMultistepScheduler"
    assert (meta.num_steps, meta.next_step, meta.seed, meta.guidance) == (STEPS, 3, 11, 5.0)
    assert (meta.height, meta.width, meta.scaling_factor, meta.shift_factor) == (16, 16, 0.18215, 0.0)
    assert meta.prompt_digest == prompt_digest(meta.prompt_salt, "the red cat", "on")
    assert b"cat" not in engine.run(request()).to_bytes()


def test_equal_requests_give_equal_bytes_and_the_blob_parses(engine: Engine) -> None:
    first, second = engine.run(request()).to_bytes(), engine.run(request()).to_bytes()
    assert first == second
    assert Handoff.from_bytes(first).to_bytes() == first
    for change in ({"seed": 12}, {"prompt": "the red"}, {"negative_prompt": ""}, {"guidance": 5.5}, {"split": 4}):
        assert engine.run(request(**change)).latents.tobytes() != engine.run(request()).latents.tobytes()


def test_half_precision_is_the_rounded_single(engine: Engine) -> None:
    single, half = engine.run(request()), engine.run(request(dtype="float16"))
    assert half.latents.dtype == np.float16
    np.testing.assert_array_equal(half.latents, single.latents.astype(np.float16))
    np.testing.assert_array_equal(half.x0_prev, np.asarray(single.x0_prev).astype(np.float16))


def test_other_sizes_and_samplers(engine: Engine) -> None:
    handoff = engine.run(request(height=8, width=24, sampler="ddim"))
    assert handoff.latents.shape == (1, 4, 4, 12)
    assert handoff.x0_prev is None
    assert handoff.meta.scheduler_class == "DDIMScheduler"


def test_pndm_is_served_with_dpmsolver(tiny: Any, tmp_path: Path) -> None:
    engine = Engine(tiny.make_pipeline(tmp_path, sampler="pndm"), name="tiny")
    assert engine.default_sampler == "dpmsolver++"
    assert engine.run(request()).meta.scheduler_class == "DPMSolverMultistepScheduler"


def test_a_folder_has_the_digest_of_what_was_saved(tiny: Any, tmp_path: Path, engine: Engine) -> None:
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "folder")
    loaded = Engine.load(str(folder), channels_last=False)
    assert loaded.digest == engine.digest
    assert loaded.run(request()).to_bytes() == engine.run(request()).to_bytes()
    changed = tiny.make_pipeline(tmp_path / "other")
    with torch.no_grad():
        changed.vae.decoder.conv_out.bias[0] += 1e-3
    assert Engine(changed, name="changed").digest != engine.digest


def test_family(tiny: Any, tmp_path: Path, engine: Engine) -> None:
    assert engine.family == "sd1"
    wide = tiny.make_pipeline(tmp_path, text_dim=1024)
    assert Engine(wide, name="two").family == "sd2"


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"model_digest": "sha256:" + "0" * 64}, 409, "model_digest"),
        ({"scheduler_digest": "sha256:" + "0" * 64}, 409, "scheduler_digest"),
        ({"sampler": "euler"}, 409, "sampler"),
        ({"height": 17}, 422, "height"),
        ({"width": 2048}, 422, "width"),
        ({"num_steps": 500}, 422, "num_steps"),
        ({"split": 7}, 422, "split"),
        ({"guidance": 99.0}, 422, "guidance"),
        ({"prompt": "x" * 5000}, 422, "prompt"),
    ],
)
def test_what_cannot_be_run_is_refused_by_field(
    engine: Engine, change: dict[str, Any], status: int, field: str
) -> None:
    with pytest.raises(ProblemError) as caught:
        engine.run(request(**change))
    assert (caught.value.status, caught.value.field) == (status, field)


def test_matching_digests_are_accepted(engine: Engine) -> None:
    served = engine.capabilities()["samplers"]["ddim"]["scheduler_digest"]
    exact = request(sampler="ddim", scheduler_digest=served, model_digest=engine.digest, split=1)
    assert engine.run(exact).meta.scheduler_digest == served


def test_cancelling_between_steps(engine: Engine) -> None:
    parent = Cancellation()
    steps: list[int] = []

    def stop_after_two(step: int, num_steps: int) -> None:
        steps.append(step)
        if step == 1:
            parent.cancel()

    with pytest.raises(RunCancelled, match="before step 2"):
        engine.run(request(split=STEPS), cancellation=Cancellation(parent), on_step=stop_after_two)
    assert steps == [0, 1]
    assert engine.run(request(split=1)).meta.next_step == 1  # the engine is free again


def test_not_finite_names_the_step(tiny: Any, tmp_path: Path) -> None:
    pipeline = tiny.make_pipeline(tmp_path)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="U-Net, step 0") as caught:
        Engine(pipeline, name="broken").run(request())
    assert caught.value.step == 0


def test_a_long_prompt_is_cut_and_not_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        long = engine.run(request(prompt="secret " * 60))
    assert np.isfinite(long.latents).all()
    assert "secret" not in caplog.text


def test_other_pipelines_are_refused_by_name(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ModelRefusedError, match="got StableDiffusionXLPipeline, expected StableDiffusionPipeline"):
        Engine.load(str(tmp_path))
    pipeline = tiny.make_pipeline(tmp_path / "nine", in_channels=9)
    with pytest.raises(ModelRefusedError, match=r"unet\.in_channels.*got 9, expected 4"):
        Engine(pipeline, name="inpainting")
    other = tiny.make_pipeline(tmp_path / "text", text_dim=16)
    other.unet = tiny.make_unet(text_dim=24)
    with pytest.raises(ModelRefusedError, match=r"cross_attention_dim.*got 24, expected 16"):
        Engine(other, name="text")
    sample = tiny.make_pipeline(tmp_path / "sample", prediction_type="sample")
    with pytest.raises(ModelRefusedError, match=r"prediction_type.*got sample"):
        Engine(sample, name="sample")


def test_unreadable_models_say_what_is_missing(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no pipeline was found"):
        Engine.load(str(tmp_path))
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        Engine.load(str(broken))
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"not weights")
    with pytest.raises(ModelRefusedError, match=r"expected \.safetensors"):
        Engine.load(str(pickled))
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "folder")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        Engine.load(str(folder))
    assert ModelRefusedError.exit_status == 3


def test_limits_are_the_engines(tiny: Any, tmp_path: Path) -> None:
    engine = Engine(tiny.make_pipeline(tmp_path), name="tiny", limits=Limits(max_steps=5))
    assert engine.capabilities()["max_steps"] == 5
    with pytest.raises(ProblemError, match="num_steps is 6, at most 5"):
        engine.run(request())
