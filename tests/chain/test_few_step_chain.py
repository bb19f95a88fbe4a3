"""Few-step runs on a tiny pipeline: one branch and fresh noise at every step, cut anywhere, against diffusers' own run.

What does not belong together (another model in the cloud, another guidance, the wrong sampler) is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from latentrelay.runtime import Bundle, CloudClient, Handoff, HandoffRequest, Session, generate
from latentrelay.runtime.errors import CloudRefusedError, HandoffMismatchError, RequestError

PROMPT, SEED, STEPS = "a red cat on the thing", 20261124, 4
EQUAL_DB = 90.0


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def pipeline(request: pytest.FixtureRequest, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("few-step")
    return tiny.make_pipeline(work, sampler="lcm", prediction_type=request.param, seed=3)


@pytest.fixture(scope="module")
def session(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    from latentrelay.export import export

    built = export(pipeline, "pixel-8", tmp_path_factory.mktemp("bundle") / "bundle", num_steps=STEPS)
    with Session(Bundle.open(built.bundle), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def cloud(pipeline: Any, serve_cloud: Callable[..., AbstractContextManager[str]]) -> Iterator[CloudClient]:
    with serve_cloud(pipeline) as url, CloudClient(url, timeout_s=30) as client:
        yield client


@pytest.fixture(scope="module")
def whole(pipeline: Any) -> Any:
    """diffusers' latents of the same prompt and seed, guidance off."""
    parts: dict[str, Any] = {**pipeline.components, "scheduler": LCMScheduler.from_config(pipeline.scheduler.config)}
    alone = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    alone.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    run = alone(PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, generator=generator, output_type="latent")
    return run.images.numpy()


def ask(cloud: CloudClient, session: Session, split: int, dtype: str = "float32", **changes: Any) -> Handoff:
    request = HandoffRequest.for_bundle(session.manifest, PROMPT, split=split, seed=SEED, dtype=dtype)
    return cloud.handoff(dataclasses.replace(request, **changes))


def test_a_few_step_run_may_be_cut_anywhere(
    session: Session, cloud: CloudClient, whole: Any, uninterrupted: Any
) -> None:
    for split in range(STEPS + 1):
        handoff = ask(cloud, session, split)
        result = generate(session, PROMPT, handoff=handoff)
        assert handoff.x0_prev is None
        assert result.steps == {"cloud": split, "device": STEPS - split}
        assert uninterrupted.snr_db(whole, result.latents) >= EQUAL_DB, f"split {split}"
    alone = generate(session, PROMPT, seed=SEED)
    assert (alone.path_taken, alone.guidance) == ("device", 1.0)
    assert uninterrupted.snr_db(whole, alone.latents) >= EQUAL_DB


def test_another_seed_draws_other_noise_at_every_step(session: Session, cloud: CloudClient, whole: Any) -> None:
    """The same latents with another seed's later noise end elsewhere: the noise of the steps is really used."""
    handoff = ask(cloud, session, 2)
    other = dataclasses.replace(handoff, meta=dataclasses.replace(handoff.meta, seed=SEED + 1))
    result = generate(session, PROMPT, handoff=other)
    error = float(np.mean((result.latents - whole) ** 2) / np.mean(whole**2))
    assert error > 1e-3


def test_the_bundle_says_one_branch_and_declares_noise(session: Session) -> None:
    manifest = session.manifest
    assert (manifest.guidance.branches, manifest.guidance.default) == (1, 1.0)
    assert (manifest.schedule.sampler, manifest.schedule.scheduler_class) == ("lcm", "LCMScheduler")
    assert manifest.schedule.timesteps == (999, 759, 499, 259)
    inputs = {port.name: port.shape for port in manifest.components["step_full"].inputs}
    assert set(inputs) == {"latents", "step", "prompt_embeds", "noise"}
    assert inputs["prompt_embeds"][0] == 1
    assert inputs["noise"] == inputs["latents"]
    assert session.encode(PROMPT).shape[0] == 1
    report = session.selftest()
    assert report.ok, report.snr_db


def test_guidance_and_negative_prompts_are_refused_where_they_cannot_be_followed(
    session: Session, cloud: CloudClient
) -> None:
    with pytest.raises(RequestError, match="in its network"):
        generate(session, PROMPT, guidance=4.0)
    with pytest.raises(RequestError, match="negative prompt"):
        generate(session, PROMPT, negative_prompt="blurred")
    for changes, field in (({"guidance": 4.0}, "guidance"), ({"negative_prompt": "blurred"}, "negative_prompt")):
        with pytest.raises(CloudRefusedError) as refused:
            ask(cloud, session, 2, **changes)
        assert (refused.value.status, refused.value.problem["field"]) == (422, field)
    with pytest.raises(CloudRefusedError) as refused:
        ask(cloud, session, 2, num_steps=60)
    assert (refused.value.status, refused.value.problem["field"]) == (422, "num_steps")
    latents = session.initial_latents(SEED)
    with pytest.raises(RequestError, match="seed of the run"):
        session.run_steps(latents, None, 0, session.encode(PROMPT), 1.0)


