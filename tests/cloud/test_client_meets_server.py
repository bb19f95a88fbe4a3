"""The runtime's client against the running service: what crosses, and which error each refusal becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.requests import RunRequest
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime.cloud_client import CloudClient
from latentrelay.runtime.errors import CloudRefusedError, CloudUnavailableError
from latentrelay.runtime.handoff_request import HandoffRequest

TOKEN = "correct horse"


def request(**changes: Any) -> HandoffRequest:
    fields: dict[str, Any] = {"prompt": "a cat", "height": 16, "width": 16, "num_steps": 4, "split": 2}
    return HandoffRequest(**{**fields, **changes})


@pytest.fixture
def server(engine: Engine, start: Callable[..., CloudServer]) -> CloudServer:
    return start(engine, token=TOKEN)


@pytest.fixture
def cloud(server: CloudServer) -> Iterator[CloudClient]:
    with CloudClient(server.url, token=TOKEN) as client:
        yield client


def test_a_handoff_crosses_whole(cloud: CloudClient, engine: Engine) -> None:
    served = cloud.capabilities()
    wanted = request(
        dtype="float32",
        sampler="dpmsolver++",
        model_digest=served["model"]["digest"],
        scheduler_digest=served["samplers"]["dpmsolver++"]["scheduler_digest"],
    )
    handoff = cloud.handoff(wanted)
    here = engine.run(RunRequest(**wanted.to_dict()))
    assert handoff == here
    np.testing.assert_array_equal(handoff.latents, here.latents)


@pytest.mark.parametrize(
    ("changes", "status", "field"),
    [
        ({"model_digest": "sha256:" + "0" * 64}, 409, "model_digest"),
        ({"sampler": "euler"}, 409, "sampler"),
        ({"num_steps": 10**6}, 422, "num_steps"),
        ({"prompt": "x" * 100_000}, 413, "body"),
    ],
)
def test_refusals_keep_status_and_field(cloud: CloudClient, changes: dict[str, Any], status: int, field: str) -> None:
    with pytest.raises(CloudRefusedError) as caught:
        cloud.handoff(request(**changes))
    assert (caught.value.status, caught.value.problem["field"]) == (status, field)


def test_a_wrong_token_is_a_refusal(server: CloudServer) -> None:
    with CloudClient(server.url, token="wrong") as client, pytest.raises(CloudRefusedError) as caught:
        client.handoff(request())
    assert caught.value.status == 401


def test_a_service_that_ended_is_unavailable(engine: Engine, start: Callable[..., CloudServer]) -> None:
    server = CloudServer(start(engine).app, port=0)
    server.stop()
    server.run()
    with CloudClient(server.url) as client, pytest.raises(CloudUnavailableError):
        client.handoff(request())
