"""Both clients against the service with an operator's own certificate: believed when it is given, refused when not."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.serve import CloudServer
from latentrelay.runtime import AsyncCloudClient, CloudClient, Handoff, HandoffRequest
from latentrelay.runtime.errors import CloudCertificateError, RequestError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
REQUEST = HandoffRequest("a cat", height=16, width=16, num_steps=4, split=2, seed=1)
Ask = Callable[..., tuple[Handoff, int]]


def by_sync(url: str, **options: Any) -> tuple[Handoff, int]:
    with CloudClient(url, timeout_s=120, **options) as client:
        return client.handoff(REQUEST), client.attempts


def by_async(url: str, **options: Any) -> tuple[Handoff, int]:
    async def talk() -> tuple[Handoff, int]:
        async with AsyncCloudClient(url, timeout_s=120, **options) as client:
            return await client.handoff(REQUEST), client.attempts

    return asyncio.run(talk())


@pytest.fixture(params=[by_sync, by_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ask:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    asked: Ask = request.param
    return asked


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str, str], tuple[Path, Path]]:
    """`made(name, subject_alt_name)`: a self-signed certificate and its key."""

    def make(name: str, names: str) -> tuple[Path, Path]:
        cert, key = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
        more = ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(cert)]
        subprocess.run([*command, *more], check=True, capture_output=True)
        return cert, key

    return make


def test_the_operators_certificate(
    engine: Engine, start: Callable[..., CloudServer], made: Any, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = made("mine", "IP:127.0.0.1")
    other, _ = made("other", "IP:127.0.0.1")
    url = start(engine, certfile=str(cert), keyfile=str(key)).url
    handoff, attempts = ask(url, ca_file=cert)
    assert (handoff.meta.next_step, attempts) == (2, 1)
    for options in ({}, {"ca_file": other}):
        with pytest.raises(CloudCertificateError, match=r"certificate of https://127.*--ca") as caught:
            ask(url, **options)
        assert caught.value.exit_status == 3
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    assert ask(url)[0].meta.next_step == 2
    with pytest.raises(CloudCertificateError):
        ask(url, ca_file=other)  # what is given goes before what is around


def test_a_certificate_of_another_name(engine: Engine, start: Callable[..., CloudServer], made: Any, ask: Ask) -> None:
    cert, key = made("named", "DNS:cloud.example")
    url = start(engine, certfile=str(cert), keyfile=str(key)).url
    with pytest.raises(CloudCertificateError, match="127"):
        ask(url, ca_file=cert)


@pytest.mark.parametrize("kind", [CloudClient, AsyncCloudClient])
def test_a_file_without_certificates(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(RequestError, match=rf"certificates cannot be read.*{name}"):
            kind("https://127.0.0.1:1", ca_file=tmp_path / name)
