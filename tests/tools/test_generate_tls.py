"""`latentrelay generate` with a service that has its operator's certificate: `--ca`, and no silent way around it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")


@pytest.fixture
def cert(tmp_path: Path) -> Path:
    cert = tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key.pem"), "-out", str(cert)]
    subprocess.run([*command, *more], check=True, capture_output=True)
    return cert


@pytest.fixture
def busy_url(cert: Path) -> Iterator[str]:
    """The https address of a service that is not ready: 500 to all."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(HTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that hangs up

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, cert.with_name("key.pem"))
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_an_unknown_certificate_is_no_reason_to_go_on_alone(
    command: Callable[..., Any], tiny_bundle: Path, tmp_path: Path, cert: Path, busy_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    output = tmp_path / "out.png"
    words = ("generate", "-b", tiny_bundle, "-p", "a red cat", "-o", output, "--json", "--cloud", busy_url)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    refused = command(*words)
    assert (refused.status, refused.json["error"]) == (3, "CloudCertificateError")
    assert "certificate" in refused.json["reason"]
    assert "--ca" in refused.json["reason"]
    assert not output.exists()
    reached = command(*words, "--ca", cert).json  # the service is believed, and says 500
    assert (reached["path_taken"], reached["degraded"][0]["why"]) == ("device-fallback", "cloud-broken")
    monkeypatch.setenv("LATENTRELAY_CA", str(cert))
    assert command(*words).json["path_taken"] == "device-fallback"
