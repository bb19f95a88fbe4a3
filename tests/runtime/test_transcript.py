"""Our client and our loop against the golden transcript, as docs/embedding.md asks of any implementation."""

import dataclasses
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
from latentrelay.runtime import Bundle, CloudClient, Handoff, HandoffRequest, Session, StepEvent, initial_noise
from latentrelay.runtime.errors import CloudRefusedError, CloudUnavailableError
from latentrelay.runtime.handoff import prompt_digest

GOLDEN = Path(__file__).parents[1] / "golden"
WIRE = GOLDEN / "transcript-1/wire"
FACTS = json.loads((WIRE / "transcript.json").read_text(encoding="utf-8"))
LOOPS = {folder: json.loads((folder / "loop.json").read_text()) for folder in sorted(GOLDEN.glob("transcript-*/loop"))}
RUNS = [
    pytest.param(folder, run, id=f"{folder.parent.name} split {run['split']} {run.get('level', 'normal')}")
    for folder, facts in LOOPS.items()
    for run in facts["runs"]
]
NOISES = [(folder, row) for folder, facts in LOOPS.items() for row in facts["noise"]]


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


@pytest.mark.parametrize(("folder", "row"), NOISES)
def test_the_recorded_noise(folder: Path, row: dict[str, Any]) -> None:
    expected = np.frombuffer((folder / row["file"]).read_bytes(), "<f4").reshape(row["shape"])
    np.testing.assert_allclose(initial_noise(row["seed"], row["shape"]), expected, atol=2e-6)


@pytest.mark.parametrize(("folder", "run"), RUNS)
def test_the_loop_makes_the_recorded_calls(folder: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph runs here: each call's inputs are compared with the recorded ones and its recorded outputs returned."""
    facts, calls = LOOPS[folder], iter(run["calls"])
    with Session(Bundle.open(GOLDEN / facts["bundle"])) as session:

        def replayed(component: str, inputs: Any, outputs: Any = None) -> dict[str, Any]:
            call = next(calls)
            assert (component, int(inputs["step"])) == (call["graph"], call["step"])
            arrays = safetensors.numpy.load_file(folder / call["file"])
            spec = session.manifest.components[component]
            for port in spec.inputs:
                wanted = arrays[f"in.{port.role}"]
                np.testing.assert_allclose(np.asarray(inputs[port.name], port.dtype), wanted, atol=1e-5)
            made = {port.name: arrays[f"out.{port.role}"] for port in spec.outputs}
            for name, array in (outputs or {}).items():
                array[...] = made[name]
                made[name] = array
            return made

        embeds = session.encode(facts["prompt"], facts["negative_prompt"])
        monkeypatch.setattr(session, "run_component", replayed)
        events = made_by(session, folder, run, embeds)
    assert next(calls, None) is None
    assert [event.kind for event in events] == run["kinds"]
    np.testing.assert_array_equal(events[-1].latents.ravel(), latents_of(folder, run))


def made_by(session: Session, folder: Path, run: dict[str, Any], embeds: Any) -> list[StepEvent]:
    """The run's steps, from the noise of its seed or from the recorded handoff, which must fit the bundle."""
    facts, split = LOOPS[folder], run["split"]
    latents, memory = session.initial_latents(7), None
    if split:
        handoff = Handoff.from_bytes((folder / "handoff.safetensors").read_bytes())
        handoff.check(session.manifest, prompt=facts["prompt"], negative_prompt=facts["negative_prompt"], split=split)
        latents, memory = handoff.latents, handoff.x0_prev
    return list(session.run_steps(latents, memory, split, embeds, 2.0, 7, level=run.get("level", "normal")))


def latents_of(folder: Path, run: dict[str, Any]) -> Any:
    return np.frombuffer((folder / run["latents"]).read_bytes(), "<f4")


@pytest.mark.parametrize(("folder", "run"), RUNS)
def test_the_recorded_runs_are_what_the_bundle_does(folder: Path, run: dict[str, Any]) -> None:
    """With its graphs: the recording is not of another bundle."""
    facts = LOOPS[folder]
    with Session(Bundle.open(GOLDEN / facts["bundle"])) as session:
        halves = session.manifest.prediction.ladder_dtype == "float16"
        embeds = session.encode(facts["prompt"], facts["negative_prompt"])
        *_, last = made_by(session, folder, run, embeds)
    np.testing.assert_allclose(last.latents.ravel(), latents_of(folder, run), atol=2e-3 if halves else 1e-5)


def test_the_recordings_tell_the_usual_mistakes_apart() -> None:
    """A prediction after a step that was computed after all (a swap would show), noise, and a mask of each level."""
    for folder, facts in LOOPS.items():
        assert {kind for run in facts["runs"] for kind in run["kinds"]} == {"full", "predicted", "recomputed"}, folder
    (folder, facts) = list(LOOPS.items())[-1]
    assert ["recomputed", "predicted"] in [run["kinds"][at : at + 2] for run in facts["runs"] for at in range(3)]
    masks = {(run["split"], run["level"]): run["mask"] for run in facts["runs"]}
    assert masks[0, "normal"] != masks[0, "hot"]
    for run in facts["runs"]:
        noises: dict[int, list[Any]] = {}
        for call in run["calls"]:
            noises.setdefault(call["step"], []).append(safetensors.numpy.load_file(folder / call["file"])["in.noise"])
        for step, drawn in noises.items():  # one draw a step, however often it is called; the last step has none
            assert all(np.array_equal(each, drawn[0]) for each in drawn)
            assert np.any(drawn[0]) == (step < 3)


def test_the_files_that_the_embedding_document_names_are_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "embedding.md").read_text()
    named = re.findall(r"`((?:[a-z]+/)?[a-z0-9_-]+\.(?:f32|json))`", text)
    among = [name for name in named if "/" in name or name.endswith(".f32")]
    assert {"loop/noise-1.f32", "wire/transcript.json"} <= set(among)
    places = sorted((root / "tests/golden").glob("transcript-*"))
    assert [name for name in among if not any((place / name).is_file() for place in places)] == []
