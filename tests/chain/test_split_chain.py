"""The whole chain on a tiny pipeline: export, a server on a loopback socket, the client, the session.

Wherever the run is cut, the end is the uninterrupted run's; and what does not belong together is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import Bundle, CloudClient, Handoff, HandoffRequest, Session, generate
from latentrelay.runtime.errors import (
    CloudRefusedError,
    CloudUnavailableError,
    HandoffFormatError,
    HandoffMismatchError,
)

PROMPT, NEGATIVE, SEED, GUIDANCE = "a red cat on the thing", "blurred", 20261123, 5.0
STEPS = 25
# The bar is 50 dB. A tiny random model hardly heeds its prompt (guidance 5.0 against 5.1 is 59 dB here), so the tests
# ask for what rounding alone leaves; a wrong prompt, guidance, memory or noise is far below it.
EQUAL_DB = 90.0
SPLITS = (0, 1, 2, 7, 12, 18, STEPS - 1, STEPS)
DDIM_STEPS = 6


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with Session(Bundle.open(tiny_bundle), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def cloud(tiny_cloud: str) -> Iterator[CloudClient]:
    with CloudClient(tiny_cloud, timeout_s=30) as client:
        yield client


@pytest.fixture(scope="module")
def whole(uninterrupted: Any, tiny_pipeline: Any) -> Any:
    """diffusers' latents of the same prompt, seed and guidance."""
    return uninterrupted.final_latents(
        tiny_pipeline, "dpmsolver++", PROMPT, NEGATIVE, seed=SEED, guidance=GUIDANCE, num_steps=STEPS
    )


def ask(cloud: CloudClient, session: Session, split: int, dtype: str = "float32", **changes: Any) -> Handoff:
    request = HandoffRequest.for_bundle(
        session.manifest, PROMPT, split=split, negative_prompt=NEGATIVE, seed=SEED, guidance=GUIDANCE, dtype=dtype
    )
    return cloud.handoff(dataclasses.replace(request, **changes))


def finish(session: Session, handoff: Handoff) -> Any:
    return generate(session, PROMPT, negative_prompt=NEGATIVE, handoff=handoff)


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_run_ends_where_the_uninterrupted_one_does(
    split: int, session: Session, cloud: CloudClient, whole: Any, uninterrupted: Any
) -> None:
    found = {}
    for dtype in ("float32", "float16"):
        result = finish(session, ask(cloud, session, split, dtype))
        assert result.steps == {"cloud": split, "device": STEPS - split}
        assert result.path_taken == ("device" if split == 0 else "cloud" if split == STEPS else "hybrid")
        found[dtype] = uninterrupted.snr_db(whole, result.latents)
    assert found["float32"] >= EQUAL_DB
    assert 40.0 < found["float16"] < found["float32"], found


def test_the_device_alone_ends_there_too(session: Session, whole: Any, uninterrupted: Any) -> None:
    result = generate(session, PROMPT, negative_prompt=NEGATIVE, seed=SEED, guidance=GUIDANCE)
    assert (result.path_taken, result.handoff_bytes) == ("device", 0)
    assert uninterrupted.snr_db(whole, result.latents) >= EQUAL_DB


def test_another_seed_ends_elsewhere(session: Session, whole: Any, uninterrupted: Any) -> None:
    result = generate(session, PROMPT, negative_prompt=NEGATIVE, seed=SEED + 1, guidance=GUIDANCE)
    assert uninterrupted.snr_db(whole, result.latents) < 20.0


def test_ddim_has_no_memory_and_splits_alike(
    tiny: Any,
    uninterrupted: Any,
    serve_cloud: Callable[..., AbstractContextManager[str]],
    tmp_path: Path,
) -> None:
    from latentrelay.export import export

    pipeline = tiny.make_pipeline(tmp_path / "work", sampler="ddim", prediction_type="v_prediction")
    built = export(pipeline, "pixel-8", tmp_path / "bundle", num_steps=DDIM_STEPS)
    expected = uninterrupted.final_latents(
        pipeline, "ddim", PROMPT, NEGATIVE, seed=SEED, guidance=GUIDANCE, num_steps=DDIM_STEPS
    )
    with serve_cloud(pipeline) as url, CloudClient(url) as cloud, Session(Bundle.open(built.bundle)) as session:
        for split in range(DDIM_STEPS + 1):
            handoff = ask(cloud, session, split)
            assert handoff.x0_prev is None
            assert uninterrupted.snr_db(expected, finish(session, handoff).latents) >= EQUAL_DB, f"split {split}"


