"""A client written from docs/embedding.md alone agrees with the golden transcript and with the real service."""

from __future__ import annotations

import json
import math
import struct
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "transcript-1"
WIRE, LOOP = GOLDEN / "wire", GOLDEN / "loop"
FACTS = json.loads((WIRE / "transcript.json").read_text("utf-8"))
LOOP_FACTS = json.loads((LOOP / "loop.json").read_text("utf-8"))
MANIFEST = json.loads((GOLDEN.parent / LOOP_FACTS["bundle"] / "manifest.json").read_text("utf-8"))
LOOPS = {folder: json.loads((folder / "loop.json").read_text("utf-8")) for folder in GOLDEN.parent.glob("*/loop")}
RUNS = [
    pytest.param(folder, run, id=f"{folder.parent.name} split {run['split']} {run.get('level', 'normal')}")
    for folder, facts in sorted(LOOPS.items())
    for run in facts["runs"]
]
BLOB = (WIRE / "handoff.safetensors").read_bytes()
JOB = "144b32acf1569b24a1bb5fa91ffc992f"
FULL_REQUEST = json.loads((WIRE / "02-post.request").read_bytes().partition(b"\r\n\r\n")[2])
REQUEST = {name: value for name, value in FULL_REQUEST.items() if name not in ("deadline_ms", "wire_versions")}


def recorded(name: str) -> bytes:
    return next(WIRE.glob(f"*-{name}.answer")).read_bytes()


def floats(path: Path) -> tuple[float, ...]:
    data = path.read_bytes()
    return struct.unpack(f"<{len(data) // 4}f", data)


