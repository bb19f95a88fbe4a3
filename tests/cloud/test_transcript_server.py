"""The server's side of the golden transcript, recorded again from the service as it is now.

What may differ is the machine's and the moment's: dates, ids of traces, milliseconds, weights of a random network and
so its digests and latents. Statuses, the headers that the wire promises, media types, the keys of every document and
the metadata of the blob must be the recorded ones.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime import Handoff

WIRE = Path(__file__).parents[1] / "golden/transcript-1/wire"
FACTS = json.loads((WIRE / "transcript.json").read_text(encoding="utf-8"))
PROMISED = (
    "content-type", "location", "latentrelay-job", "retry-after", "idempotency-replayed", "etag", "repr-digest",
    "accept-ranges", "content-range", "traceresponse", "preference-applied",
)  # fmt: skip
NAMES = [each["name"] for each in FACTS["exchanges"]]


def load_transcript() -> ModuleType:
    """tests/transcript.py."""
    path = Path(__file__).parents[1] / "transcript.py"
    spec = importlib.util.spec_from_file_location("transcript", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("transcript", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def again(engine: Engine) -> Any:
    """What the service answers now, by name."""
    transcript = load_transcript()
    server = CloudServer(create_app(engine, token=transcript.TOKEN))
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    try:
        assert ready.wait(60)
        return {each.name: each for each in transcript.record(server.url)}
    finally:
        server.stop()
        thread.join()


@pytest.fixture(scope="module")
def golden() -> Any:
    """What it answered then, by name."""
    transcript = load_transcript()
    return {
        each["name"]: transcript.Exchanged(
            each["name"],
            (WIRE / f"{each['file']}.request").read_bytes(),
            (WIRE / f"{each['file']}.answer").read_bytes(),
            each["cut"],
        )
        for each in FACTS["exchanges"]
    }


@pytest.mark.parametrize("name", NAMES)
def test_status_and_promised_headers(name: str, again: Any, golden: Any) -> None:
    then, now = golden[name], again[name]
    assert now.status == then.status
    promised = [each for each in PROMISED if each in then.headers]
    assert [each for each in promised if each not in now.headers] == []
    for each in ("content-type", "retry-after", "idempotency-replayed", "accept-ranges", "preference-applied"):
        assert now.headers.get(each) == then.headers.get(each)
    if "content-range" in then.headers:
        size = len(again["post-again"].body)
        assert now.headers["content-range"] == {206: f"bytes 500-{size - 1}/{size}", 416: f"bytes */{size}"}[now.status]


@pytest.mark.parametrize("name", ["capabilities", "post", "status", "post-another-body", "post-another-model", "gone"])
def test_documents_have_their_recorded_keys(name: str, again: Any, golden: Any) -> None:
    then, now = json.loads(golden[name].body), json.loads(again[name].body)
    assert set(then) <= set(now)
    if name == "capabilities":  # what only a service with a schedule offers
        then["features"].remove("step_cache")
    for key in ("type", "status", "field", "state", "step", "split", "num_steps", "next_step", "features", "dtypes"):
        if key in then and name != "post":  # a job may have begun meanwhile
            assert (key, now[key]) == (key, then[key])


def test_the_events_end_as_recorded(again: Any, golden: Any) -> None:
    for side in (again, golden):
        *_, last = [each for each in side["events"].body.decode().split("\n\n") if each.startswith("event:")]
        name, number, data = last.split("\n")
        assert name == "event: done"
        assert number.startswith("id: ")
        assert json.loads(data.removeprefix("data: "))["state"] == "done"


def test_the_blob_is_the_recorded_ones_kind(again: Any) -> None:
    whole = again["post-again"].body
    assert again["blob-cut"].body + again["blob-rest"].body == whole
    meta = Handoff.from_bytes(whole).meta.to_dict()
    assert set(meta) == set(FACTS["metadata"])
    own = {"model_digest", "scheduler_digest", "prompt_salt", "prompt_digest", "producer"}
    for key in set(meta) - own:
        assert (key, meta[key]) == (key, FACTS["metadata"][key])


def test_the_golden_parts_make_the_golden_blob(golden: Any) -> None:
    blob = golden["blob-cut"].body + golden["blob-rest"].body
    assert blob == (WIRE / "handoff.safetensors").read_bytes() == golden["post-again"].body
