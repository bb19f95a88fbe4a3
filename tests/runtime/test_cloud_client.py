"""The client over a real loopback socket: what it sends, what it checks, and which error says what."""

import base64
import hashlib
import json
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from latentrelay.runtime import MEDIA_TYPE, AsyncCloudClient, CloudClient, HandoffRequest
from latentrelay.runtime.errors import (
    CloudProtocolError,
    CloudRefusedError,
    CloudUnavailableError,
    HandoffFormatError,
    RequestError,
)
from latentrelay.runtime.handoff import HandoffLimits

REQUEST = HandoffRequest("a red circle", height=16, width=16, num_steps=4, split=2, seed=7, guidance=2.0)


def answered(blob: bytes, **changes: str) -> tuple[int, dict[str, str], bytes]:
    digest = hashlib.sha256(blob)
    headers = {
        "Content-Type": MEDIA_TYPE,
        "ETag": f'"{digest.hexdigest()}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:",
    }
    headers.update({key.replace("_", "-"): value for key, value in changes.items()})
    return 200, {key: value for key, value in headers.items() if value}, blob


def test_a_handoff_comes_over(serve: Callable[..., Any], kit: SimpleNamespace) -> None:
    handoff = kit.make_handoff("float16")
    server = serve(lambda *_: answered(handoff.to_bytes()))
    with CloudClient(server.url + "/", token="secret") as client:
        assert client.handoff(REQUEST) == handoff
        assert client.handoff(REQUEST) == handoff
    method, path, headers, body = server.requests[0]
    assert (method, path, headers["prefer"]) == ("POST", "/v1/handoffs", "wait")
    assert headers["accept"] == f"{MEDIA_TYPE}, application/problem+json"
    assert headers["authorization"] == "Bearer secret"
    assert json.loads(body) == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "seed": 7,
        "guidance": 2.0,
        "height": 16,
        "width": 16,
        "num_steps": 4,
        "split": 2,
        "dtype": "float16",
    }


def test_the_request_of_a_bundle_names_what_it_was_built_from(bundle_folder: Any, kit: SimpleNamespace) -> None:
    manifest = kit.make_manifest(bundle_folder)
    request = HandoffRequest.for_bundle(manifest, "p", split=1, negative_prompt="n", seed=3, dtype="float32")
    assert request.to_dict() == {
        "prompt": "p",
        "negative_prompt": "n",
        "seed": 3,
        "guidance": 2.0,
        "height": 16,
        "width": 16,
        "num_steps": 4,
        "split": 1,
        "dtype": "float32",
        "sampler": "dpmsolver++",
        "model_digest": "sha256:" + "ab" * 32,
        "scheduler_digest": "sha256:" + "cd" * 32,
    }


def test_capabilities(serve: Callable[..., Any]) -> None:
    document = b'{"wire_versions":["1.0"]}'
    server = serve(lambda *_: (200, {"Content-Type": "application/json"}, document), capabilities=None)
    with CloudClient(server.url) as client:
        assert client.capabilities() == {"wire_versions": ["1.0"]}
    assert server.requests[0][:2] == ("GET", "/v1/capabilities")
    for data in (b"[]", b"{"):
        answer = (200, {"Content-Type": "application/json"}, data)
        broken = serve(lambda *_, answer=answer: answer, capabilities=None)
        with CloudClient(broken.url) as client, pytest.raises(CloudProtocolError, match="not a JSON object"):
            client.capabilities()


def test_a_refusal_is_told_as_it_came(serve: Callable[..., Any]) -> None:
    problem = {
        "title": "Mismatch",
        "status": 409,
        "detail": "another model",
        "field": "model_digest",
        "got": "sha256:a",
        "expected": "sha256:b",
    }
    server = serve(lambda *_: (409, {"Content-Type": "application/problem+json"}, json.dumps(problem).encode()))
    with CloudClient(server.url) as client, pytest.raises(CloudRefusedError, match="another model") as caught:
        client.handoff(REQUEST)
    assert (caught.value.status, caught.value.problem, caught.value.exit_status) == (409, problem, 3)
    assert "409, model_digest" in str(caught.value)
    assert "got sha256:a, expected sha256:b" in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_without_a_problem_document(serve: Callable[..., Any], status: int) -> None:
    server = serve(lambda *_: (status, {"Content-Type": "text/plain"}, b"no\xff"))
    with CloudClient(server.url) as client, pytest.raises(CloudRefusedError, match="no\ufffd") as caught:
        client.handoff(REQUEST)
    assert caught.value.status == status
    assert ("Check the token (--token" in str(caught.value)) == (status == 401)
    assert ("Change the request" in str(caught.value)) == (status != 401)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_cloud_that_cannot_now_is_unavailable(serve: Callable[..., Any], status: int) -> None:
    server = serve(lambda *_: (status, {}, b'{"detail":"later"}'))
    with CloudClient(server.url) as client, pytest.raises(CloudUnavailableError, match=f"{status}.*later"):
        client.handoff(REQUEST)


