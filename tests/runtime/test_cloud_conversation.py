"""Both clients against a scripted cloud on real sockets: keys, events, resumption, repetition, cancelling, limits."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from latentrelay.runtime import AsyncCloudClient, CloudClient, Handoff, HandoffRequest
from latentrelay.runtime.cloud_answers import Answer
from latentrelay.runtime.cloud_blob import BlobParts
from latentrelay.runtime.cloud_retries import RetryPolicy
from latentrelay.runtime.errors import (
    CloudProtocolError,
    CloudRefusedError,
    CloudUnavailableError,
    HandoffFormatError,
    RequestError,
    RunCancelledError,
)

REQUEST = HandoffRequest("a red circle", height=16, width=16, num_steps=4, split=2, seed=7, guidance=2.0)
QUICK = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05, wait_s=2.0, silence_s=20.0)
LONG_S = 60.0

Ask = Callable[..., Any]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """`ask(url, request, client options in `options`, **handoff options)`: one handoff by one kind of client; returns
    (handoff, attempts)."""

    def by_sync(url: str, wanted: HandoffRequest = REQUEST, options: dict[str, Any] | None = None, **more: Any) -> Any:
        with CloudClient(url, **{"retries": QUICK, "timeout_s": LONG_S, **(options or {})}) as client:
            try:
                return client.handoff(wanted, **more), client.attempts
            finally:
                by_sync.attempts = client.attempts  # type: ignore[attr-defined]

    async def talk(url: str, wanted: HandoffRequest, options: dict[str, Any], more: dict[str, Any]) -> Any:
        async with AsyncCloudClient(url, **{"retries": QUICK, "timeout_s": LONG_S, **options}) as client:
            return await client.handoff(wanted, **more), client.attempts

    def by_async(url: str, wanted: HandoffRequest = REQUEST, options: dict[str, Any] | None = None, **more: Any) -> Any:
        return asyncio.run(talk(url, wanted, options or {}, more))

    return by_sync if request.param == "sync" else by_async


@pytest.fixture
def made(kit: SimpleNamespace) -> Callable[[dict[str, Any]], Handoff]:
    """The handoff of a request document, written in the newest version that it reads."""

    def run(document: dict[str, Any]) -> Handoff:
        fields = {name: document[name] for name in ("seed", "guidance", "dtype")}
        return kit.make_handoff(
            **fields, next_step=document["split"], schema_version=document.get("wire_versions", ["1.0"])[0]
        )

    return run


def test_one_post_with_a_key_a_trace_and_a_deadline(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made)
    handoff, attempts = ask(cloud.url)
    assert (handoff.meta.next_step, handoff.meta.schema_version, attempts) == (2, "1.1", 1)
    first, *rest = [each for each in cloud.requests if each.method == "POST"]
    assert len(cloud.asked("GET", "/v1/capabilities")) == 1
    assert rest == []
    assert 1 <= len(first.headers["idempotency-key"]) <= 128
    assert len(first.headers["traceparent"].split("-")) == 4
    body = json.loads(first.body)
    assert body["wire_versions"] == ["1.1", "1.0"]
    assert 0 < body["deadline_ms"] <= LONG_S * 1000 - 900
    assert "accept_splits" not in body
    assert "schema_version" not in body


def test_what_the_caller_sets_is_what_is_sent(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made)
    trace = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    wanted = HandoffRequest(
        **{
            **vars(REQUEST),
            "wire_versions": ("1.0",),
            "accept_splits": (1,),
            "deadline_ms": 1234,
            "deterministic": True,
        }
    )
    handoff, _ = ask(cloud.url, wanted, idempotency_key="mine", traceparent=trace)
    (post,) = cloud.asked("POST")
    body = json.loads(post.body)
    assert (post.headers["idempotency-key"], post.headers["traceparent"]) == ("mine", trace)
    assert (body["wire_versions"], body["accept_splits"], body["deadline_ms"]) == (["1.0"], [1], 1234)
    assert body["deterministic"] is True
    assert handoff.meta.schema_version == "1.0"


def test_progress_and_previews_come_by_events(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.02, preview=True)
    told: list[Any] = []
    shown: list[Any] = []
    handoff, _ = ask(cloud.url, on_progress=told.append, on_preview=shown.append)
    assert handoff.meta.next_step == 2
    assert json.loads(cloud.asked("POST")[0].body)["preview"] is True
    assert cloud.asked("POST")[0].headers["prefer"] == "respond-async"
    assert [each.step for each in told] == sorted(each.step for each in told)
    assert (told[-1].state, told[-1].step, told[-1].split, told[-1].num_steps) == ("done", 2, 2, 4)
    assert shown
    assert {(each.where, each.num_steps, each.rgb.shape) for each in shown} == {("cloud", 4, (1, 2, 3))}
    assert shown[0].rgb.tobytes() == b"abcdef"


def test_a_cloud_without_events_is_asked_for_its_status(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, capabilities={"features": ["idempotency"]})
    told: list[Any] = []
    ask(cloud.url, on_progress=told.append)
    assert told[-1].state == "done"
    body = json.loads(cloud.asked("POST")[0].body)
    assert not {"deadline_ms", "preview", "accept_splits"} & set(body)


@pytest.mark.parametrize("at", [0, 1, 10, 200, 700])
def test_a_transfer_that_is_cut_goes_on_where_it_was(scripted: Any, made: Any, ask: Ask, at: int) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Cut(at, body=True)])
    handoff, attempts = ask(cloud.url)
    (job,) = cloud.jobs.values()
    assert handoff.to_bytes() == job.blob
    assert attempts == 2
    assert cloud.made == 1
    ranges = [each.headers.get("range") for each in cloud.asked("GET", job.id)]
    assert ranges == [f"bytes={at}-" if at else None]
    if at:
        etag = f'"{Handoff.from_bytes(job.blob).digest()}"'
        assert cloud.asked("GET", job.id)[0].headers["if-range"] == etag


def test_a_connection_that_is_reset_at_every_tenth_byte(scripted: Any, made: Any, ask: Ask) -> None:
    """One answer after the other is cut ten bytes later than the one before; then ten bytes of body at a time."""
    cuts = [scripted.Cut(at) for at in range(0, 400, 10)] + [scripted.Cut(10, body=True) for _ in range(20)]
    cloud = scripted.ScriptedCloud(made, faults=cuts)
    handoff, attempts = ask(cloud.url)
    (job,) = cloud.jobs.values()
    assert handoff.to_bytes() == job.blob
    assert cloud.made == 1
    assert attempts == 61
    assert len({each.headers["idempotency-key"] for each in cloud.asked("POST")}) == 1
    assert len({each.body for each in cloud.asked("POST")}) == 1


def test_a_blob_that_changed_between_its_parts_comes_whole(scripted: Any, made: Any, ask: Ask, kit: Any) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Cut(50, body=True)])
    other = kit.make_handoff(seed=7, dtype="float16", schema_version="1.1", memory=False).to_bytes()

    def replace(request: Any) -> bool:
        if "range" in request.headers:
            next(iter(cloud.jobs.values())).blob = other
        return request.path != "/v1/capabilities"

    cloud.fault_for = replace
    handoff, _ = ask(cloud.url)
    assert handoff.to_bytes() == other


@pytest.mark.parametrize("after", [0, 30, 200])
def test_events_that_are_cut_are_asked_for_again(scripted: Any, made: Any, ask: Ask, after: int) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.05, faults=[None, scripted.Cut(after), scripted.Cut(after)])
    told: list[Any] = []
    handoff, attempts = ask(cloud.url, on_progress=told.append)
    assert handoff.meta.next_step == 2
    assert (attempts, told[-1].state, cloud.made) == (3, "done", 1)


def test_a_store_that_was_wiped_gets_the_job_again(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.02)
    wiped = threading.Event()

    def wipe(request: Any) -> bool:
        if "event-stream" in request.headers.get("accept", "") and not wiped.is_set():
            wiped.set()
            cloud.jobs.clear()
        return False

    cloud.faults, cloud.fault_for = [None], wipe
    handoff, attempts = ask(cloud.url, on_progress=lambda progress: None)
    assert handoff.meta.next_step == 2
    assert (cloud.made, attempts) == (2, 2)
    assert len({each.headers["idempotency-key"] for each in cloud.asked("POST")}) == 1


def test_load_is_waited_for_as_long_as_the_cloud_says(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Refuse(503, "queue-full", 1)])
    started = time.monotonic()
    _, attempts = ask(cloud.url)
    assert time.monotonic() - started >= 1
    assert attempts == 2


@pytest.mark.parametrize(
    ("status", "kind", "retry_after", "told"),
    [
        (503, "queue-full", 500, "queue-full"),
        (429, "rate-limited", 3600, "rate-limited"),
        (503, "deadline-unreachable", 1, "deadline-unreachable"),
        (429, "quota-used", 1, "quota-used"),
        (500, "run-failed", None, "run-failed"),
        (503, "run-interrupted", None, "run-interrupted"),
        (504, "deadline-passed", None, "deadline-passed"),
        (410, "cancelled", None, "job-cancelled"),
    ],
)
def test_what_no_repetition_mends_ends_at_once(
    scripted: Any, made: Any, ask: Ask, status: int, kind: str, retry_after: int | None, told: str
) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Refuse(status, kind, retry_after)])
    with pytest.raises(CloudUnavailableError, match=kind) as caught:
        ask(cloud.url)
    assert (caught.value.kind, caught.value.retry_after_s) == (told, retry_after)
    assert len(cloud.asked("POST")) == 1


@pytest.mark.parametrize("kind", ["memory", "queue-full", "run-interrupted"])
@pytest.mark.parametrize("stage", ["post", "get"])
def test_the_end_of_a_job_is_no_refusal_for_load(scripted: Any, made: Any, ask: Ask, kind: str, stage: str) -> None:
    """Both are 503 with Retry-After; a job that ended so stays so."""
    ended = scripted.Refuse(503, kind, 1, job=True)
    cloud = scripted.ScriptedCloud(made, faults=[ended] if stage == "post" else [None, ended])
    more = {} if stage == "post" else {"cancel": lambda: False}
    with pytest.raises(CloudUnavailableError, match=kind):
        ask(cloud.url, **more)
    assert len(cloud.asked("POST")) + len(cloud.asked("GET", "/v1/handoffs")) == (1 if stage == "post" else 2)


def test_a_job_that_failed_says_why(scripted: Any, made: Any, ask: Ask) -> None:
    problem = {"type": "urn:latentrelay:problem:run-failed", "status": 500, "detail": "NaN"}
    for more in ({}, {"on_progress": lambda progress: None}):
        cloud = scripted.ScriptedCloud(made, fail=problem)
        with pytest.raises(CloudUnavailableError, match="NaN") as caught:
            ask(cloud.url, **more)
        assert caught.value.kind == "run-failed"
        assert cloud.made == 1


def test_a_refusal_ends_it_and_forgets_the_capabilities(scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Refuse(409, "handoff-mismatch"), None])
    with CloudClient(cloud.url, retries=QUICK) as client:
        with pytest.raises(CloudRefusedError, match="409"):
            client.handoff(REQUEST)
        client.handoff(REQUEST)
        client.handoff(REQUEST)
    assert len(cloud.asked("GET", "/v1/capabilities")) == 2


CAPABILITIES: list[tuple[dict[str, Any], dict[str, Any], str, int]] = [
    ({"model": {"digest": "sha256:" + "0" * 64}}, {}, "model_digest", 409),
    ({"samplers": {"ddim": {}}}, {}, "sampler", 409),
    ({"samplers": {"dpmsolver++": {"scheduler_digest": "sha256:" + "0" * 64}}}, {}, "scheduler_digest", 409),
    ({"limits": {"side": 15}}, {}, "height", 422),
    ({"size_multiple": 32}, {}, "height", 422),
    ({"max_steps": 3}, {}, "num_steps", 422),
    ({"limits": {"guidance": 1}}, {}, "guidance", 422),
    ({"limits": {"prompt_chars": 5}}, {}, "prompt", 422),
    ({"limits": {"body_bytes": 100}}, {}, "body", 413),
    ({"dtypes": ["float32"]}, {}, "dtype", 422),
    ({"wire_versions": ["2.0"]}, {}, "wire_versions", 406),
    ({}, {"wire_versions": ("1.7",)}, "wire_versions", 406),
    ({"samplers": {"dpmsolver++": {"branches": 1}}}, {}, "guidance", 422),
    ({"samplers": {"dpmsolver++": {"branches": 1}}}, {"guidance": 1.0, "negative_prompt": "x"}, "negative_prompt", 422),
]


@pytest.mark.parametrize(("served", "changes", "field", "status"), CAPABILITIES, ids=[row[2] for row in CAPABILITIES])
def test_what_does_not_fit_is_refused_before_a_job_is_paid_for(
    scripted: Any, made: Any, ask: Ask, served: dict[str, Any], changes: dict[str, Any], field: str, status: int
) -> None:
    facts = {"sampler": "dpmsolver++", "model_digest": "sha256:" + "a" * 64, "scheduler_digest": "sha256:" + "b" * 64}
    wanted = HandoffRequest(**{**vars(REQUEST), **facts, **changes})
    cloud = scripted.ScriptedCloud(made, capabilities=served)
    with pytest.raises(CloudRefusedError, match=field) as caught:
        ask(cloud.url, wanted)
    assert (caught.value.status, caught.value.problem["field"]) == (status, field)
    assert "a red circle" not in str(caught.value)
    assert cloud.asked("POST") == []


@pytest.mark.parametrize(
    "served",
    [
        {"features": "all"},
        {"features": [1]},
        {"step_ms": "1"},
        {"step_ms": -1},
        {"limits": []},
        {"model": 5},
        {"samplers": [1]},
        {"wire_versions": 1.1},
        {"max_steps": True},
    ],
)
def test_capabilities_of_wrong_types_break_the_protocol(scripted: Any, made: Any, ask: Ask, served: Any) -> None:
    cloud = scripted.ScriptedCloud(made, capabilities=served)
    with pytest.raises(CloudProtocolError, match="wrong type"):
        ask(cloud.url)
    assert cloud.asked("POST") == []


def test_capabilities_are_read_once_a_while(scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made)
    with CloudClient(cloud.url, capabilities_ttl_s=1000) as client:
        for _ in range(3):
            client.handoff(REQUEST)
        assert len(cloud.asked("GET", "/v1/capabilities")) == 1
        assert "features" in client.capabilities()
        assert len(cloud.asked("GET", "/v1/capabilities")) == 2
    assert cloud.open == 1  # one connection for all of it


@pytest.mark.parametrize("stage", ["capabilities", "post", "events", "blob"])
def test_silence_ends_with_the_deadline(scripted: Any, made: Any, ask: Ask, stage: str) -> None:
    faults = {"capabilities": 0, "post": 1, "events": 2, "blob": 3}[stage]
    cloud = scripted.ScriptedCloud(made, faults=[*[None] * faults, scripted.Hang()], fault_for=lambda request: True)
    started = time.monotonic()
    more = {} if stage == "post" else {"on_progress": lambda progress: None}
    with pytest.raises(CloudUnavailableError, match=r"in 1 s") as caught:
        ask(cloud.url, deadline_s=1, **more)
    assert caught.value.kind == "timeout"
    assert 0.9 < time.monotonic() - started < 20
    if stage == "events":
        assert len(cloud.asked("DELETE")) == 1
    if stage == "post":  # its id is asked for first
        assert [each.headers["prefer"] for each in cloud.asked("POST")][1:] == ["respond-async"]
        assert len(cloud.asked("DELETE")) == 1


def test_silence_that_is_too_long_counts_as_cut(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, faults=[None, scripted.Hang()])
    brief = RetryPolicy(first_wait_s=0.01, silence_s=0.3)
    handoff, attempts = ask(cloud.url, options={"retries": brief}, on_progress=lambda progress: None)
    assert (handoff.meta.next_step, attempts, cloud.made) == (2, 2, 1)


def test_a_cloud_that_died_with_a_job_is_not_waited_for_until_the_deadline(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=30)
    stopped: list[float] = []

    def stop(_: Any) -> None:
        stopped.append(time.monotonic())
        cloud.stop()

    patience = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05, unreachable_s=0.5)
    with pytest.raises(CloudUnavailableError, match="cannot be reached") as caught:
        ask(cloud.url, options={"retries": patience}, deadline_s=600, on_progress=stop)
    assert caught.value.kind == "unreachable"
    assert cloud.jobs
    assert time.monotonic() - stopped[0] < 60
    assert RetryPolicy().unreachable_s == 5.0


@pytest.mark.parametrize("told", [True, False])
def test_cancelling_stops_the_cloud(scripted: Any, made: Any, ask: Ask, told: bool) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=30)
    started = time.monotonic()
    begun = threading.Event()

    def cancel() -> bool:
        if cloud.jobs:
            begun.set()
        return begun.is_set()

    more = {"on_progress": lambda progress: None} if told else {}
    with pytest.raises(RunCancelledError):
        ask(cloud.url, cancel=cancel, **more)
    assert time.monotonic() - started < 20
    (job,) = cloud.jobs.values()
    assert job.state == "cancelled"


def test_cancelled_before_it_begins_asks_for_nothing(scripted: Any, made: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(made)
    with pytest.raises(RunCancelledError):
        ask(cloud.url, cancel=lambda: True)
    assert cloud.asked("POST") == []


def test_a_task_that_is_cancelled_stops_the_cloud(scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=30)

    async def run() -> None:
        async with AsyncCloudClient(cloud.url) as client:
            task = asyncio.create_task(client.handoff(REQUEST))
            while not cloud.jobs:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(run())
    (job,) = cloud.jobs.values()
    assert job.state == "cancelled"


@pytest.mark.parametrize("callback", ["on_progress", "on_preview", "cancel"])
def test_a_callback_that_fails_is_the_callers_error(scripted: Any, made: Any, ask: Ask, callback: str) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.05, preview=True)

    def fail(*_: object) -> bool:
        if callback == "cancel" and not cloud.jobs:
            return False
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        ask(cloud.url, **{callback: fail})
    assert len(cloud.asked("DELETE")) == 1


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HOSTILE: list[tuple[str, bytes, str]] = [
    ("an endless line", SSE + b"data: " + b"x" * (2**21), "too long"),
    ("an endless event", SSE + b"data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n" * 2**16, "too long"),
    ("no JSON", SSE + b"data: {\n\n", "not a JSON object"),
    ("a list", SSE + b"data: []\n\n", "not a JSON object"),
    ("an unknown state", SSE + b'data: {"state":"x","step":0,"split":1,"num_steps":2}\n\n', "no known state"),
    ("a step that is none", SSE + b'data: {"state":"running","step":"0","split":1,"num_steps":2}\n\n', "no count"),
    ("a huge step", SSE + b'data: {"state":"running","step":99999999,"split":1,"num_steps":2}\n\n', "no count"),
    ("another type", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nhi", "media type"),
    ("no HTTP", b"220 smtp.example ESMTP\r\n\r\n", "broken HTTP"),
    ("a redirect", b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "302"),
    ("a packed answer", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nhi", "encoded"),
    ("a length of its own", b"HTTP/1.1 404 X\r\nContent-Length: 99999999999\r\n\r\n", "too large"),
]


@pytest.mark.parametrize(("data", "message"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_a_hostile_cloud_gets_nowhere(scripted: Any, made: Any, ask: Ask, data: bytes, message: str) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.05, faults=[None, scripted.Raw(data)])
    with pytest.raises(CloudProtocolError, match=message):
        ask(cloud.url, on_progress=lambda progress: None)


BLOBS: list[tuple[str, bytes]] = [
    ("endless", b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n" + b"x" * 0x10000 + b"\r\n"),
    ("longer than it may be", b"Content-Length: 9000000\r\n\r\n"),
]


@pytest.mark.parametrize(("name", "data"), BLOBS)
def test_a_blob_that_is_too_long_is_not_read(scripted: Any, made: Any, ask: Ask, name: str, data: bytes) -> None:
    from latentrelay.runtime.handoff import HandoffLimits

    head = b'HTTP/1.1 200 OK\r\nContent-Type: application/vnd.latentrelay.handoff\r\nETag: "%s"\r\n' % (b"0" * 64)
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Raw(head + data)])
    with pytest.raises(CloudProtocolError, match="too large"):
        ask(cloud.url, options={"limits": HandoffLimits(max_bytes=60_000)})


def test_a_blob_whose_digest_is_wrong_is_refused(scripted: Any, made: Any, ask: Ask) -> None:
    head = b'HTTP/1.1 200 OK\r\nContent-Type: application/vnd.latentrelay.handoff\r\nETag: "%s"\r\n' % (b"0" * 64)
    cloud = scripted.ScriptedCloud(made, faults=[scripted.Raw(head + b"Content-Length: 4\r\n\r\nblob")])
    with pytest.raises(CloudProtocolError, match="digest"):
        ask(cloud.url)


def test_a_cloud_that_hands_over_rubbish(scripted: Any, ask: Ask) -> None:
    cloud = scripted.ScriptedCloud(lambda document: SimpleNamespace(to_bytes=lambda: b"12345678" * 9))
    with pytest.raises(HandoffFormatError):
        ask(cloud.url)


def test_a_header_that_drips_ends_with_the_deadline(made: Any, ask: Ask) -> None:
    """Every byte comes within any time-out of a read; the head never ends."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not stopped.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(CloudUnavailableError, match=r"in 1 s"):
            ask(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=1)
        assert time.monotonic() - started < 20
    finally:
        stopped.set()
        thread.join()
        listener.close()


