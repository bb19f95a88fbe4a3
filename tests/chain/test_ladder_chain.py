"""The degrade ladder with the real service: a cloud that is there, one that goes, and one that has no time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from latentrelay.runtime import Bundle, CloudClient, DeviceState, Session, generate

PROMPT = "a red cat"


def codes(result: Any) -> list[tuple[str, str]]:
    return [(each.what, each.why) for each in result.degraded]


def test_a_cloud_that_goes_is_survived_and_said(
    tiny_pipeline: Any, tiny_bundle: Path, serve_cloud: Callable[..., AbstractContextManager[str]]
) -> None:
    with Session(Bundle.open(tiny_bundle)) as session:
        alone = generate(session, PROMPT, seed=5)
        with serve_cloud(tiny_pipeline) as url, CloudClient(url) as client:
            told: list[Any] = []
            both = generate(session, PROMPT, seed=5, cloud=client, wire_dtype="float32", on_progress=told.append)
            assert (both.path_taken, codes(both), both.attempts) == ("hybrid", [], 1)
            assert (told[-1].state, told[-1].step) == ("done", both.steps["cloud"])
            np.testing.assert_allclose(both.latents, alone.latents, atol=1e-3 * float(np.abs(alone.latents).max()))
        with CloudClient(url) as client:
            gone, again = (
                generate(session, PROMPT, seed=5, cloud=client, device_state=lambda: DeviceState("serious"))
                for _ in range(2)
            )
    np.testing.assert_array_equal(gone.latents, alone.latents)
    np.testing.assert_array_equal(again.latents, alone.latents)
    nothing_more = ("nothing-more-to-predict", "device-hot")  # this bundle predicts no step
    assert codes(gone) == [("all-steps-on-device", "cloud-unreachable"), nothing_more]
    assert codes(again) == [("all-steps-on-device", "cloud-failed-recently"), nothing_more]
    assert (gone.path_taken, again.path_taken) == ("device-fallback", "device-fallback")


def test_a_cloud_without_time_is_survived_and_said(tiny_bundle: Path, tiny_cloud: str) -> None:
    """A millisecond is not enough for 20 steps; a smaller split or none is."""
    with Session(Bundle.open(tiny_bundle)) as session, CloudClient(tiny_cloud) as client:
        generate(session, PROMPT, seed=5, cloud=client, split=2)  # so that the cloud has measured a step
        result = generate(session, PROMPT, seed=6, cloud=client, split=24, cloud_deadline_s=0.02)
        alone = generate(session, PROMPT, seed=6)
    ((what, why),) = codes(result)
    assert what in ("split-lowered", "all-steps-on-device")
    assert why.startswith("cloud-")
    assert (what == "split-lowered") == (result.path_taken == "hybrid")
    scale = float(np.abs(alone.latents).max())
    np.testing.assert_allclose(result.latents, alone.latents, atol=2e-2 * scale)  # float16 on the wire
