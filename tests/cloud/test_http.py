"""The service over a real socket: bytes, digests, refusals by status and field, and awake while it works."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime.handoff import MEDIA_TYPE, Handoff

SECRET = "a secret cat nobody may read about"
START = Callable[..., CloudServer]


def body(**changes: Any) -> dict[str, Any]:
    fields = {"prompt": "the red cat", "seed": 3, "height": 16, "width": 16, "num_steps": 4, "split": 2}
    return {**fields, **changes}


def post(client: httpx.Client, **changes: Any) -> httpx.Response:
    return client.post("/v1/handoffs", json=body(**changes))


def problem(response: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    """The error document, after checking that it is one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert {"type", "title", "detail"} <= set(document)
    assert document.get("field") == field
    return document


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def metric(client: httpx.Client, line: str) -> float:
    """The value of one sample, 0 where it is not there yet."""
    rows = [row.rpartition(" ") for row in client.get("/metrics").text.splitlines() if not row.startswith("#")]
    return sum(float(value) for name, _, value in rows if name == line)


@pytest.mark.parametrize("split", range(5))
def test_every_split_is_served(client: httpx.Client, engine: Engine, split: int) -> None:
    response = post(client, split=split)
    assert response.status_code == 200
    handoff = Handoff.from_bytes(response.content)
    assert (handoff.meta.next_step, handoff.meta.num_steps) == (split, 4)
    assert handoff.latents.dtype == np.float16
    assert handoff.meta.guidance == 7.5
    assert handoff.meta.model_digest == engine.digest


def test_headers_and_digests(client: httpx.Client) -> None:
    response = post(client)
    digest = hashlib.sha256(response.content)
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["etag"] == f'"{digest.hexdigest()}"'
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert response.headers["preference-applied"] == "wait"
    assert float(response.headers["latentrelay-cloud-ms"]) >= 0
    assert Handoff.from_bytes(response.content).digest() == digest.hexdigest()


def test_the_same_request_gives_identical_bytes(client: httpx.Client) -> None:
    first, second = post(client), post(client)
    assert first.content == second.content
    assert first.headers["etag"] == second.headers["etag"]
    assert post(client, seed=4).content != first.content


def test_half_and_single_precision(client: httpx.Client) -> None:
    half, single = (Handoff.from_bytes(post(client, dtype=each).content) for each in ("float16", "float32"))
    np.testing.assert_array_equal(half.latents, single.latents.astype(np.float16))
    assert half.x0_prev is not None
    assert single.latents.dtype == np.float32


def test_capabilities_are_what_a_request_may_pin(client: httpx.Client, engine: Engine) -> None:
    served = client.get("/v1/capabilities").json()
    assert served["wire_versions"] == ["1.1", "1.0"]
    assert served["model"] == {
        "name": "tiny",
        "family": "sd1",
        "digest": engine.digest,
        "prediction_type": "epsilon",
    }
    assert (served["default_height"], served["default_width"]) == (16, 16)
    for name, sampler in served["samplers"].items():
        pinned = post(
            client,
            sampler=name,
            scheduler_digest=sampler["scheduler_digest"],
            model_digest=served["model"]["digest"],
        )
        assert Handoff.from_bytes(pinned.content).meta.scheduler_class == sampler["scheduler_class"]


def test_health_says_ok(client: httpx.Client) -> None:
    response = client.get("/healthz")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("field", ["model_digest", "scheduler_digest"])
def test_another_digest_is_a_conflict(client: httpx.Client, field: str) -> None:
    other = "sha256:" + "0" * 64
    document = problem(post(client, **{field: other}), 409, field)
    assert document["got"] == other
    assert document["expected"].startswith("sha256:")


def test_another_sampler_is_a_conflict(client: httpx.Client) -> None:
    document = problem(post(client, sampler="euler"), 409, "sampler")
    assert (document["got"], document["expected"]) == ("euler", "dpmsolver++, ddim")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"promt": "a cat"}, "promt"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": True}, "seed"),
        ({"guidance": -1}, "guidance"),
        ({"guidance": 0.999}, "guidance"),
        ({"guidance": 1e9}, "guidance"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 10**6}, "num_steps"),
        ({"split": 5}, "split"),
        ({"split": -1}, "split"),
        ({"height": 17}, "height"),
        ({"width": 10**6}, "width"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model_digest": "sha256:zz"}, "model_digest"),
        ({"negative_prompt": None}, "negative_prompt"),
        ({"prompt": "x" * 4001}, "prompt"),
    ],
)
def test_fields_out_of_range_are_named(client: httpx.Client, changes: dict[str, Any], field: str) -> None:
    problem(post(client, **changes), 422, field)


