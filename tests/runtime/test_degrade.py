"""The degrade ladder over real sockets: every way a cloud or a device can be short of something ends in a picture, and
the result says how."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import Bundle, CloudClient, DeviceState, Handoff, Session, generate
from latentrelay.runtime.cloud_capabilities import Capabilities
from latentrelay.runtime.cloud_retries import RetryPolicy
from latentrelay.runtime.degrade import FailureMemory, affordable_split, device_part, smaller_splits
from latentrelay.runtime.errors import CloudUnavailableError, HandoffMismatchError, RequestError, RunCancelledError
from latentrelay.runtime.handoff import prompt_digest
from latentrelay.runtime.manifest import StepMask

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = "a red circle"
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05)


@pytest.fixture
def made(bundle_folder: Path, kit: SimpleNamespace) -> Callable[[dict[str, Any]], Handoff]:
    """What the bundle itself makes of the first steps, as a cloud's handoff."""

    def run(asked: dict[str, Any]) -> Handoff:
        with Session(Bundle.open(bundle_folder)) as session:
            embeds = session.encode(asked["prompt"], asked["negative_prompt"])
            start = session.initial_latents(asked["seed"])
            steps = session.run_steps(start, None, 0, embeds, asked["guidance"], asked["seed"])
            *_, last = (event for event, _ in zip(steps, range(asked["split"]), strict=False))
        digest = prompt_digest("00ff", asked["prompt"], asked["negative_prompt"])
        facts = {name: asked[name] for name in ("seed", "guidance", "dtype")}
        meta = kit.make_meta(**facts, next_step=asked["split"], prompt_digest=digest)
        return Handoff(last.latents.astype(asked["dtype"]), last.x0_prev.astype(asked["dtype"]), meta)

    return run


@pytest.fixture
def alone(bundle_folder: Path) -> Any:
    """The picture that the device makes without any cloud."""
    return generate(bundle_folder, PROMPT, seed=7)


def codes(result: Any) -> list[tuple[str, str]]:
    assert all(each.detail.endswith(".") and len(each.detail) > 20 for each in result.degraded)
    return [(each.what, each.why) for each in result.degraded]


def near(result: Any, alone: Any) -> None:
    np.testing.assert_allclose(result.latents, alone.latents, atol=2e-3)


def test_nothing_is_given_up_where_all_goes_well(bundle_folder: Path, scripted: Any, made: Any, alone: Any) -> None:
    cloud = scripted.ScriptedCloud(made)
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=3)
    near(result, alone)
    assert (result.path_taken, result.attempts, codes(result), result.fallback_reason) == ("hybrid", 1, [], None)
    assert json.loads(cloud.asked("POST")[0].body)["accept_splits"] == [2, 1]
    assert (alone.path_taken, alone.attempts, alone.degraded) == ("device", 0, ())


def test_a_device_without_a_network_finishes(bundle_folder: Path, dead_url: str, alone: Any) -> None:
    result = generate(bundle_folder, PROMPT, seed=7, cloud=dead_url, split=2)
    np.testing.assert_array_equal(result.latents, alone.latents)
    assert (result.path_taken, result.steps) == ("device-fallback", {"cloud": 0, "device": 4})
    assert codes(result) == [("all-steps-on-device", "cloud-unreachable")]
    assert "cannot be reached" in (result.fallback_reason or "")
    assert result.degraded[0].detail.startswith(f"All steps ran here: {dead_url} cannot be reached")
    assert "or run all steps" not in result.degraded[0].detail
    assert result.attempts == 3
    assert result.ms["handoff"] > 0


@pytest.mark.parametrize("fault", ["events", "transfer"])
def test_a_network_that_drops_and_comes_back_is_no_loss(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any, fault: str
) -> None:
    faults = {"events": [None, scripted.Cut(60)], "transfer": [None, None, scripted.Cut(100, body=True)]}[fault]
    cloud = scripted.ScriptedCloud(made, step_s=0.02, faults=faults)
    with CloudClient(cloud.url, retries=QUICK) as client:
        told: list[Any] = []
        result = generate(bundle_folder, PROMPT, seed=7, cloud=client, split=2, on_progress=told.append)
    near(result, alone)
    assert (result.path_taken, result.attempts, codes(result), cloud.made) == ("hybrid", 2, [], 1)
    assert told[-1].state == "done"


