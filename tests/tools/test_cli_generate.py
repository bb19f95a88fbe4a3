"""`latentrelay generate`: alone, with a cloud, with one that is gone, and with handoffs that are not what was asked."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from latentrelay.runtime import MEDIA_TYPE, Bundle, CloudClient, HandoffRequest
from PIL import Image

Run = Callable[..., Any]
STAGES = {"handoff", "load", "text_encoder", "steps", "first_step", "decode", "total"}


@pytest.fixture
def paint(command: Run, tiny_bundle: Path, tmp_path: Path) -> Run:
    """`paint(*more)`: the picture of one prompt and seed, in tmp_path/out.png."""

    def run(*more: object) -> Any:
        output = tmp_path / "out.png"
        return command("generate", "-b", tiny_bundle, "-p", "a red cat", "--seed", 7, "-o", output, "--json", *more)

    return run


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def test_alone(paint: Run, tmp_path: Path, tiny_bundle: Path) -> None:
    done = paint()
    document = done.json
    assert (done.status, document["path_taken"], document["handoff_bytes"]) == (0, "device", 0)
    assert document["steps"] == {"cloud": 0, "device": 25}
    assert set(document["ms"]) == STAGES
    assert document["ms"]["total"] >= document["ms"]["steps"] > 0
    assert document["image"] == str(tmp_path / "out.png")
    assert document["bundle_digest"] == Bundle.open(tiny_bundle, verify=False).digest
    assert document["fallback_reason"] is None
    first = pixels(tmp_path / "out.png")
    assert first.shape == (16, 16, 3)
    assert first.std() > 1
    paint("--seed", 8)
    assert np.abs(pixels(tmp_path / "out.png") - first).max() > 8


def test_with_a_cloud(paint: Run, tiny_cloud: str, tmp_path: Path) -> None:
    paint()
    alone = pixels(tmp_path / "out.png")
    document = paint("--cloud", tiny_cloud, "--split", 10, "--wire-dtype", "float32").json
    assert (document["path_taken"], document["steps"]) == ("hybrid", {"cloud": 10, "device": 15})
    assert np.abs(pixels(tmp_path / "out.png") - alone).max() <= 1
    half = paint("--cloud", tiny_cloud).json
    assert half["steps"] == {"cloud": 12, "device": 13}
    assert 0 < half["handoff_bytes"] < document["handoff_bytes"]
    assert half["ms"]["handoff"] > 0
    every = paint("--cloud", tiny_cloud, "--split", 25).json
    assert (every["path_taken"], every["steps"]) == ("cloud", {"cloud": 25, "device": 0})


def test_for_people(command: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = command("generate", "-b", tiny_bundle, "-p", "a red cat", "-o", tmp_path / "a.png")
    assert done.status == 0
    assert "device, 0 steps in the cloud, 25 here" in done.out


def test_a_cloud_that_is_gone(paint: Run, dead_url: str, tmp_path: Path) -> None:
    document = paint("--cloud", dead_url).json
    assert (document["path_taken"], document["steps"]) == ("device-fallback", {"cloud": 0, "device": 25})
    assert dead_url in document["fallback_reason"]
    (tmp_path / "out.png").unlink()
    done = paint("--cloud", dead_url, "--no-fallback")
    assert (done.status, done.json["error"], done.json["ok"]) == (1, "CloudUnavailableError", False)
    assert not (tmp_path / "out.png").exists()


def test_plain_http_to_another_machine_has_to_be_asked_for(paint: Run, tmp_path: Path) -> None:
    url = "http://192.0.2.1:9"  # TEST-NET-1: there is nobody
    done = paint("--cloud", url)
    assert (done.status, done.json["error"]) == (2, "RequestError")
    assert "plain text" in done.json["reason"]
    assert not (tmp_path / "out.png").exists()
    assert paint("--cloud", url, "--insecure", "--cloud-deadline", 0.2).json["path_taken"] == "device-fallback"


def test_a_cloud_of_another_model(
    paint: Run, tiny: Any, serve_cloud: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    with serve_cloud(tiny.make_pipeline(tmp_path / "work", seed=1), name="other") as url:
        done = paint("--cloud", url)
    assert (done.status, done.json["error"], done.json["status"]) == (3, "CloudRefusedError", "409")
    assert "model_digest" in done.json["reason"]


@contextmanager
def replaying(data: bytes) -> Iterator[str]:
    """A server of version 1.0 that answers every request with `data` as a handoff, its digest right."""
    digest = hashlib.sha256(data).digest()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("application/json", b'{"wire_versions":["1.0"]}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._answer(MEDIA_TYPE, data, f"sha-256=:{base64.b64encode(digest).decode()}:")

        def _answer(self, media_type: str, body: bytes, digest: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            if digest is not None:
                self.send_header("Repr-Digest", digest)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("sampler", "spoil", "error", "words"),
    [
        (None, lambda data: data[:-5], "HandoffFormatError", "malformed"),
        (None, lambda data: data[:-2] + np.array(np.nan, "<f2").tobytes(), "HandoffFormatError", "not finite"),
        ("ddim", lambda data: data, "HandoffMismatchError", "scheduler_class"),
        (None, lambda data: data.replace(b"sha256:", b"sha256;"), "HandoffMismatchError", "model_digest"),
    ],
    ids=["truncated", "nan", "another scheduler", "another model"],
)
def test_a_handoff_that_does_not_fit(
    sampler: str | None,
    spoil: Callable[[bytes], bytes],
    error: str,
    words: str,
    paint: Run,
    tiny_bundle: Path,
    tiny_cloud: str,
) -> None:
    split = {"split": 10, "seed": 7}
    manifest = Bundle.open(tiny_bundle, verify=False).manifest
    request: dict[str, Any] = HandoffRequest.for_bundle(manifest, "a red cat", **split).to_dict()
    if sampler:
        request |= {"sampler": sampler, "scheduler_digest": None}
    with CloudClient(tiny_cloud) as client:
        data = client.handoff(HandoffRequest(**request)).to_bytes()
    with replaying(data) as url:  # the server itself is not what is refused
        if sampler is None:
            assert paint("--cloud", url, "--split", 10).status == 0
    with replaying(spoil(data)) as url:
        done = paint("--cloud", url, "--split", 10)
    assert (done.status, done.json["error"], done.json["ok"]) == (3, error, False)
    assert words in done.json["reason"]


def test_a_spoilt_bundle_is_refused(command: Run, tmp_path: Path) -> None:
    done = command("generate", "-b", tmp_path, "-p", "x", "-o", tmp_path / "a.png", "--json")
    assert (done.status, done.json["error"]) == (3, "ManifestError")


def test_a_split_without_a_cloud_is_misuse(paint: Run) -> None:
    done = paint("--split", 5)
    assert (done.status, done.json["error"]) == (2, "RequestError")
    assert paint("--cloud", "ftp://example", "--split", 5).status == 2
    assert paint("--cloud", "http://127.0.0.1:9", "--split", 26).status == 2


def test_as_a_process_without_torch(process: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    done = process(
        "generate",
        "-b",
        tiny_bundle,
        "-p",
        "a red cat",
        "-o",
        tmp_path / "a.png",
        "--json",
        without=("torch", "diffusers", "transformers", "onnx"),
    )
    assert done.status == 0, done.err
    assert done.json["path_taken"] == "device"
    assert (tmp_path / "a.png").stat().st_size > 100