def same(got: Sequence[float], expected: Sequence[float], tolerance: float = 0.0) -> bool:
    """Equal up to the tolerance, NaN equal to NaN."""
    return len(got) == len(expected) and all(
        (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance for a, b in zip(got, expected, strict=True)
    )


# --- the blob


def test_the_blob_is_read(second: Any) -> None:
    handoff = second.blob.parse(BLOB)
    assert handoff.metadata == {**second.blob.DEFAULTS, **FACTS["metadata"]}
    for name, shape in FACTS["shapes"].items():
        assert handoff.arrays[name].shape == tuple(shape)
        assert same(handoff.arrays[name].values, floats(WIRE / f"{name}.f32"))
    second.blob.compare(handoff, REQUEST)


def test_the_prompt_digest_is_that_of_the_prompts(second: Any) -> None:
    meta = FACTS["metadata"]
    digest = second.blob.prompt_digest(meta["prompt_salt"], FACTS["prompt"], FACTS["negative_prompt"])
    assert digest == meta["prompt_digest"]


def remade(header: Callable[[dict[str, Any]], Any] | None = None, meta: Callable[[dict[str, Any]], Any] | None = None,
           data: Callable[[bytes], bytes] = bytes, blob: bytes = BLOB) -> bytes:  # fmt: skip
    """The blob with its header, its metadata or its data changed."""
    length = int.from_bytes(blob[:8], "little")
    document = json.loads(blob[8 : 8 + length])
    inner = json.loads(document["__metadata__"]["latentrelay"])
    if meta:
        meta(inner)
    document["__metadata__"]["latentrelay"] = json.dumps(inner)
    if header:
        header(document)
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data(blob[8 + length :])


def only_memory(header: dict[str, Any]) -> None:
    header["x0_prev"]["data_offsets"] = header.pop("latents")["data_offsets"]


def wide_memory(header: dict[str, Any]) -> None:
    header["x0_prev"].update(dtype="F32", data_offsets=[512, 1536])


def written_out(inner: dict[str, Any], version: str = "1.0") -> None:
    inner.update(schema_version=version, shift_factor=0.0, generator="torch-cpu-mt19937", latent_space="sd")


HEADER = int.from_bytes(BLOB[:8], "little")
NAN16 = struct.pack("<e", math.nan)
BAD_BLOBS: dict[str, tuple[str, bytes]] = {
    "empty": ("header", b""),
    "length-beyond": ("header", (HEADER + 1).to_bytes(8, "little") + BLOB[8 : 8 + HEADER]),
    "length-of-2^64": ("header", b"\xff" * 8 + BLOB[8:]),
    "length-too-great": (
        "header",
        (262145).to_bytes(8, "little") + BLOB[8 : 8 + HEADER].ljust(262145) + BLOB[8 + HEADER :],
    ),
    "not-an-object": ("header", (2).to_bytes(8, "little") + b"[]"),
    "spaces-first": ("header", (4).to_bytes(8, "little") + b"  {}"),
    "key-twice": ("header", (13).to_bytes(8, "little") + b'{"a":1,"a":1}'),
    "not-utf-8": ("header", (7).to_bytes(8, "little") + b'{"\xff":1}'),
    "deep": ("header", (200000).to_bytes(8, "little") + b'{"a":' + b"[" * 199995),
    "no-metadata": ("__metadata__", remade(lambda header: header.pop("__metadata__"))),
    "more-metadata": ("__metadata__", remade(lambda header: header["__metadata__"].update(more=""))),
    "another-tensor": ("tensors", remade(lambda header: header.update(more=header.pop("x0_prev")))),
    "no-latents": ("tensors", remade(only_memory, data=lambda data: data[512:])),
    "entry-with-more": ("x0_prev", remade(lambda header: header["x0_prev"].update(more=1))),
    "shape-of-three": ("latents", remade(lambda header: header["latents"].update(shape=[4, 8, 8]))),
    "batch-of-two": ("latents", remade(lambda header: header["latents"].update(shape=[2, 2, 8, 8]))),
    "shapes-differ": ("x0_prev", remade(lambda header: header["x0_prev"].update(shape=[1, 8, 4, 8]))),
    "boolean-shape": ("latents", remade(lambda header: header["latents"].update(shape=[True, 4, 8, 8]))),
    "dtypes-differ": ("x0_prev", remade(wide_memory, data=lambda data: data + bytes(512))),
    "gap-at-the-end": ("data", remade(data=lambda data: data + b"\0")),
    "cut": ("x0_prev", BLOB[:-1]),
    "overlap": (
        "data",
        remade(lambda header: header["x0_prev"].update(data_offsets=[256, 768]), data=lambda data: data[:768]),
    ),
    "gap-between": (
        "data",
        remade(lambda header: header["x0_prev"].update(data_offsets=[514, 1026]), data=lambda data: data + b"\0\0"),
    ),
    "negative-offset": ("x0_prev", remade(lambda header: header["x0_prev"].update(data_offsets=[-512, 0]))),
    "nan": ("latents", remade(data=lambda data: NAN16 + data[2:])),
    "version-2": ("schema_version", remade(meta=lambda meta: meta.update(schema_version="2.0"))),
    "unknown-key": ("more", remade(meta=lambda meta: meta.update(more=1))),
    "missing-key": ("seed", remade(meta=lambda meta: meta.pop("seed"))),
    "1.0-without-shift": ("shift_factor", remade(meta=lambda meta: (written_out(meta), meta.pop("shift_factor")))),
    "1.0-with-runs": (
        "timesteps",
        remade(meta=lambda meta: (written_out(meta), meta.update(timesteps=[[999, -250, 4]]))),
    ),
    "runs-too-long": ("timesteps", remade(meta=lambda meta: meta.update(timesteps=[[999, -1, 10**15]]))),
    "timesteps-too-few": ("timesteps", remade(meta=lambda meta: meta.update(timesteps=[[999, -1, 3]]))),
    "infinite-number": ("metadata", remade(meta=lambda meta: meta.update(guidance=math.inf))),
    "next-step-beyond": ("next_step", remade(meta=lambda meta: meta.update(next_step=5))),
    "seed-too-great": ("seed", remade(meta=lambda meta: meta.update(seed=2**64))),
    "seed-a-boolean": ("seed", remade(meta=lambda meta: meta.update(seed=True))),
    "steps-too-many": ("num_steps", remade(meta=lambda meta: meta.update(num_steps=10001))),
    "odd-salt": ("prompt_salt", remade(meta=lambda meta: meta.update(prompt_salt="abc"))),
    "short-digest": ("prompt_digest", remade(meta=lambda meta: meta.update(prompt_digest="ab"))),
    "producer-of-numbers": ("producer", remade(meta=lambda meta: meta.update(producer={"name": 1}))),
    "dtype-unknown": ("dtype", remade(meta=lambda meta: meta.update(dtype="bfloat16"))),
}


@pytest.mark.parametrize("name", list(BAD_BLOBS))
def test_a_bad_blob_is_refused(second: Any, name: str) -> None:
    field, blob = BAD_BLOBS[name]
    with pytest.raises(second.blob.BlobError) as caught:
        second.blob.parse(blob)
    assert caught.value.field == field


def test_three_versions_say_the_same(second: Any) -> None:
    newest = second.blob.parse(remade(meta=lambda meta: meta.update(schema_version="1.7", more={"a": 1})))
    assert newest.metadata["more"] == {"a": 1}
    oldest = second.blob.parse(remade(meta=lambda meta: written_out(meta)))
    runs = second.blob.parse(remade(meta=lambda meta: meta.update(timesteps=[[999, -250, 2], [500.0, -250, 2]])))
    for each in (newest, oldest, runs):
        assert each.metadata["timesteps"] == [999, 749, 500, 250]
        assert each.arrays == newest.arrays
        second.blob.compare(each, REQUEST)


ASKED = {"prompt": "a red circle", "negative_prompt": "blue", "guidance": 2, "seed": 7, "height": 16, "width": 16,
         "num_steps": 4, "split": 1, "dtype": "float32"}  # fmt: skip


def test_the_blob_of_the_loop_fits_its_bundle(second: Any) -> None:
    second.blob.compare(second.blob.parse((LOOP / "handoff.safetensors").read_bytes()), ASKED, MANIFEST)
    fewer = {**ASKED, "split": 2, "accept_splits": [1]}
    second.blob.compare(second.blob.parse((LOOP / "handoff.safetensors").read_bytes()), fewer, MANIFEST)


OTHER_METADATA = {
    "model_family": "sd2", "model_digest": "sha256:" + "0" * 64, "scheduler_class": "DDIMScheduler",
    "scheduler_digest": "sha256:" + "0" * 64, "timesteps": [999, 700, 400, 99], "init_noise_sigma": 2,
    "prediction_type": "v_prediction", "scaling_factor": 0.6, "shift_factor": 0, "latent_space": "sd3", "height": 24,
    "width": 24, "seed": 8, "guidance": 2.5, "next_step": 2, "prompt_salt": "00fe",
}  # fmt: skip


@pytest.mark.parametrize("field", list(OTHER_METADATA))
def test_a_handoff_of_something_else_is_refused(second: Any, field: str) -> None:
    blob = (LOOP / "handoff.safetensors").read_bytes()
    other = second.blob.parse(remade(meta=lambda meta: meta.update({field: OTHER_METADATA[field]}), blob=blob))
    with pytest.raises(second.blob.BlobError) as caught:
        second.blob.compare(other, ASKED, MANIFEST)
    assert caught.value.field == ("prompt_digest" if field == "prompt_salt" else field)


def test_the_memory_is_there_exactly_where_the_sampler_needs_it(second: Any) -> None:
    without = remade(lambda header: header.pop("x0_prev"), data=lambda data: data[:64],
                     blob=(LOOP / "handoff.safetensors").read_bytes())  # fmt: skip
    with pytest.raises(second.blob.BlobError, match="x0_prev"):
        second.blob.compare(second.blob.parse(without), ASKED, MANIFEST)
    other = {**MANIFEST, "schedule": {**MANIFEST["schedule"], "needs_x0_prev": False}}
    second.blob.compare(second.blob.parse(without), ASKED, other)
    with pytest.raises(second.blob.BlobError, match="x0_prev"):
        second.blob.compare(second.blob.parse((LOOP / "handoff.safetensors").read_bytes()), ASKED, other)


# --- the noise and the loop


@pytest.mark.parametrize("entry", LOOP_FACTS["noise"], ids=lambda entry: str(entry["seed"]))
def test_the_noise_of_a_seed(second: Any, entry: dict[str, Any]) -> None:
    expected = floats(LOOP / entry["file"])
    assert same(second.loop.Noise(entry["seed"]).draw(math.prod(entry["shape"])), expected, 2e-6)


class Recorded:
    """Stands for ONNX Runtime: checks what goes in against the recorded calls, and gives what came out."""

    def __init__(self, second: Any, calls: list[dict[str, Any]], folder: Path = LOOP) -> None:
        self.names = [call["graph"] for call in calls]
        self.calls = [second.blob.read_tensors((folder / call["file"]).read_bytes())[1] for call in calls]
        self.made = 0

    def first(self, role: str) -> Any:
        return self.calls[0][f"in.{role}"].values

    def __call__(self, name: str, inputs: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
        arrays, expected = self.calls[self.made], self.names[self.made]
        self.made += 1
        assert name == expected
        assert {f"in.{role}" for role in inputs} == {key for key in arrays if key.startswith("in.")}
        for role, values in inputs.items():
            assert same(values, arrays[f"in.{role}"].values, 1e-5), f"{role} of call {self.made - 1}"
        return {key[4:]: array.values for key, array in arrays.items() if key.startswith("out.")}


@pytest.mark.parametrize(("folder", "facts"), RUNS)
def test_the_loop_makes_the_recorded_calls(second: Any, folder: Path, facts: dict[str, Any]) -> None:
    manifest = json.loads((GOLDEN.parent / LOOPS[folder]["bundle"] / "manifest.json").read_text("utf-8"))
    graph = Recorded(second, facts["calls"], folder)
    if facts["split"]:
        arrays = second.blob.parse((folder / "handoff.safetensors").read_bytes()).arrays
        latents, memory = arrays["latents"].values, arrays["x0_prev"].values
    else:
        latents, memory = second.loop.start_latents(manifest, 7), None
    level, embeds = facts.get("level", "normal"), graph.first("prompt_embeds")
    result = second.loop.run(manifest, graph, latents, memory, facts["split"], embeds, 2.0, 7, level)
    assert result.kinds == facts["kinds"]
    assert graph.made == len(facts["calls"])
    assert same(result.latents, floats(folder / facts["latents"]), 1e-5)


def test_a_recomputed_step_leaves_the_ladders_as_they_are(second: Any) -> None:
    prediction = {"fallback_threshold": 0.5, "masks": [
        {"split": 0, "row": 3, "mask": ["full", "predicted", "predicted", "full"]},
        {"split": 0, "row": 4, "mask": ["full", "predicted", "predicted", "predicted"], "level": "hot"},
    ]}  # fmt: skip
    seen: list[tuple[str, int, float, int]] = []

    def graph(name: str, inputs: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
        step = int(inputs["step"][0])
        seen.append((name, step, inputs["feature_ladder"][0], int(inputs["split_row"][0])))
        out: dict[str, Sequence[float]] = {"latents": inputs["latents"], "x0_prev": inputs["x0_prev"]}
        if name == "step_predicted":
            return {**out, "probe_error": [0.6 if step == 1 else 0.5]}
        return {**out, **{role: [step + 10.0] * len(inputs[role]) for role in second.loop.LADDERS}}

    start = second.loop.start_latents(MANIFEST, 7)
    manifest = {**MANIFEST, "prediction": prediction}
    result = second.loop.run(manifest, graph, start, None, 0, [], 2.0, 7, "hot")
    assert result.kinds == ["full", "recomputed", "predicted", "predicted"]
    assert [each[:2] for each in seen] == [("step_full", 0), ("step_predicted", 1), ("step_full", 1),
                                          ("step_predicted", 2), ("step_predicted", 3)]  # fmt: skip
    assert math.isnan(seen[0][2])
    assert [each[2] for each in seen[1:]] == [10.0] * 4
    assert {each[3] for each in seen} == {4}
    assert second.loop.run(manifest, graph, start, None, 0, [], 2.0, 7).kinds[-1] == "full"
    assert second.loop.run(manifest, graph, start, None, 2, [], 2.0, 7, "hot").kinds == ["full", "full"]


@pytest.mark.parametrize("split", [0, 1])
def test_a_sampler_with_noise_draws_it_after_the_start(second: Any, split: int) -> None:
    full = MANIFEST["components"]["step_full"]
    port = {"role": "noise", "name": "noise", "dtype": "float32", "shape": [1, 4, 2, 2]}
    components = {**MANIFEST["components"], "step_full": {**full, "inputs": [*full["inputs"], port]}}
    manifest = {**MANIFEST, "components": components, "prediction": None}
    noises: list[Sequence[float]] = []

    def graph(name: str, inputs: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
        noises.append(inputs["noise"])
        return {role: [0.0 if math.isnan(value) else value for value in values] for role, values in inputs.items()}

    source = second.loop.Noise(7)
    draws = [source.draw(16) for _ in range(4)]
    second.loop.run(manifest, graph, draws[0], None, split, [], 2.0, 7)
    assert noises == [*draws[1 + split :], [0.0] * 16]


def test_nan_stops_the_loop_and_names_the_step(second: Any) -> None:
    recorded_calls = Recorded(second, LOOP_FACTS["runs"][0]["calls"])

    def broken(name: str, inputs: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
        out = recorded_calls(name, inputs)
        return out if recorded_calls.made < 3 else {**out, "latents": [math.nan] * 16}

    start, embeds = second.loop.start_latents(MANIFEST, 7), recorded_calls.first("prompt_embeds")
    with pytest.raises(second.loop.NotFinite, match="step 2"):
        second.loop.run(MANIFEST, broken, start, None, 0, embeds, 2.0, 7)


# --- the wire, from recorded and written answers


def answered(status: int, document: dict[str, Any], *lines: str, media_type: str = "application/problem+json") -> bytes:
    body = json.dumps(document).encode()
    head = [f"HTTP/1.1 {status} Answer", f"Content-Type: {media_type}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


def problem(status: int, kind: str, *lines: str) -> bytes:
    return answered(status, {"type": f"urn:latentrelay:problem:{kind}", "title": kind, "status": status}, *lines)


def of_transcript(request: Any) -> bytes:
    """The recorded answer to a request of the recorded conversation."""
    if request.path == "/v1/capabilities":
        return recorded("capabilities")
    if request.method == "POST":
        return recorded("post" if request.headers["prefer"] == "respond-async" else "post-again")
    if request.method == "DELETE":
        return recorded("delete")
    assert request.path == f"/v1/handoffs/{JOB}"
    if request.headers["accept"].startswith("text/event-stream"):
        return recorded("events")
    return recorded("blob-rest" if "range" in request.headers else "blob-cut")


def but(**answers: Any) -> Callable[[Any], bytes]:
    """of_transcript with other answers, in order, to POST, DELETE, EVENTS or GET; the last one for ever."""
    left = {name: list(value) if isinstance(value, list) else [value] for name, value in answers.items()}

    def answer(request: Any) -> bytes:
        events = request.headers.get("accept", "").startswith("text/event-stream")
        name = "CAPS" if request.path == "/v1/capabilities" else "EVENTS" if events else request.method
        if name not in left:
            return of_transcript(request)
        found = left[name].pop(0) if len(left[name]) > 1 else left[name][0]
        return of_transcript(request) if found is None else bytes(found)

    return answer


def test_the_recorded_conversation(second: Any, script: Any) -> None:
    server, seen = script(of_transcript), []
    client = second.client.SecondClient(server.url, FACTS["token"], watch=seen.append, sleep=lambda seconds: None)
    assert client.handoff(REQUEST) == BLOB
    assert [status["state"] for status in seen] == ["queued", "running", "running", "done"]
    caps, post, events, first, rest = server.requests
    for request in server.requests:
        assert request.headers["authorization"] == f"Bearer {FACTS['token']}"
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["accept"].endswith(", application/problem+json")
    body = json.loads(post.body)
    assert 50_000 <= body.pop("deadline_ms") <= 60_000
    assert body == {name: value for name, value in FULL_REQUEST.items() if name != "deadline_ms"}
    assert len(post.headers["idempotency-key"]) == 32
    assert "range" not in first.headers
    assert rest.headers["range"] == f"bytes={FACTS['cut_after']}-"
    assert rest.headers["if-range"] == f'"{FACTS["sha256"]}"'
    assert (caps.method, events.method) == ("GET", "GET")


def test_a_post_that_waits_brings_the_blob(second: Any, script: Any) -> None:
    server = script(of_transcript)
    client = second.client.SecondClient(server.url, FACTS["token"])
    assert client.handoff(REQUEST) == BLOB
    assert client.handoff(REQUEST) == BLOB
    assert [request.method for request in server.requests] == ["GET", "POST", "POST"]  # capabilities are kept


def made(second: Any, server: Any, **more: Any) -> tuple[Any, list[float]]:
    """A client that never sleeps, and how long it would have."""
    slept: list[float] = []
    return second.client.SecondClient(server.url, FACTS["token"], sleep=slept.append, **more), slept


def test_a_request_is_repeated_with_the_same_key_and_body(second: Any, script: Any) -> None:
    busy = problem(503, "queue-full", "Retry-After: 7")
    server = script(
        but(POST=[busy, b"", problem(408, "body-timeout"), answered(502, {}, media_type="text/html"), None])
    )
    client, slept = made(second, server)
    assert client.handoff(REQUEST) == BLOB
    posts = [request for request in server.requests if request.method == "POST"]
    assert len(posts) == 5
    assert len({(post.headers["idempotency-key"], post.body) for post in posts}) == 1
    assert 7 <= slept[0] <= 7.1
    assert all(pause <= 0.1 * 2**index for index, pause in enumerate(slept[1:], 1))


EVENTS_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize("cut", [recorded("events")[:700], EVENTS_HEAD + b": alive\n\n"], ids=["chunked", "closed"])
def test_a_cut_stream_of_events_is_asked_for_again(second: Any, script: Any, cut: bytes) -> None:
    server, seen = script(but(EVENTS=[cut, None])), []
    client, _ = made(second, server, watch=seen.append)
    assert client.handoff(REQUEST) == BLOB
    assert seen[-1]["state"] == "done"


def test_a_lost_job_is_posted_again_with_the_same_key(second: Any, script: Any) -> None:
    server = script(but(POST=[recorded("post"), None], GET=[problem(404, "unknown-handoff"), None]))
    client, _ = made(second, server)
    assert client.handoff(REQUEST) == BLOB
    posts = [request for request in server.requests if request.method == "POST"]
    assert len(posts) == 2
    assert len({(post.headers["idempotency-key"], post.body) for post in posts}) == 1


CUT, REST, WHOLE = recorded("blob-cut"), recorded("blob-rest"), recorded("post-again")
RESUMED: dict[str, tuple[list[bytes], int]] = {
    "another etag": ([CUT, REST.replace(b'etag: "3', b'etag: "4'), recorded("post-again")], 3),
    "another start": ([CUT, REST.replace(b"bytes 500-", b"bytes 501-"), recorded("post-again")], 3),
    "another end": ([CUT, REST.replace(b"-1935/1936", b"-1934/1936"), recorded("post-again")], 3),
    "beyond": ([CUT, recorded("beyond"), recorded("post-again")], 3),
    "the whole anew": ([CUT, recorded("post-again")], 2),
    "parts that do not fit": ([CUT, REST[:-1] + b"\0", recorded("post-again")], 3),
    "a weak etag": ([CUT.replace(b'etag: "', b'etag: W/"'), recorded("post-again")], 2),
}


def test_the_blob_of_a_post_is_resumed_too(second: Any, script: Any) -> None:
    cut = WHOLE[: len(WHOLE) - len(BLOB) + FACTS["cut_after"]]
    server = script(but(POST=cut, GET=REST))
    client, _ = made(second, server)
    assert client.handoff(REQUEST) == BLOB
    assert [request.method for request in server.requests] == ["GET", "POST", "GET"]
    assert server.requests[2].headers["range"] == f"bytes={FACTS['cut_after']}-"


@pytest.mark.parametrize("name", list(RESUMED))
def test_a_part_that_does_not_fit_is_dropped(second: Any, script: Any, name: str) -> None:
    answers, gets = RESUMED[name]
    server = script(but(POST=recorded("post"), GET=answers))
    client, _ = made(second, server)
    assert client.handoff(REQUEST) == BLOB
    asked = [request for request in server.requests if request.path.endswith(JOB)]
    assert len(asked) == gets
    assert ("range" in asked[1].headers) == (name != "a weak etag")
    assert gets == 2 or "range" not in asked[2].headers


# --- refusals


ENDINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "another body": ("Refused", "idempotency-key-reused", {"POST": recorded("post-another-body")}),
    "another model": ("Refused", "handoff-mismatch", {"POST": recorded("post-another-model")}),
    "gone": ("Unavailable", "deleted", {"POST": recorded("post"), "GET": recorded("gone")}),
    "no token": ("Refused", "unauthorized", {"CAPS": problem(401, "unauthorized")}),
    "a proxy's 403": ("Refused", "status-403", {"POST": answered(403, {}, media_type="text/html")}),
    "quota": ("Unavailable", "quota-used", {"POST": problem(429, "quota-used", "Retry-After: 1")}),
    "unreachable": (
        "Unavailable",
        "deadline-unreachable",
        {"POST": problem(503, "deadline-unreachable", "Retry-After: 1")},
    ),
    "500": ("Unavailable", "run-failed", {"POST": problem(500, "run-failed")}),
    "500 of a proxy": ("Unavailable", "status-500", {"POST": answered(500, {}, media_type="text/html")}),
    "504": ("Unavailable", "deadline-passed", {"POST": recorded("post"), "GET": problem(504, "deadline-passed")}),
    "accepted, then memory": (
        "Unavailable",
        "memory",
        {"POST": recorded("post"), "GET": problem(503, "memory", "Retry-After: 1")},
    ),
    "accepted by header": (
        "Unavailable",
        "memory",
        {"POST": problem(503, "memory", "Retry-After: 1", f"Latentrelay-Job: {JOB}")},
    ),
    "redirect": ("ProtocolError", "status", {"POST": answered(307, {}, "Location: http://elsewhere.example/")}),
    "early hints": ("ProtocolError", "status", {"POST": answered(103, {})}),
    "no content": ("ProtocolError", "status", {"POST": b"HTTP/1.1 204 No Content\r\n\r\n"}),
    "media type": ("ProtocolError", "media-type", {"POST": WHOLE.replace(b"vnd.latentrelay.handoff", b"octet-stream")}),
    "encoded": (
        "ProtocolError",
        "encoding",
        {"POST": WHOLE.replace(b"accept-ranges: bytes", b"content-encoding: gzip")},
    ),
    "too long": (
        "ProtocolError",
        "too-long",
        {"POST": WHOLE.replace(b"content-length: 1936", b"content-length: 67108865")},
    ),
    "long capabilities": (
        "ProtocolError",
        "too-long",
        {"CAPS": answered(200, {"a": "a" * 2**20}, media_type="application/json")},
    ),
    "long event": (
        "ProtocolError",
        "too-long",
        {
            "EVENTS": recorded("events").partition(b"\r\n\r\n")[0].replace(b"Transfer-Encoding: chunked", b"x: y")
            + b"\r\n\r\ndata: "
            + b"a" * (2**20 + 1)
        },
    ),
    "no digest": (
        "ProtocolError",
        "digest",
        {"POST": WHOLE.replace(b"etag:", b"x-etag:").replace(b"repr-digest:", b"x:")},
    ),
    "another digest": ("ProtocolError", "digest", {"POST": WHOLE[:-1] + b"\0"}),
    "another repr-digest": ("ProtocolError", "digest", {"POST": WHOLE.replace(b"sha-256=:Mg", b"sha-256=:Ng")}),
    "202 without a job": (
        "ProtocolError",
        "no-job",
        {"POST": answered(202, {}, "Location: /a/../b c", media_type="application/json")},
    ),
}


@pytest.mark.parametrize("name", list(ENDINGS))
def test_an_answer_ends_the_handoff_as_the_document_says(second: Any, script: Any, name: str) -> None:
    error, kind, answers = ENDINGS[name]
    server = script(but(**answers))
    client, slept = made(second, server, watch=(lambda status: None) if "EVENTS" in answers else None)
    with pytest.raises(second.client.Failed) as caught:
        client.handoff(REQUEST)
    assert (type(caught.value).__name__, caught.value.kind) == (error, kind)
    assert slept == []
    if kind == "handoff-mismatch":
        assert caught.value.field == "model_digest"
    assert not any(request.method == "DELETE" for request in server.requests)


PREVIEWS: dict[str, Any] = {
    "too wide": {"height": 1, "width": 513, "rgb": "AAAA" * 513},
    "too short": {"height": 1, "width": 2, "rgb": "AAAA"},
    "not base64": {"height": 1, "width": 1, "rgb": "%%%%"},
    "no width": {"height": 1, "rgb": "AAAA"},
}


@pytest.mark.parametrize("name", list(PREVIEWS))
def test_a_bad_preview_is_a_protocol_error(second: Any, script: Any, name: str) -> None:
    status = {"id": JOB, "state": "running", "preview": PREVIEWS[name]}
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    stream = f"event: progress\ndata: {json.dumps(status)}\n\n".encode()
    client, _ = made(second, script(but(EVENTS=head + stream)), watch=lambda status: None)
    with pytest.raises(second.client.ProtocolError) as caught:
        client.handoff(REQUEST)
    assert caught.value.kind == "preview"


def test_a_failed_job_ends_the_handoff_with_its_problem(second: Any, script: Any) -> None:
    status = {"id": JOB, "state": "failed", "problem": {"type": "urn:latentrelay:problem:run-failed", "status": 500}}
    stream = f": alive\n\nevent: failed\nid: 1\ndata: {json.dumps(status)}\n\n".encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    client, _ = made(second, script(but(EVENTS=head + stream)), watch=lambda status: None)
    with pytest.raises(second.client.Unavailable) as caught:
        client.handoff(REQUEST)
    assert caught.value.kind == "run-failed"


NOT_SERVED: dict[str, dict[str, Any]] = {
    "model_digest": {"model_digest": "sha256:" + "0" * 64},
    "scheduler_digest": {"scheduler_digest": "sha256:" + "0" * 64},
    "sampler": {"sampler": "lcm"},
    "height": {"height": 17},
    "width": {"width": 1026},
    "num_steps": {"num_steps": 201},
    "split": {"split": 5},
    "accept_splits": {"accept_splits": [2]},
    "prompt": {"prompt": "a" * 4001},
    "guidance": {"guidance": 51},
    "dtype": {"dtype": "bfloat16"},
    "wire_versions": {"wire_versions": ["2.0"]},
}


@pytest.mark.parametrize("field", list(NOT_SERVED))
def test_what_is_not_served_is_not_asked_for(second: Any, script: Any, field: str) -> None:
    server = script(of_transcript)
    client, _ = made(second, server)
    with pytest.raises(second.client.Refused) as caught:
        client.handoff({**REQUEST, **NOT_SERVED[field]})
    assert caught.value.field == field
    assert [request.path for request in server.requests] == ["/v1/capabilities"]


def test_nobody_listens(second: Any, dead_url: str) -> None:
    slept: list[float] = []
    with pytest.raises(second.client.Unavailable) as caught:
        second.client.SecondClient(dead_url, sleep=slept.append).handoff(REQUEST)
    assert caught.value.kind == "unreachable"
    assert len(slept) == 2


def test_plain_http_to_another_machine_is_refused(second: Any) -> None:
    with pytest.raises(ValueError, match="plain HTTP"):
        second.client.SecondClient("http://cloud.example", "token")


# --- giving up


@pytest.fixture
def patient(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second to leave is little on a busy machine."""
    monkeypatch.setattr(second.client, "LEAVE_S", 30.0)


@pytest.mark.usefixtures("patient")
def test_at_the_deadline_the_job_is_deleted(second: Any, script: Any) -> None:
    server = script(but(POST=recorded("post"), GET=problem(503, "draining", "Retry-After: 600")))
    client, slept = made(second, server)
    with pytest.raises(second.client.Unavailable) as caught:
        client.handoff(REQUEST)
    assert caught.value.kind == "draining"
    assert slept == []
    assert (server.requests[-1].method, server.requests[-1].path) == ("DELETE", f"/v1/handoffs/{JOB}")


@pytest.mark.usefixtures("patient")
def test_a_post_that_may_have_arrived_is_found_and_deleted(second: Any, script: Any) -> None:
    server = script(but(POST=[problem(503, "draining", "Retry-After: 600"), None]))
    client, _ = made(second, server)
    with pytest.raises(second.client.Unavailable):
        client.handoff(REQUEST)
    first, again, delete = server.requests[1:]
    assert (first.method, again.method, delete.method) == ("POST", "POST", "DELETE")
    assert again.headers["prefer"] == "respond-async"
    assert (again.headers["idempotency-key"], again.body) == (first.headers["idempotency-key"], first.body)


def without_features(answer: bytes) -> bytes:
    document = json.loads(answer.partition(b"\r\n\r\n")[2])
    del document["features"]
    return answered(200, document, media_type="application/json")


@pytest.mark.parametrize("broken", [b"", problem(503, "queue-full", "Retry-After: 1")], ids=["cut", "busy"])
def test_a_cloud_of_version_1_0_is_asked_once(second: Any, script: Any, broken: bytes) -> None:
    caps = without_features(recorded("capabilities"))
    server = script(but(CAPS=caps, POST=[broken, None]))
    client, slept = made(second, server)
    with pytest.raises(second.client.Unavailable):
        client.handoff(REQUEST)
    assert slept == []
    assert client.handoff({**REQUEST, "deterministic": True}) == BLOB
    posts = [request for request in server.requests if request.method == "POST"]
    assert len(posts) == 2
    for post in posts:
        assert post.headers["prefer"] == "wait"
        assert "idempotency-key" not in post.headers
        assert json.loads(post.body) == REQUEST


# --- the real service


def real_request(url: str, **changes: Any) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/v1/capabilities", timeout=60) as answer:
        caps = json.load(answer)
    return {"prompt": "the red cat", "negative_prompt": "blau", "seed": 2**64 - 1, "guidance": 3.0, "num_steps": 4,
            "height": caps["default_height"], "width": caps["default_width"], "split": 2, "dtype": "float32",
            "model_digest": caps["model"]["digest"], **changes}  # fmt: skip


def test_previews_come_with_the_events(second: Any, tiny_cloud: str) -> None:
    seen: list[dict[str, Any]] = []
    request = real_request(tiny_cloud, preview=True, num_steps=200, split=200)
    client = second.client.SecondClient(tiny_cloud, watch=seen.append)
    second.blob.compare(second.blob.parse(client.handoff(request, 120)), request)
    assert seen[-1]["step"] == 200
    assert any("preview" in status for status in seen)


@pytest.mark.parametrize("versions", [["1.0"], ["1.1"]])
def test_the_real_service_hands_over(second: Any, tiny_cloud: str, versions: list[str]) -> None:
    seen: list[dict[str, Any]] = []
    request = real_request(tiny_cloud, wire_versions=versions)
    blob = second.client.SecondClient(tiny_cloud, watch=seen.append).handoff(request, 120)
    handoff = second.blob.parse(blob)
    second.blob.compare(handoff, request)
    assert handoff.metadata["schema_version"] == versions[0]
    assert set(handoff.arrays) == {"latents", "x0_prev"}
    assert seen[-1]["state"] == "done"


def test_step_0_is_handed_over_as_noise(second: Any, tiny_cloud: str) -> None:
    request = real_request(tiny_cloud, split=0)
    handoff = second.blob.parse(second.client.SecondClient(tiny_cloud).handoff(request, 120))
    latents = handoff.arrays["latents"]
    sigma = handoff.metadata["init_noise_sigma"]
    noise = [value * sigma for value in second.loop.Noise(request["seed"]).draw(math.prod(latents.shape))]
    assert same(latents.values, noise, 2e-6)


@pytest.mark.usefixtures("patient")
def test_a_cancelled_handoff_leaves_no_job(second: Any, tiny_cloud: str) -> None:
    jobs: list[str] = []

    def cancel(status: dict[str, Any]) -> None:
        jobs.append(status["id"])
        raise KeyboardInterrupt

    long = real_request(tiny_cloud, num_steps=100, split=100)
    with pytest.raises(KeyboardInterrupt):
        second.client.SecondClient(tiny_cloud, watch=cancel).handoff(long, 120)
    request = urllib.request.Request(f"{tiny_cloud}/v1/handoffs/{jobs[0]}", headers={"Accept": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["state"] in ("cancelled", "deleted")


def test_the_real_service_refuses(second: Any, tiny_cloud: str) -> None:
    with pytest.raises(second.client.Refused) as caught:
        second.client.SecondClient(tiny_cloud).handoff(real_request(tiny_cloud, sigma=1), 120)
    assert (caught.value.kind, caught.value.field) == ("invalid-request", "sigma")