def test_nobody_there_is_known_soon(dead_url: str, ask: Ask) -> None:
    started = time.monotonic()
    with pytest.raises(CloudUnavailableError, match="cannot be reached") as caught:
        ask(dead_url)
    assert caught.value.kind == "unreachable"
    assert time.monotonic() - started < 30


def test_many_threads_share_a_client(scripted: Any, made: Any) -> None:
    cloud = scripted.ScriptedCloud(made, step_s=0.01)
    with CloudClient(cloud.url, retries=QUICK) as client:
        seeds: list[int] = []

        def run(seed: int) -> None:
            seeds.append(client.handoff(HandoffRequest(**{**vars(REQUEST), "seed": seed})).meta.seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert sorted(seeds) == list(range(8))
    assert cloud.made == 8


@pytest.mark.parametrize(
    "options",
    [
        {"idempotency_key": ""},
        {"idempotency_key": "x" * 129},
        {"idempotency_key": "a\nb"},
        {"idempotency_key": "ä"},
        {"traceparent": "00-zz-01"},
        {"traceparent": "00-" + "0" * 32 + "-" + "1" * 16 + "-01"},
        {"deadline_s": 0},
        {"deadline_s": float("nan")},
    ],
)
def test_arguments_that_cannot_be(dead_url: str, ask: Ask, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        ask(dead_url, **options)


def test_waits_grow_are_jittered_and_honour_retry_after() -> None:
    policy = RetryPolicy(first_wait_s=0.1, max_wait_s=2.0)
    for failures, ceiling in [(1, 0.1), (2, 0.2), (4, 0.8), (6, 2.0), (1000, 2.0)]:
        waits = [policy.wait(failures) for _ in range(200)]
        assert 0 <= min(waits) < max(waits) <= ceiling
        assert max(waits) > 0.8 * ceiling
        assert len(set(waits)) > 100
        assert all(5 <= policy.wait(failures, 5.0) <= 5 + ceiling / 4 for _ in range(50))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("content-range", "bytes 3-9/10"),  # not where the first part ended
        ("content-range", "bytes 4-8/10"),  # not to the end
        ("content-range", "bytes 4-99/100"),  # more than may come
        ("content-range", "4-9/10"),
        ("etag", '"' + "1" * 64 + '"'),  # of another blob
    ],
)
def test_a_part_that_does_not_continue_is_dropped(name: str, value: str) -> None:
    """Also where its bytes are right by chance: an answer that contradicts itself is not believed."""
    etag = f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    headers = {"content-type": "application/vnd.latentrelay.handoff", "etag": etag}
    parts = BlobParts(max_bytes=50)
    assert parts.take(Answer(200, headers, b"0123", CloudUnavailableError("cut", kind="dropped"))) is None
    assert parts.range_headers() == {"Range": "bytes=4-", "If-Range": headers["etag"]}
    assert parts.take(Answer(206, {**headers, "content-range": "bytes 4-9/10", name: value}, b"456789")) is None
    assert parts.range_headers() == {}
    assert parts.room == 50