CHANGES: list[tuple[dict[str, str], str]] = [
    ({"Content_Type": "text/html"}, "media type"),
    ({"ETag": '"' + "0" * 64 + '"'}, "differs from its digest"),
    ({"Repr_Digest": "sha-256=:AAAA:"}, "differs from its digest"),
    ({"ETag": "", "Repr_Digest": ""}, "no digest"),
    ({"ETag": "", "Repr_Digest": "md5=:AAAA:"}, "no digest"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_answers_that_break_the_protocol(
    serve: Callable[..., Any], kit: SimpleNamespace, changes: dict[str, str], message: str
) -> None:
    server = serve(lambda *_: answered(kit.make_handoff().to_bytes(), **changes))
    with CloudClient(server.url) as client, pytest.raises(CloudProtocolError, match=message):
        client.handoff(REQUEST)


@pytest.mark.parametrize("missing", ["ETag", "Repr_Digest"])
def test_one_digest_is_enough(serve: Callable[..., Any], kit: SimpleNamespace, missing: str) -> None:
    server = serve(lambda *_: answered(kit.make_handoff().to_bytes(), **{missing: ""}))
    with CloudClient(server.url) as client:
        assert client.handoff(REQUEST).meta.seed == 7


def test_an_answer_that_is_no_handoff(serve: Callable[..., Any]) -> None:
    server = serve(lambda *_: answered(b"12345678"))
    with CloudClient(server.url) as client, pytest.raises(HandoffFormatError):
        client.handoff(REQUEST)


def test_too_many_bytes_are_not_read(serve: Callable[..., Any]) -> None:
    server = serve(lambda *_: answered(b"0" * 100_000))
    client = CloudClient(server.url, limits=HandoffLimits(max_bytes=99_999))
    with client, pytest.raises(CloudProtocolError, match="too large"):
        client.handoff(REQUEST)


def test_redirects_are_not_followed(serve: Callable[..., Any]) -> None:
    server = serve(lambda *_: (307, {"Location": "http://127.0.0.1:1/"}, b""))
    with CloudClient(server.url) as client, pytest.raises(CloudProtocolError, match="got 307"):
        client.handoff(REQUEST)


def test_nobody_there_and_nobody_answering(serve: Callable[..., Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with CloudClient(url) as client, pytest.raises(CloudUnavailableError, match="cannot be reached") as caught:
            client.handoff(REQUEST)
        assert caught.value.exit_status == 1
        free.listen()
        with CloudClient(url, timeout_s=0.2) as client, pytest.raises(CloudUnavailableError, match=r"in 0\.2 s"):
            client.handoff(REQUEST)


def test_a_connection_cut_off_midway(serve: Callable[..., Any]) -> None:
    server = serve(lambda *_: (200, {"Content-Type": MEDIA_TYPE, "Content-Length": "500"}, b"half"))
    with CloudClient(server.url, timeout_s=5) as client, pytest.raises(CloudUnavailableError):
        client.handoff(REQUEST)


def test_a_dripping_answer_ends_with_the_time_out(serve: Callable[..., Any]) -> None:
    """Every chunk comes within the time-out of a read; the whole does not."""
    server = serve(lambda *_: answered(b"0" * 40), pause_s=0.05)
    with CloudClient(server.url, timeout_s=0.3) as client, pytest.raises(CloudUnavailableError, match="too slowly"):
        client.handoff(REQUEST)


@pytest.mark.parametrize(
    "url", ["", "localhost:80", "ftp://x", "http://", "http://h:99999", "http://h?q=1", "http://["]
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(RequestError, match="address"):
        CloudClient(url)


@pytest.mark.parametrize("kind", [CloudClient, AsyncCloudClient])
@pytest.mark.parametrize("token", [None, "secret"])
def test_nothing_crosses_a_network_in_plain_text(kind: Any, token: str | None) -> None:
    for url in ("http://example.org", "http://10.0.0.1:80"):
        with pytest.raises(RequestError, match=r"prompts.*plain text.*--insecure") as caught:
            kind(url, token=token)
        assert ("the token" in str(caught.value)) == (token is not None)
        kind(url, token=token, insecure=True)
    for url in ("https://example.org", "http://localhost:1", "http://127.0.0.1", "http://[::1]:5"):
        kind(url, token=token)


@pytest.mark.parametrize("token", ["se\ncret", "secret\r", "sécret"])
def test_a_token_that_no_header_holds_is_refused_unrepeated(token: str) -> None:
    with pytest.raises(RequestError, match="token") as caught:
        CloudClient("http://127.0.0.1:1", token=token)
    assert "cret" not in str(caught.value)