@pytest.mark.parametrize("stage", ["job", "transfer"])
def test_a_network_that_drops_for_good_is_said(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any, stage: str
) -> None:
    """The cloud goes for good while its job runs, or in the middle of the blob."""
    cloud = scripted.ScriptedCloud(made, step_s=30 if stage == "job" else 0.0)
    stopper = threading.Thread(target=lambda: (begun.wait(), cloud.stop()))
    begun = threading.Event()
    if stage == "transfer":
        cloud.faults = [scripted.Cut(100, body=True), scripted.Hang()]
        cloud.fault_for = lambda request: ("range" in request.headers and begun.set()) or "capab" not in request.path
    else:
        cloud.fault_for = lambda request: bool(request.method == "POST" and begun.set())
    stopper.start()
    with CloudClient(cloud.url, retries=QUICK) as client:
        result = generate(bundle_folder, PROMPT, seed=7, cloud=client, split=2, cloud_deadline_s=2)
    stopper.join()
    np.testing.assert_array_equal(result.latents, alone.latents)
    assert result.path_taken == "device-fallback"
    ((what, why),) = codes(result)
    assert what == "all-steps-on-device"
    assert why in ("cloud-timeout", "cloud-unreachable", "cloud-dropped")
    assert result.attempts > 1


def test_a_cloud_that_does_not_answer_in_time_is_left(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any
) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=60)
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=2, cloud_deadline_s=1)
    np.testing.assert_array_equal(result.latents, alone.latents)
    assert codes(result) == [("all-steps-on-device", "cloud-timeout")]
    (job,) = cloud.jobs.values()
    assert job.state == "cancelled"  # nobody waits for it any more, and nobody pays


@pytest.mark.parametrize("kind", ["queue-full", "memory", "draining"])
def test_a_refusal_for_load_longer_than_the_deadline(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any, kind: str
) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Refuse(503, kind, 100)])
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=2, cloud_deadline_s=30)
    np.testing.assert_array_equal(result.latents, alone.latents)
    assert codes(result) == [("all-steps-on-device", f"cloud-{kind}")]
    assert result.attempts == 1


def test_a_slow_cloud_hands_over_early(bundle_folder: Path, scripted: Any, made: Any, alone: Any) -> None:
    cloud = scripted.ScriptedCloud(made, reach=lambda document: min(document.get("accept_splits", [9])))
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=3)
    near(result, alone)
    assert (result.path_taken, result.steps) == ("hybrid", {"cloud": 1, "device": 3})
    assert codes(result) == [("split-lowered", "cloud-slow")]
    assert "1 steps instead of 3" in result.degraded[0].detail


def test_a_slow_cloud_that_cannot_hand_over_early_is_asked_for_less(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any
) -> None:
    served = {"features": ["deadline"], "step_ms": 4000, "estimate_ms": 9000}
    cloud = scripted.ScriptedCloud(made, capabilities=served)
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=3, cloud_deadline_s=10)
    near(result, alone)
    assert (result.steps["cloud"], codes(result)) == (2, [("split-lowered", "cloud-slow")])
    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=3, cloud_deadline_s=3)
    assert (result.path_taken, codes(result)) == ("device-fallback", [("all-steps-on-device", "cloud-slow")])
    assert len(cloud.asked("POST")) == 1


def test_an_early_handover_that_was_not_offered_is_refused(bundle_folder: Path, scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made, reach=lambda document: 1)
    with pytest.raises(HandoffMismatchError, match="next_step"):
        generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=3, fallback=False)
    assert "accept_splits" not in json.loads(cloud.asked("POST")[0].body)


def test_a_handoff_that_does_not_fit_is_an_error_as_ever(bundle_folder: Path, scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(lambda document: made({**document, "prompt": "a blue square"}))
    with pytest.raises(HandoffMismatchError, match="prompt_digest"):
        generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=2)


