"""Our client and our loop against the golden transcript, as docs/embedding.md asks of any implementation."""

import dataclasses
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from latentrelay.runtime import Bundle, CloudClient, Handoff, HandoffRequest, Session, initial_noise
from latentrelay.runtime.errors import CloudRefusedError, CloudUnavailableError
from latentrelay.runtime.handoff import prompt_digest

GOLDEN = Path(__file__).parents[1] / "golden"
WIRE, LOOP = GOLDEN / "transcript-1/wire", GOLDEN / "transcript-1/loop"
FACTS = json.loads((WIRE / "transcript.json").read_text(encoding="utf-8"))
LOOPS = json.loads((LOOP / "loop.json").read_text())


def recorded(name: str, side: str) -> bytes:
    entry = next(each for each in FACTS["exchanges"] if each["name"] == name)
    return (WIRE / f"{entry['file']}.{side}").read_bytes()


def request() -> HandoffRequest:
    """The request of the transcript; the client fills in its wire versions and deadline."""
    body = json.loads(recorded("post", "request").partition(b"\r\n\r\n")[2])
    names = {field.name for field in dataclasses.fields(HandoffRequest)} - {"wire_versions", "deadline_ms"}
    return HandoffRequest(**{name: value for name, value in body.items() if name in names})


class Replay:
    """A server that knows nothing but the recorded answers: `choose` says which one a request gets."""

    def __init__(self, choose: Callable[[str, dict[str, str]], str]) -> None:
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self._choose = choose
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as stream:
                first = stream.readline().decode().strip()
                if not first:
                    return
                lines = iter(lambda: stream.readline().decode().strip(), "")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = stream.read(int(headers.get("content-length", 0)))
                self.seen.append((first, headers, body))
                connection.sendall(recorded(self._choose(first, headers), "answer"))


@pytest.fixture
def replay() -> Iterator[Callable[..., Replay]]:
    servers: list[Replay] = []

    def start(choose: Callable[[str, dict[str, str]], str]) -> Replay:
        servers.append(Replay(choose))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def usual(line: str, headers: dict[str, str]) -> str:
    """Which recorded answer a request gets in a conversation that goes well."""
    if line.startswith("POST"):
        return "post" if headers["prefer"] == "respond-async" else "post-again"
    if line.startswith("GET /v1/capabilities"):
        return "capabilities"
    if line.startswith("DELETE"):
        return "delete"
    wanted = headers["accept"].partition(",")[0]
    names = {"text/event-stream": "events", "application/json": "status"}
    return names.get(wanted, "blob-rest" if "range" in headers else "blob-cut")


def check_blob(handoff: Handoff) -> None:
    assert handoff.to_bytes() == (WIRE / "handoff.safetensors").read_bytes()
    assert handoff.digest() == FACTS["sha256"]
    for name, array in (("latents", handoff.latents), ("x0_prev", handoff.x0_prev)):
        expected = np.frombuffer((WIRE / f"{name}.f32").read_bytes(), "<f4").reshape(FACTS["shapes"][name])
        np.testing.assert_array_equal(np.asarray(array, np.float32), expected)
    meta = handoff.meta
    assert meta.prompt_digest == prompt_digest(meta.prompt_salt, FACTS["prompt"], FACTS["negative_prompt"])
    assert meta.to_dict() == FACTS["metadata"]


def test_the_client_takes_the_recorded_conversation(replay: Callable[..., Replay]) -> None:
    server, told = replay(usual), []
    with CloudClient(server.url, token=FACTS["token"]) as client:
        check_blob(client.handoff(request(), on_progress=told.append, deadline_s=60))
        assert client.attempts == 2  # the transfer was cut once
    assert [line.split()[0] for line, _, _ in server.seen] == ["GET", "POST", "GET", "GET", "GET"]
    assert (told[-1].state, told[-1].step, told[-1].num_steps) == ("done", 2, 4)
    assert [each.step for each in told] == sorted(each.step for each in told)
    post, resumed = server.seen[1], server.seen[4]
    golden = recorded("post", "request").decode()
    for name in ("authorization", "accept", "content-type", "accept-encoding"):
        assert f"\r\n{name}: {post[1][name]}".lower() in golden.lower()
    asked, wanted = json.loads(post[2]), json.loads(golden.partition("\r\n\r\n")[2])
    assert {**asked, "deadline_ms": 0} == {**wanted, "deadline_ms": 0}
    assert resumed[1]["range"] == f"bytes={FACTS['cut_after']}-"
    assert resumed[1]["if-range"] == f'"{FACTS["sha256"]}"'
    assert {headers["traceparent"] for _, headers, _ in server.seen[1:]} == {post[1]["traceparent"]}


