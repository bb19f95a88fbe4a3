"""The contract of the wire, checked against any service: a base URL, two tokens, and what its capabilities say.

`service` is a running service, one parameter a kind of server: add an entry to SERVERS (and to the fixture's
parameters) to run every test here against another one. `brief` is one whose results expire within a second.
`handoff_client` is a function that makes a whole handoff, one parameter a client: add it to CLIENTS. A server must be
started with the tokens file it is given, a time to live, and limits that allow LONG_STEPS steps.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

TOKENS = {"alice": "alice-token", "bob": "bob-token", "limited": "limited-token"}
TOKENS_TOML = "".join(
    f'[[token]]\nname = "{name}"\ntoken = "{token}"\n' + ("open_jobs = 1\n" if name == "limited" else "")
    for name, token in TOKENS.items()
)
LONG_STEPS = 900
LONG_S = 60.0  # patience of tests, on a machine with other things to do; never how long something must take
HANDOFF, STATUS, EVENTS = "application/vnd.latentrelay.handoff", "application/json", "text/event-stream"
PROBLEM = "application/problem+json"
STATUS_KEYS = {
    "id", "state", "step", "split", "num_steps", "next_step", "queue_position", "attempts", "etag", "bytes",
    "cloud_ms", "expires_in_s", "problem",
}  # fmt: skip


@dataclass
class Api:
    """A client of one service with what the tests say often. `http` has alice's token."""

    url: str
    http: httpx.Client = field(init=False)
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.http = self.client("alice")
        self.facts = self.http.get("/v1/capabilities").json()

    def client(self, name: str | None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {TOKENS[name]}"} if name else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=LONG_S)

    def body(self, **changes: Any) -> dict[str, Any]:
        """A request that takes a moment."""
        fields: dict[str, Any] = {
            "prompt": "the red cat",
            "seed": 3,
            "height": self.facts["default_height"],
            "width": self.facts["default_width"],
            "num_steps": 4,
            "split": 2,
        }
        return {**fields, **changes}

    def long_body(self, **changes: Any) -> dict[str, Any]:
        """A request that takes many seconds; the test cancels it."""
        side = 4 * self.facts["default_height"]
        return self.body(height=side, width=side, num_steps=LONG_STEPS, split=LONG_STEPS, **changes)

    def post(self, body: dict[str, Any] | None = None, *, http: httpx.Client | None = None, **headers: str) -> Any:
        """POST /v1/handoffs; header names with _ for -."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return (http or self.http).post("/v1/handoffs", json=body if body is not None else self.body(), headers=names)

    def made(self, **changes: Any) -> httpx.Response:
        """The 200 of a POST that waits."""
        response = self.post(self.body(**changes), Prefer="wait=60")
        assert response.status_code == 200, response.text
        return response

    def get(self, job: str, accept: str | None = None, **headers: str) -> httpx.Response:
        """GET the job; header names with _ for -. Without `accept`, anything."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.get(f"/v1/handoffs/{job}", headers={"Accept": accept or "*/*", **names})

    def status(self, job: str) -> dict[str, Any]:
        """The status document, after checking its shape."""
        response = self.get(job, STATUS)
        assert response.status_code == 200, response.text
        return self.checked(response)

    def checked(self, response: httpx.Response) -> dict[str, Any]:
        assert response.headers["content-type"].split(";")[0] == STATUS
        document: dict[str, Any] = response.json()
        assert set(document) >= STATUS_KEYS, STATUS_KEYS - set(document)
        return document

    def ended(self, job: str) -> dict[str, Any]:
        """The status once the job has ended."""
        return self.until(job, lambda status: status["state"] not in ("queued", "running"))

    def until(self, job: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first status that fulfils the condition."""
        deadline = time.monotonic() + LONG_S
        while not condition(status := self.status(job)):
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        return status

    @contextmanager
    def long_job(self, **changes: Any) -> Iterator[str]:
        """The id of a job that runs and goes on; cancelled at the end."""
        response = self.post(self.long_body(**changes))
        assert response.status_code == 202, response.text
        job = response.headers["latentrelay-job"]
        try:
            yield job
        finally:
            self.http.delete(f"/v1/handoffs/{job}")

    def problem(
        self, response: httpx.Response, status: int, kind: str | None = None, field: str | None = None
    ) -> dict[str, Any]:
        """The error document, after checking that it is one, of this kind and about this field."""
        assert response.status_code == status, (response.status_code, response.text)
        assert response.headers["content-type"] == PROBLEM
        document: dict[str, Any] = response.json()
        assert {"type", "title", "status", "detail"} <= set(document)
        assert document["status"] == status
        if kind is not None:
            assert document["type"] == f"urn:latentrelay:problem:{kind}"
        if field is not None:
            assert document["field"] == field
        if status in (429, 503):
            assert int(response.headers["retry-after"]) >= 1
        return document


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of a stream of server-sent events; comments are left out."""
    name, data = "message", ""
    for line in lines:
        if line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data += line.removeprefix("data:").strip()
        elif not line and data:
            yield name, json.loads(data)
            name, data = "message", ""


Start = Callable[..., AbstractContextManager[str]]


@contextmanager
def plain(tiny: Any, folder: Path, *, ttl_s: float) -> Iterator[str]:
    """The plain ASGI server in a thread, with its jobs in a folder."""
    from latentrelay.cloud.app import create_app
    from latentrelay.cloud.engine import Engine
    from latentrelay.cloud.folder_store import FolderStore
    from latentrelay.cloud.limits import Limits
    from latentrelay.cloud.serve import CloudServer
    from latentrelay.cloud.service_options import ServiceOptions
    from latentrelay.cloud.tokens import Tokens

    (folder / "tokens.toml").write_text(TOKENS_TOML, encoding="utf-8")
    engine = Engine(
        tiny.make_pipeline(folder / "pipeline"), name="tiny", limits=Limits(max_steps=LONG_STEPS, deadline_s=3600)
    )
    app = create_app(
        engine,
        tokens=Tokens.from_file(folder / "tokens.toml"),
        store=FolderStore(folder / "jobs"),
        service=ServiceOptions(ttl_s=ttl_s),
    )
    server = CloudServer(app)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    try:
        if not ready.wait(LONG_S):
            raise TimeoutError("the server did not start")
        yield server.url
    finally:
        server.stop()
        thread.join(LONG_S)
        if thread.is_alive():
            raise TimeoutError("the server did not stop")


RAY_SCRIPT = """
import sys
from functools import partial
from latentrelay.cloud.limits import Limits
from latentrelay.cloud.ray_app import run_ray
from latentrelay.cloud.ray_replica import load_engine
from latentrelay.cloud.replicas import Replicas
from latentrelay.cloud.service_options import ServiceOptions
folder, steps, ttl_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
run_ray(
    partial(load_engine, folder + "/model", name="tiny", limits=Limits(max_steps=steps, deadline_s=3600)),
    replicas=Replicas(2, 2), port=0, port_file=folder + "/port", store=folder + "/jobs",
    tokens_file=folder + "/tokens.toml", service=ServiceOptions(ttl_s=ttl_s),
)
"""


@contextmanager
def ray_serve(tiny: Any, folder: Path, *, ttl_s: float) -> Iterator[str]:
    """Two replicas on Ray Serve, in processes of their own."""
    (folder / "tokens.toml").write_text(TOKENS_TOML, encoding="utf-8")
    tiny.save_pipeline(tiny.make_pipeline(folder / "pipeline"), folder / "model")
    arguments = [sys.executable, "-c", RAY_SCRIPT, str(folder), str(LONG_STEPS), str(ttl_s)]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    try:
        while not (folder / "port").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{(folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{int((folder / 'port').read_text())}"
    finally:
        process.terminate()
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


SERVERS: dict[str, Start] = {"plain": plain, "ray": ray_serve}
HAS_RAY = importlib.util.find_spec("ray") is not None
KINDS = [
    pytest.param("plain"),
    pytest.param("ray", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed")]),
]


@pytest.fixture(scope="session")
def _started(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, float], Api]]:
    """`_started(kind, ttl_s)`: each kind with each time to live is started once."""
    running: dict[tuple[str, float], Api] = {}
    with ExitStack() as stack:

        def start(kind: str, ttl_s: float) -> Api:
            if (kind, ttl_s) not in running:
                folder = tmp_path_factory.mktemp(f"contract-{kind}")
                url = stack.enter_context(SERVERS[kind](tiny, folder, ttl_s=ttl_s))
                running[kind, ttl_s] = Api(url)
                stack.callback(running[kind, ttl_s].http.close)
            return running[kind, ttl_s]

        yield start


@pytest.fixture(scope="session", params=KINDS)
def service(request: pytest.FixtureRequest, _started: Callable[[str, float], Api]) -> Api:
    """A running service."""
    return _started(request.param, 600.0)


@pytest.fixture(scope="session", params=KINDS)
def brief(request: pytest.FixtureRequest, _started: Callable[[str, float], Api]) -> Api:
    """A running service that keeps a result for one second."""
    return _started(request.param, 1.0)


HandoffCall = Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]


def _with_httpx(api: Api) -> HandoffCall:
    """The shortest client there is: one POST that waits, parsed with safetensors' own reader."""
    from safetensors.numpy import load

    def call(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        blob = api.post(request, Prefer="wait=60").content
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return load(blob)["latents"], json.loads(header["__metadata__"]["latentrelay"])

    return call


def _with_cloud_client(api: Api) -> HandoffCall:
    """The runtime's own client."""
    from latentrelay.runtime.cloud_client import CloudClient
    from latentrelay.runtime.handoff_request import HandoffRequest

    def call(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        with CloudClient(api.url, token=TOKENS["alice"]) as client:
            handoff = client.handoff(HandoffRequest(**request))
        return handoff.latents, handoff.meta.to_dict()

    return call


def _with_async_client(api: Api) -> HandoffCall:
    """The same for asyncio, one loop a call."""
    from latentrelay.runtime.async_cloud_client import AsyncCloudClient
    from latentrelay.runtime.handoff_request import HandoffRequest

    async def handed_over(request: dict[str, Any]) -> Any:
        async with AsyncCloudClient(api.url, token=TOKENS["alice"]) as client:
            return await client.handoff(HandoffRequest(**request))

    def call(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        handoff = asyncio.run(handed_over(request))
        return handoff.latents, handoff.meta.to_dict()

    return call


def _with_second_client(api: Api) -> HandoffCall:
    """The client that was written from docs/embedding.md alone, in tests/second_client."""
    import numpy as np

    modules = {}
    for name in ("second_client", "second_blob"):
        if name not in sys.modules:
            path = Path(__file__).parents[1] / "second_client" / f"{name}.py"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None:
                raise ImportError(f"{path} is missing")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        modules[name] = sys.modules[name]
    client = modules["second_client"].SecondClient(api.url, TOKENS["alice"])

    def call(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        handoff = modules["second_blob"].parse(client.handoff(request))
        modules["second_blob"].compare(handoff, request)
        latents = handoff.arrays["latents"]
        return np.array(latents.values, handoff.metadata["dtype"]).reshape(latents.shape), handoff.metadata

    return call


CLIENTS: dict[str, Callable[[Api], HandoffCall]] = {
    "httpx": _with_httpx,
    "CloudClient": _with_cloud_client,
    "AsyncCloudClient": _with_async_client,
    "second": _with_second_client,
}


@pytest.fixture(params=list(CLIENTS))
def handoff_client(request: pytest.FixtureRequest, service: Api) -> HandoffCall:
    """A function: a request's document in, (latents, metadata) out."""
    return CLIENTS[request.param](service)


@pytest.fixture
def read_events() -> Callable[[Iterator[str]], Iterator[tuple[str, dict[str, Any]]]]:
    """Parses the lines of an event stream."""
    return events_of