def test_a_cloud_that_failed_just_now_is_not_waited_for_again(
    bundle_folder: Path, scripted: Any, made: Any, alone: Any
) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Refuse(500, "run-failed")])
    with Session(Bundle.open(bundle_folder)) as session, CloudClient(cloud.url, retries=QUICK) as client:
        client.memory = FailureMemory(first_s=1000)
        results = [generate(session, PROMPT, seed=7, cloud=client, split=2) for _ in range(3)]
        whys = [codes(each) for each in results]
        assert whys[0] == [("all-steps-on-device", "cloud-run-failed")]
        assert whys[1:] == [[("all-steps-on-device", "cloud-failed-recently")]] * 2
        assert [each.attempts for each in results] == [1, 0, 0]
        assert len(cloud.requests) == 2
        cloud.faults.append(scripted.Refuse(500, "run-failed"))
        with pytest.raises(CloudUnavailableError):  # who wants the cloud or nothing gets what it says
            generate(session, PROMPT, seed=7, cloud=client, split=2, fallback=False)
        client.memory._until = time.monotonic()  # the rest is over
        asked = len(cloud.asked("GET", "/v1/capabilities"))
        back = generate(session, PROMPT, seed=7, cloud=client, split=2)
        assert (back.path_taken, codes(back), client.memory.failures) == ("hybrid", [], 0)
        assert len(cloud.asked("GET", "/v1/capabilities")) == asked + 1  # it is asked whether it is back
    near(back, alone)


def test_a_run_is_cancelled_while_the_cloud_works(bundle_folder: Path, scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=60)
    with pytest.raises(RunCancelledError):
        generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=2, cancel=lambda: bool(cloud.jobs))
    (job,) = cloud.jobs.values()
    assert job.state == "cancelled"


def test_previews_come_from_both_sides(scripted: Any) -> None:
    """The golden bundle knows how to show latents; its cloud here is itself."""
    bundle = Bundle.open(GOLDEN / "bundle-1.4")
    manifest = bundle.manifest

    def run(asked: dict[str, Any]) -> Handoff:
        blob = (GOLDEN / "handoff-1.1.safetensors").read_bytes()
        handoff = Handoff.from_bytes(blob)
        facts = {"prompt_digest": prompt_digest("00ff", PROMPT, ""), "additional_metadata": {}}
        return Handoff(handoff.latents, handoff.x0_prev, type(handoff.meta)(**{**vars(handoff.meta), **facts}))

    cloud = scripted.ScriptedCloud(run, step_s=0.03, preview=True)
    shown: list[Any] = []
    result = generate(bundle, PROMPT, seed=7, cloud=cloud.url, split=2, on_preview=shown.append)
    assert result.path_taken == "hybrid"
    where = [each.where for each in shown]
    assert where == sorted(where)
    assert [(each.step, each.num_steps) for each in shown if each.where == "device"] == [(3, 4), (4, 4)]
    assert manifest.preview is not None
    side = (manifest.latent.height, manifest.latent.width, 3)
    assert all(each.rgb.shape == side for each in shown if each.where == "device")


@pytest.mark.parametrize("thermal", ["serious", "critical"])
def test_a_hot_device_predicts_more(thermal: str) -> None:
    cool = generate(GOLDEN / "bundle-1.4", PROMPT, seed=7, device_state=lambda: DeviceState("fair"))
    hot = generate(GOLDEN / "bundle-1.4", PROMPT, seed=7, device_state=lambda: DeviceState(thermal))
    assert cool.degraded == ()
    assert codes(hot) == [("more-predicted-steps", "device-hot")]
    assert hot.predicted_steps > cool.predicted_steps
    assert thermal in hot.degraded[0].detail


def test_a_hot_device_predicts_although_it_was_told_not_to() -> None:
    state = DeviceState("serious")
    plain = generate(GOLDEN / "bundle-1.4", PROMPT, seed=7, predict=False)
    hot = generate(GOLDEN / "bundle-1.4", PROMPT, seed=7, predict=False, device_state=lambda: state)
    assert (plain.predicted_steps, codes(hot)) == (0, [("more-predicted-steps", "device-hot")])
    assert hot.predicted_steps > 0


def test_a_hot_device_without_anything_to_predict_says_so(bundle_folder: Path, alone: Any, dead_url: str) -> None:
    state = DeviceState("critical")
    result = generate(bundle_folder, PROMPT, seed=7, cloud=dead_url, split=2, device_state=lambda: state)
    np.testing.assert_array_equal(result.latents, alone.latents)
    wanted = [("all-steps-on-device", "cloud-unreachable"), ("nothing-more-to-predict", "device-hot")]
    assert codes(result) == wanted