def test_the_client_takes_the_blob_at_once(replay: Callable[..., Replay]) -> None:
    server = replay(usual)
    with CloudClient(server.url, token=FACTS["token"]) as client:
        check_blob(client.handoff(request(), deadline_s=60))
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("post-another-body", CloudRefusedError, "idempotency-key"),
        ("post-another-model", CloudRefusedError, "model_digest"),
        ("gone", CloudUnavailableError, "gone"),
    ],
)
def test_recorded_refusals(replay: Callable[..., Replay], name: str, error: type[Exception], words: str) -> None:
    server = replay(lambda line, headers: name if line.startswith("POST") else usual(line, headers))
    with CloudClient(server.url, token=FACTS["token"]) as client, pytest.raises(error, match=words):
        client.handoff(request(), deadline_s=60)


@pytest.mark.parametrize("row", LOOPS["noise"], ids=[row["file"] for row in LOOPS["noise"]])
def test_the_recorded_noise(row: dict[str, Any]) -> None:
    expected = np.frombuffer((LOOP / row["file"]).read_bytes(), "<f4").reshape(row["shape"])
    np.testing.assert_allclose(initial_noise(row["seed"], row["shape"]), expected, atol=2e-6)


@pytest.mark.parametrize("run", LOOPS["runs"], ids=[f"split-{run['split']}" for run in LOOPS["runs"]])
def test_the_loop_makes_the_recorded_calls(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph runs here: each call's inputs are compared with the recorded ones and its recorded outputs returned."""
    calls = iter(run["calls"])
    handoff = Handoff.from_bytes((LOOP / "handoff.safetensors").read_bytes())
    with Session(Bundle.open(GOLDEN / LOOPS["bundle"])) as session:
        embeds = session.encode(LOOPS["prompt"], LOOPS["negative_prompt"])
        handoff.check(session.manifest, prompt=LOOPS["prompt"], negative_prompt=LOOPS["negative_prompt"], split=1)

        def replayed(component: str, inputs: Any, outputs: Any = None) -> dict[str, Any]:
            call = next(calls)
            assert (component, int(inputs["step"])) == (call["graph"], call["step"])
            arrays = safetensors.numpy.load_file(LOOP / call["file"])
            spec = session.manifest.components[component]
            for port in spec.inputs:
                wanted = arrays[f"in.{port.role}"]
                np.testing.assert_allclose(np.asarray(inputs[port.name], port.dtype), wanted, atol=1e-5)
            made = {port.name: arrays[f"out.{port.role}"] for port in spec.outputs}
            for name, array in (outputs or {}).items():
                array[...] = made[name]
                made[name] = array
            return made

        monkeypatch.setattr(session, "run_component", replayed)
        start = (session.initial_latents(7), None) if run["split"] == 0 else (handoff.latents, handoff.x0_prev)
        events = list(session.run_steps(*start, run["split"], embeds, 2.0, 7))
    assert next(calls, None) is None
    assert [event.kind for event in events] == run["kinds"]
    expected = np.frombuffer((LOOP / run["latents"]).read_bytes(), "<f4")
    np.testing.assert_array_equal(events[-1].latents.ravel(), expected)


def test_the_recorded_runs_are_what_the_bundle_does() -> None:
    """With its graphs: the recording is not of another bundle."""
    assert {kind for run in LOOPS["runs"] for kind in run["kinds"]} == {"full", "predicted", "recomputed"}
    handoff = Handoff.from_bytes((LOOP / "handoff.safetensors").read_bytes())
    assert hashlib.sha256((LOOP / "handoff.safetensors").read_bytes()).hexdigest() == handoff.digest()
    with Session(Bundle.open(GOLDEN / LOOPS["bundle"])) as session:
        embeds = session.encode(LOOPS["prompt"], LOOPS["negative_prompt"])
        *_, last = session.run_steps(handoff.latents, handoff.x0_prev, 1, embeds, 2.0, 7)
    expected = np.frombuffer((LOOP / LOOPS["runs"][1]["latents"]).read_bytes(), "<f4")
    np.testing.assert_allclose(last.latents.ravel(), expected, atol=2e-3)  # float16 ladders


def test_the_files_that_the_embedding_document_names_are_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "embedding.md").read_text()
    named = re.findall(r"`((?:[a-z]+/)?[a-z0-9_-]+\.(?:f32|json))`", text)
    among = [name for name in named if "/" in name or name.endswith(".f32")]
    assert {"loop/noise-1.f32", "wire/transcript.json"} <= set(among)
    assert [name for name in among if not (root / "tests/golden/transcript-1" / name).is_file()] == []