def test_a_cloud_without_the_distilled_teacher_is_refused(
    session: Session,
    cloud: CloudClient,
    tiny: Any,
    serve_cloud: Callable[..., AbstractContextManager[str]],
    tmp_path: Path,
) -> None:
    plain = tiny.make_pipeline(tmp_path / "plain", prediction_type=session.manifest.prediction_type)
    with serve_cloud(plain, name="plain") as url, CloudClient(url) as client:
        with pytest.raises(CloudRefusedError) as refused:
            generate(session, PROMPT, cloud=client, split=2)
        assert (refused.value.status, refused.value.problem["field"]) == (409, "model_digest")
        with pytest.raises(CloudRefusedError) as refused:
            ask(client, session, 2, model_digest=None)
        assert (refused.value.status, refused.value.problem["field"]) == (409, "sampler")
        stranger = ask(client, session, 2, model_digest=None, scheduler_digest=None, sampler=None)
    with pytest.raises(HandoffMismatchError) as mismatch:
        generate(session, PROMPT, handoff=stranger)
    assert (mismatch.value.field, mismatch.value.exit_status) == ("model_digest", 3)


def test_a_students_bundle_goes_on_where_the_distilled_teacher_stopped(
    tiny: Any, serve_cloud: Callable[..., AbstractContextManager[str]], uninterrupted: Any, tmp_path: Path
) -> None:
    """Another U-Net on the device, under the teacher's digest: steps 0 .. k-1 by one network, the rest by the other."""
    from latentrelay.export import export, load_source
    from latentrelay.runtime.digest import weights_digest
    from latentrelay.tools.evaluate_few_step import Networks, hybrid_latents

    teacher = tiny.make_pipeline(tmp_path / "teacher", sampler="lcm", prediction_type="v_prediction", seed=3)
    student = tiny.make_unet(widths=(8, 12), heads=1)
    source = load_source(teacher)
    built = export(source, "pixel-8", tmp_path / "bundle", num_steps=STEPS, student=student)
    manifest = Bundle.open(built.bundle).manifest
    own = weights_digest((name, value.numpy()) for name, value in student.state_dict().items())
    assert manifest.source.digest == source.digest
    parameters = sum(value.numel() for value in student.parameters())
    assert manifest.additional_metadata["student"] == {"name": "student", "digest": own, "parameters": parameters}
    assert source.pipeline.unet is teacher.unet
    networks = Networks(teacher, student)
    with (
        serve_cloud(teacher) as url,
        CloudClient(url) as client,
        Session(Bundle.open(built.bundle), threads=1) as session,
    ):
        for split in range(STEPS + 1):
            found = generate(
                session, PROMPT, seed=SEED, cloud=client, split=split, wire_dtype="float32", fallback=False
            )
            wanted = hybrid_latents(networks, [PROMPT], [SEED], STEPS, split)
            assert uninterrupted.snr_db(wanted.numpy(), found.latents) >= EQUAL_DB, f"split {split}"


def test_export_wants_a_source_that_was_distilled(tiny: Any, pipeline: Any, tmp_path: Path) -> None:
    from latentrelay.export import export

    plain = tiny.make_pipeline(tmp_path / "plain")
    with pytest.raises(RequestError, match="distilled to latent consistency") as caught:
        export(plain, "pixel-8", tmp_path / "out", sampler="lcm", num_steps=4)
    assert caught.value.exit_status == 2
    with pytest.raises(RequestError, match="guidance is in the network"):
        export(pipeline, "pixel-8", tmp_path / "out", sampler="dpmsolver++")
    assert not (tmp_path / "out").exists()


def test_export_takes_the_users_word_for_it(tiny: Any, tmp_path: Path) -> None:
    from latentrelay.export import export

    plain = tiny.make_pipeline(tmp_path / "plain")
    built = export(plain, "pixel-8", tmp_path / "asked", sampler="lcm", num_steps=2, few_step=True)
    assert isinstance(plain.scheduler, DPMSolverMultistepScheduler)
    assert Bundle.open(built.bundle).manifest.guidance.branches == 1