def test_the_state_is_read_when_the_devices_part_begins(bundle_folder: Path, scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made)
    asked: list[int] = []

    def state() -> DeviceState:
        asked.append(len(cloud.asked("POST")))
        return DeviceState()

    result = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=2, device_state=state)
    assert (asked, result.degraded) == ([1], ())
    whole = generate(bundle_folder, PROMPT, seed=7, cloud=cloud.url, split=4, device_state=state)
    assert (len(asked), whole.path_taken) == (1, "cloud")  # the device has no steps


def test_short_memory_takes_the_hot_mask_but_begins_no_ladders() -> None:
    manifest = Bundle.open(GOLDEN / "bundle-1.4").manifest
    masks = {"normal": StepMask(0, 1, ("full", "predicted", "full")), "hot": StepMask(0, 2, ("full", "predicted") * 2)}
    masks["hot"] = StepMask(0, 2, ("full", "predicted", "predicted"), "hot")

    def mask_at(predict: bool, level: str) -> StepMask | None:
        return masks[level] if predict else None

    low = DeviceState(free_mib=0.0)
    part = device_part(manifest, low, mask_at, predict=True)
    assert (part.predict, part.level) == (True, "hot")
    assert [(each.what, each.why) for each in part.degraded] == [("more-predicted-steps", "device-memory-low")]
    part = device_part(manifest, low, mask_at, predict=False)
    assert (part.predict, part.level) == (False, "normal")
    assert [(each.what, each.why) for each in part.degraded] == [("nothing-more-to-predict", "device-memory-low")]
    assert device_part(manifest, DeviceState(free_mib=10_000), mask_at, predict=True).degraded == ()
    assert device_part(manifest, DeviceState(), mask_at, predict=False) == device_part(
        manifest, DeviceState("fair"), mask_at, predict=False
    )
    with pytest.raises(RequestError, match="thermal"):
        DeviceState("warm")


@pytest.mark.parametrize(
    ("step_ms", "estimate_ms", "deadline_s", "expected"),
    [
        (None, None, 1, 10),
        (100, None, 1.0, 10),
        (100, 1000, 1.0, 10),  # ten steps of work, no waiting
        (100, 1500, 1.0, 5),  # half a second of waiting
        (100, 1900, 1.0, 1),
        (100, 2000, 1.0, None),
        (200, None, 1.0, 5),
        (2000, None, 1.0, None),
        (0, 0, 1.0, 10),
    ],
)
def test_the_split_that_a_cloud_can_afford(step_ms: Any, estimate_ms: Any, deadline_s: float, expected: Any) -> None:
    """Splits 10, 5 and 1 of 20 steps."""
    served = Capabilities(step_ms=step_ms, estimate_ms=estimate_ms)
    if expected is None:
        with pytest.raises(CloudUnavailableError) as caught:
            affordable_split(served, (10, 5, 1), 20, deadline_s)
        assert caught.value.kind == "slow"
    else:
        assert affordable_split(served, (10, 5, 1), 20, deadline_s) == expected


def test_smaller_splits_are_those_with_masks() -> None:
    predicting = Bundle.open(GOLDEN / "bundle-1.4").manifest
    assert smaller_splits(predicting, 4) == (1,)
    assert smaller_splits(predicting, 1) == ()
    plain = Bundle.open(GOLDEN / "bundle-1.0").manifest
    assert smaller_splits(plain, 4) == (3, 2, 1)
    many = smaller_splits(plain, 200)
    assert len(many) <= 64
    assert many == tuple(sorted(set(many), reverse=True))
    assert min(many) < 10


def test_a_short_memory_of_failures() -> None:
    memory = FailureMemory(first_s=10, most_s=25)
    assert memory.rest_s() == 0
    for expected in (10, 20, 25, 25):
        memory.failed()
        assert expected - 5 < memory.rest_s() <= expected
    memory.worked()
    assert (memory.rest_s(), memory.failures) == (0, 0)
    memory.failed(retry_after_s=20)
    assert 15 < memory.rest_s() <= 20
    for _ in range(5000):
        memory.failed(retry_after_s=1e9)
    assert memory.rest_s() <= 25