def test_unknown_keys_are_all_named_with_those_allowed(client: httpx.Client) -> None:
    document = problem(post(client, promt="x", steps=3), 422, "promt")
    assert "promt, steps" in document["detail"]
    assert "num_steps" in document["expected"]


def test_a_missing_field_is_named(client: httpx.Client) -> None:
    fields = {key: value for key, value in body().items() if key != "seed"}
    document = problem(client.post("/v1/handoffs", json=fields), 422, "seed")
    assert document["detail"] == "seed is missing."


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_guidance_must_be_finite(client: httpx.Client, number: str) -> None:
    text = json.dumps(body(guidance=1.25)).replace("1.25", number)
    response = client.post("/v1/handoffs", content=text, headers={"Content-Type": "application/json"})
    problem(response, 422, "guidance")


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'])
def test_what_is_not_json_is_malformed(client: httpx.Client, text: bytes) -> None:
    response = client.post("/v1/handoffs", content=text, headers={"Content-Type": "application/json"})
    problem(response, 400)


@pytest.mark.parametrize("text", [b"[]", b"null", b'"x"', b"[" * 5000])
def test_what_is_not_an_object_is_refused(client: httpx.Client, text: bytes) -> None:
    response = client.post("/v1/handoffs", content=text, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_prompts_are_not_repeated(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    wrong: list[dict[str, Any]] = [
        {"prompt": SECRET * 200},
        {"negative_prompt": [SECRET]},
        {"prompt": {"text": SECRET}},
        {"prompt": SECRET, "seed": -1},
        {"prompt": SECRET, "model_digest": "sha256:" + "0" * 64},
    ]
    with caplog.at_level(logging.DEBUG):
        for changes in wrong:
            assert "secret" not in post(client, **changes).text
        fields = {"prompt": SECRET}
        assert "secret" not in client.post("/v1/handoffs", json=fields).text
        good = post(client, prompt=SECRET, negative_prompt=SECRET)
    assert good.status_code == 200
    assert b"secret" not in good.content
    assert "secret" not in caplog.text


def test_prefer_chooses_between_the_blob_and_a_job(client: httpx.Client) -> None:
    for value in ("", "respond-async", "waiting", "wait-not", "wait=x"):
        assert client.post("/v1/handoffs", json=body(), headers={"Prefer": value}).status_code == 202, value
    for value in ("wait", "wait=10", "respond-async, wait=30", "Wait; x=1", 'wait="20"'):
        assert client.post("/v1/handoffs", json=body(), headers={"Prefer": value}).status_code == 200, value


def test_only_json_is_read(client: httpx.Client) -> None:
    response = client.post("/v1/handoffs", content=b"x", headers={"Content-Type": "text/plain"})
    problem(response, 415, "content-type")


def test_a_large_body_is_not_read(client: httpx.Client) -> None:
    declared = post(client, prompt="x" * 70_000)
    assert problem(declared, 413, "body")["expected"] == 65536

    def chunks() -> Any:
        for _ in range(20):
            yield b" " * 4096

    response = client.post("/v1/handoffs", content=chunks(), headers={"Content-Type": "application/json"})
    problem(response, 413, "body")
    assert post(client).status_code == 200


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    problem(client.get("/v1/nothing"), 404)
    response = client.get("/v1/handoffs")
    problem(response, 405)
    assert "POST" in response.headers["allow"]


def test_the_token_is_required(engine: Engine, start: START) -> None:
    server = start(engine, token="correct horse")
    with httpx.Client(base_url=server.url, headers={"Prefer": "wait"}) as client:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic correct horse"}):
            response = client.post("/v1/handoffs", json=body(), headers=given)
            document = problem(response, 401, "authorization")
            assert response.headers["www-authenticate"] == "Bearer"
            assert "horse" not in json.dumps(document)
        assert client.get("/v1/capabilities").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == 200
        right = {"Authorization": "Bearer correct horse"}
        assert client.post("/v1/handoffs", json=body(), headers=right).status_code == 200


@pytest.fixture
def held(tiny: Any, tmp_path: Path, start: START) -> Iterator[tuple[Engine, threading.Event, threading.Event]]:
    """An engine for one job at a time whose network waits: (engine, it has begun, let it go on)."""
    pipeline = tiny.make_pipeline(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "latentrelay-batcher":  # others look at shapes only
            begun.set()
            go_on.wait(60)

    pipeline.unet.register_forward_pre_hook(wait)
    yield Engine(pipeline, name="tiny", limits=Limits(queue=1)), begun, go_on
    go_on.set()


HELD = tuple[Engine, threading.Event, threading.Event]


def test_health_answers_while_a_job_runs(held: HELD, start: START) -> None:
    engine, begun, go_on = held
    server = start(engine)
    answers: list[httpx.Response] = []
    with httpx.Client(base_url=server.url, headers={"Prefer": "wait"}, timeout=60) as client:
        job = threading.Thread(target=lambda: answers.append(post(client)))
        job.start()
        assert begun.wait(30)
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/capabilities").json()["queue"] == {"waiting": 0, "running": 1, "limit": 1}
        assert metric(client, "latentrelay_in_flight") == 1
        full = post(client, seed=99)
        assert problem(full, 503)["type"] == "urn:latentrelay:problem:queue-full"
        assert int(full.headers["retry-after"]) >= 1
        assert metric(client, 'latentrelay_refusals_total{reason="queue-full"}') == 1
        assert not answers
        go_on.set()
        job.join(60)
        assert answers[0].status_code == 200
        until(lambda: metric(client, "latentrelay_in_flight") == 0, 30)


@pytest.mark.parametrize("key", [None, "a key"])
def test_a_client_that_leaves_ends_its_run_unless_it_can_come_back(held: HELD, start: START, key: str | None) -> None:
    engine, begun, go_on = held
    server = start(engine)
    headers = {"Idempotency-Key": key} if key else {}
    with httpx.Client(base_url=server.url, headers={"Prefer": "wait"}, timeout=60) as client:
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            request = client.build_request("POST", "/v1/handoffs", json=body(), headers=headers)
            lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
            leaving.sendall(f"POST /v1/handoffs HTTP/1.1\r\n{lines}\r\n".encode() + request.content)
            assert begun.wait(30)
        ended = 'latentrelay_requests_total{route="/v1/handoffs",status="499"}'
        until(lambda: metric(client, ended) == 1, 30)
        go_on.set()
        until(lambda: metric(client, "latentrelay_in_flight") == 0, 30)
        assert metric(client, 'latentrelay_jobs_total{state="cancelled"}') == (0 if key else 1)
        if key:
            again = client.post("/v1/handoffs", json=body(), headers=headers)
            assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")


def test_metrics_count(engine: Engine, start: START) -> None:
    server = start(engine)
    with httpx.Client(base_url=server.url, headers={"Prefer": "wait"}) as client:
        sizes = [len(post(client, split=split).content) for split in (0, 1, 3)]
        post(client, seed=-1)
        until(lambda: metric(client, "latentrelay_steps_total") == 4)  # a call is counted after its runs are answered
        assert metric(client, "latentrelay_handoff_bytes_total") == sum(sizes)
        until(lambda: metric(client, "latentrelay_handoff_seconds_count") == 3)  # counted once the end is written
        assert metric(client, 'latentrelay_requests_total{route="/v1/handoffs",status="200"}') == 3
        assert metric(client, 'latentrelay_requests_total{route="/v1/handoffs",status="422"}') == 1
        assert "cat" not in client.get("/metrics").text


def test_many_clients_at_once_get_what_one_gets(client: httpx.Client) -> None:
    alone = {seed: post(client, seed=seed).content for seed in range(4)}
    together: dict[int, bytes] = {}

    def ask(seed: int) -> None:
        together[seed] = post(client, seed=seed).content

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert together == alone


def test_a_broken_model_is_a_500_that_names_the_step(tiny: Any, tmp_path: Path, start: START) -> None:
    pipeline = tiny.make_pipeline(tmp_path)
    pipeline.unet.conv_out.bias.data[0] = float("nan")
    server = start(Engine(pipeline, name="broken"))
    with httpx.Client(base_url=server.url, headers={"Prefer": "wait"}) as client:
        assert "step 0" in problem(post(client), 500)["detail"]
        assert post(client, split=0).status_code == 200