def test_generate_asks_the_cloud_itself(session: Session, tiny_cloud: str, whole: Any, uninterrupted: Any) -> None:
    result = generate(
        session,
        PROMPT,
        negative_prompt=NEGATIVE,
        seed=SEED,
        guidance=GUIDANCE,
        cloud=tiny_cloud,
        split=10,
        wire_dtype="float32",
    )
    assert (result.path_taken, result.steps) == ("hybrid", {"cloud": 10, "device": 15})
    assert result.handoff_bytes > 2 * 4 * 4 * 8 * 8  # latents and x0_prev, float32
    assert uninterrupted.snr_db(whole, result.latents) >= EQUAL_DB


def test_a_cloud_that_is_gone_is_said_and_made_up_for(
    session: Session, dead_url: str, whole: Any, uninterrupted: Any
) -> None:
    arguments: dict[str, Any] = {"negative_prompt": NEGATIVE, "seed": SEED, "guidance": GUIDANCE, "split": 10}
    result = generate(session, PROMPT, cloud=dead_url, **arguments)
    assert (result.path_taken, result.steps) == ("device-fallback", {"cloud": 0, "device": STEPS})
    assert result.fallback_reason is not None
    assert dead_url in result.fallback_reason
    assert uninterrupted.snr_db(whole, result.latents) >= EQUAL_DB
    with pytest.raises(CloudUnavailableError, match="cannot be reached") as caught:
        generate(session, PROMPT, cloud=dead_url, fallback=False, **arguments)
    assert caught.value.exit_status == 1


def test_a_cloud_with_another_model_refuses_and_its_handoff_is_refused(
    session: Session, tiny: Any, serve_cloud: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    other = tiny.make_pipeline(tmp_path, seed=1)
    with serve_cloud(other, name="other") as url, CloudClient(url) as client:
        with pytest.raises(CloudRefusedError) as refused:
            generate(session, PROMPT, cloud=client, split=5)  # a refusal is not a cloud that is gone: no fallback
        stranger = ask(client, session, 5, model_digest=None)
    assert (refused.value.status, refused.value.problem["field"], refused.value.exit_status) == (409, "model_digest", 3)
    with pytest.raises(HandoffMismatchError) as mismatch:
        finish(session, stranger)
    assert (mismatch.value.field, mismatch.value.exit_status) == ("model_digest", 3)
    assert mismatch.value.expected == session.manifest.source.digest


def test_a_handoff_of_another_scheduler_is_refused(session: Session, cloud: CloudClient) -> None:
    with pytest.raises(CloudRefusedError) as refused:
        ask(cloud, session, 5, sampler="ddim")
    assert (refused.value.status, refused.value.problem["field"]) == (409, "scheduler_digest")
    for changes, field in (
        ({"sampler": "ddim", "scheduler_digest": None}, "scheduler_class"),
        ({"num_steps": STEPS - 5}, "num_steps"),
    ):
        with pytest.raises(HandoffMismatchError) as mismatch:
            finish(session, ask(cloud, session, 5, **changes))
        assert (mismatch.value.field, mismatch.value.exit_status) == (field, 3)
    good = ask(cloud, session, 5)
    altered = dataclasses.replace(good.meta, scheduler_digest="sha256:" + "0" * 64)
    with pytest.raises(HandoffMismatchError) as mismatch:
        finish(session, dataclasses.replace(good, meta=altered))
    assert mismatch.value.field == "scheduler_digest"


def test_a_truncated_and_a_nan_handoff_are_refused_each_in_its_words(session: Session, cloud: CloudClient) -> None:
    data = ask(cloud, session, 5).to_bytes()
    for length in (0, 7, 100, len(data) - 1):
        with pytest.raises(HandoffFormatError, match=r"truncated|malformed") as truncated:
            Handoff.from_bytes(data[:length])
        assert truncated.value.exit_status == 3
    poisoned = data[:-4] + np.array(np.nan, "<f4").tobytes()
    with pytest.raises(HandoffFormatError, match="not finite: 1 NaN") as nan:
        Handoff.from_bytes(poisoned)
    assert nan.value.exit_status == 3
