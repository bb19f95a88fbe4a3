"""Sockets: a free port that is reported, no plain HTTP off loopback, TLS with one's own key, an orderly end."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from latentrelay.cloud.app import create_app
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.errors import PlaintextRefusedError
from latentrelay.cloud.serve import CloudServer, check_address, is_loopback, serve
from latentrelay.runtime.errors import RequestError

START = Callable[..., CloudServer]


def test_port_zero_takes_a_free_port(engine: Engine, start: START) -> None:
    first, second = start(engine), start(engine)
    assert first.port != second.port
    assert min(first.port, second.port) > 0
    for server in (first, second):
        assert server.url == f"http://127.0.0.1:{server.port}"
        assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::", ""])
def test_plaintext_is_refused_off_loopback(engine: Engine, host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(PlaintextRefusedError, match="plain HTTP would carry prompts") as caught:
        serve(engine, host=host, port=0)
    assert caught.value.exit_status == 3


def test_insecure_allows_it(engine: Engine, start: START) -> None:
    server = start(engine, host="0.0.0.0", insecure=True)
    assert httpx.get(f"http://127.0.0.1:{server.port}/healthz").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


def test_a_taken_port_and_half_a_pair_are_misuse(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(RequestError, match="cannot be taken") as caught:
            serve(engine, port=taken.getsockname()[1])
        assert caught.value.exit_status == 2
    with pytest.raises(RequestError, match="half of a TLS pair"):
        serve(engine, port=0, certfile="cert.pem")
    with pytest.raises(RequestError, match="TLS certificate or key cannot be read"):
        serve(engine, port=0, certfile="cert.pem", keyfile="key.pem")


def test_a_mistake_in_the_address_shows_before_a_model_is_loaded(tmp_path: Path) -> None:
    def load() -> Engine:
        raise AssertionError("the model was loaded")

    (tmp_path / "cert.pem").write_text("no certificate")
    pair = {"certfile": tmp_path / "cert.pem", "keyfile": tmp_path / "cert.pem"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for options, message in (
            ({"port": taken.getsockname()[1]}, "cannot be taken"),
            ({"port": 0, "host": "0.0.0.0"}, "plain HTTP"),
            ({"port": 0, "certfile": "cert.pem"}, "half of a TLS pair"),
            ({"port": 0, **pair}, "cannot be read"),
            ({"port": 0, "port_file": tmp_path / "nope" / "f"}, "port file cannot be written.*No such file"),
            ({"port": 0, "port_file": tmp_path}, "port file cannot be written.*directory"),
            ({"port": 0, "port_file": tmp_path / "cert.pem" / "f"}, "port file cannot be written.*Not a directory"),
        ):
            with pytest.raises((RequestError, PlaintextRefusedError), match=message):
                serve(load, **options)


def test_the_port_is_free_again_after_the_check(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check_address("127.0.0.1", port)
    server = CloudServer(create_app(engine), port=port)
    server.stop()
    server.run()
    assert server.port == port


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with the openssl command")
def test_tls_with_ones_own_certificate(engine: Engine, start: START, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    server = start(engine, certfile=str(cert), keyfile=str(key))
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(f"{server.url}/healthz", verify=context).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{server.port}/healthz")


def test_stopping_ends_a_run_between_two_steps(tiny: Any, tmp_path: Path) -> None:
    engine = Engine(tiny.make_pipeline(tmp_path), name="tiny")
    server = CloudServer(create_app(engine), shutdown_s=1)
    ready = threading.Event()
    thread = threading.Thread(target=server.run, args=(lambda url, port: ready.set(),))
    thread.start()
    assert ready.wait(20)
    fields = {"prompt": "", "seed": 0, "height": 128, "width": 128, "num_steps": 200, "split": 200}
    ended: list[str] = []

    def ask() -> None:
        try:
            response = httpx.post(f"{server.url}/v1/handoffs", json=fields, headers={"Prefer": "wait"}, timeout=60)
            ended.append(str(response.status_code))
        except httpx.TransportError as error:
            ended.append(type(error).__name__)

    client = threading.Thread(target=ask)
    client.start()
    try:
        deadline = time.monotonic() + 30
        while server.app.state.service.batcher.load().running == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        server.stop()
        thread.join(30)
        client.join(30)
    assert not thread.is_alive()
    assert ended == ["503"]


SCRIPT = """
import sys
from latentrelay.cloud.engine import Engine
from latentrelay.cloud.serve import serve
serve(Engine.load(sys.argv[1]), port=0, port_file=sys.argv[2], on_ready=lambda url, port: print(url, flush=True))
print("ended", flush=True)
"""


def test_a_process_reports_its_port_and_ends_on_sigterm(tiny: Any, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tiny.make_pipeline(tmp_path / "work"), tmp_path / "folder")
    port_file = tmp_path / "port"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(port_file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout as lines:
        url = lines.readline().strip()
        assert url == f"http://127.0.0.1:{int(port_file.read_text())}"
        assert httpx.get(f"{url}/v1/capabilities").json()["model"]["name"] == str(folder)
        process.send_signal(signal.SIGTERM)
        rest = lines.read()
        process.wait(20)
    assert not port_file.exists()
    assert process.returncode == 0
    assert rest == "ended\n"
