"""Serving the application over a socket: `serve(engine, ...)` blocks until SIGINT, SIGTERM or `CloudServer.stop()`.

Port 0 takes a free port; the real one is reported to a callback and, if asked for, to a file, both only once requests
are answered. Plain HTTP is refused on addresses that other machines reach, unless it is asked for by name. TLS uses the
deployment's own certificate and key; none is shipped. Told to stop, the server takes no more connections and the
application no more jobs; those who wait are answered, and what is unfinished then stays in the store.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from latentrelay.cloud.errors import PlaintextRefusedError
from latentrelay.cloud.guarded_protocol import ConnectionLimits, guarded_protocol
from latentrelay.cloud.service_options import ServiceOptions
from latentrelay.cloud.store import Store
from latentrelay.cloud.tokens import Tokens
from latentrelay.runtime.errors import RequestError
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from latentrelay.cloud.engine import Engine

OnReady = Callable[[str, int], None]
_SHUTDOWN_S = 10


class CloudServer:
    """One listening socket and the server behind it. The port is bound, and known, when this is constructed.

    connections: limits of every connection (guarded_protocol.py). shutdown_s: from `stop` to the end at the latest; a
    client that waits for a job gets half of it. drain and refused are called when the server is told to stop, and for
    every connection it refuses; without them the application's own service is told.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        insecure: bool = False,
        certfile: str | os.PathLike[str] | None = None,
        keyfile: str | os.PathLike[str] | None = None,
        shutdown_s: int = _SHUTDOWN_S,
        connections: ConnectionLimits | None = None,
        drain: Callable[[float], None] | None = None,
        refused: Callable[[str], None] | None = None,
    ) -> None:
        secure = _check_transport(host, insecure, certfile, keyfile)
        self.app = app
        service = getattr(getattr(app, "state", None), "service", None)
        config = uvicorn.Config(
            app,
            http=guarded_protocol(connections or ConnectionLimits(), refused or _told(service, "metrics", "refused")),
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=shutdown_s,
            ssl_certfile=certfile,
            ssl_keyfile=keyfile,
        )
        _load(config)
        self._socket = _bound(host, port)
        self.port: int = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if secure else 'http'}://{shown}:{self.port}"
        self._server = _Announcing(config)
        self._server.on_stopping = partial(drain or _told(service, "drain"), shutdown_s / 2)
        self._stopped = False

    def run(self, on_ready: OnReady | None = None) -> None:
        """Answer requests until told to stop; `on_ready(url, port)` is called when the first can be answered."""
        self._server.on_started = (lambda: on_ready(self.url, self.port)) if on_ready else None
        with self._socket:
            if not self._stopped:
                self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End `run` from another thread: no new connections, what runs may finish within the shutdown time."""
        self._stopped = True
        self._server.should_exit = True


def serve(
    engine: Engine | Callable[[], Engine],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    tokens: Tokens | None = None,
    store: Store | None = None,
    service: ServiceOptions | None = None,
    connections: ConnectionLimits | None = None,
    insecure: bool = False,
    certfile: str | os.PathLike[str] | None = None,
    keyfile: str | os.PathLike[str] | None = None,
    port_file: str | os.PathLike[str] | None = None,
    on_ready: OnReady | None = None,
) -> None:
    """Serve `engine` until a signal. `port_file` gets the port in decimal and is removed at the end.

    A function instead of an engine is called once the address, the certificate and the port file's folder have been
    checked, so that a mistake in them shows before a model is loaded. Raises PlaintextRefusedError (exit status 3) for
    plain HTTP off loopback without `insecure`, RequestError for half a certificate pair, one that cannot be read, an
    address that cannot be taken, or a port file that cannot be written.
    """
    check_port_file(port_file)
    if callable(engine):
        check_address(host, port, insecure=insecure, certfile=certfile, keyfile=keyfile)
        engine = engine()
    from latentrelay.cloud.app import create_app  # torch: not for a process that only passes requests on

    app = create_app(engine, token=token, tokens=tokens, store=store, service=service or ServiceOptions())
    server = CloudServer(
        app, host=host, port=port, insecure=insecure, certfile=certfile, keyfile=keyfile, connections=connections
    )

    def ready(url: str, real_port: int) -> None:
        if port_file is not None:
            _write_port(Path(port_file), real_port)
        if on_ready is not None:
            on_ready(url, real_port)

    try:
        server.run(ready)
    finally:
        if port_file is not None:
            Path(port_file).unlink(missing_ok=True)


def check_address(
    host: str,
    port: int,
    *,
    insecure: bool = False,
    certfile: str | os.PathLike[str] | None = None,
    keyfile: str | os.PathLike[str] | None = None,
) -> None:
    """Raise what `serve` would raise for this address and certificate; serves nothing, the port is free again after."""
    if _check_transport(host, insecure, certfile, keyfile) and certfile is not None:
        with _readable_pair():
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    _bound(host, port).close()


def check_port_file(port_file: str | os.PathLike[str] | None) -> None:
    """Raise RequestError where the file could not be written once requests are answered; writes nothing that stays."""
    if port_file is None:
        return
    path = Path(port_file)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()
    except (OSError, ValueError) as error:
        raise RequestError(
            "the port file cannot be written",
            got=f"{path} ({getattr(error, 'strerror', None) or error})",
            expected="a file's name in a folder that is there and may be written",
            do="Make the folder, or choose another.",
        ) from error


class _Announcing(uvicorn.Server):
    """uvicorn's server, with calls once it has started and before it stops; signals end `run`, not the process."""

    on_started: Callable[[], None] | None = None
    on_stopping: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.on_started is not None:
            self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.on_stopping is not None:
            self.on_stopping()
        await super().shutdown(sockets=sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Like uvicorn's, but the signal is not raised again afterwards, so that what follows `run` still happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.signal(each, self.handle_exit) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_transport(host: str, insecure: bool, certfile: object, keyfile: object) -> bool:
    if (certfile is None) != (keyfile is None):
        raise RequestError(
            "half of a TLS pair was given", expected="both a certificate and a key", do="Give the other."
        )
    if certfile is None and not insecure and not is_loopback(host):
        raise PlaintextRefusedError(
            "plain HTTP would carry prompts and tokens in the clear",
            got=f"address {host}",
            expected="a loopback address, or a certificate and a key",
            do="Give --cert and --key, or --insecure where another proxy ends TLS.",
        )
    return certfile is not None


def _told(part: object, *names: str) -> Callable[..., None]:
    """The method `part.a.b` of the application's service, or nothing to call where there is none."""
    for name in names:
        part = getattr(part, name, None)
    return part if callable(part) else lambda *_: None


def _load(config: uvicorn.Config) -> None:
    """Read the certificate and build the application's wrappers now, before the port is taken."""
    with _readable_pair():
        config.load()


@contextmanager
def _readable_pair() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # ssl.SSLError is one
        raise RequestError(
            "the TLS certificate or key cannot be read",
            got=str(error),
            expected="PEM files that belong together",
            do="Check both paths.",
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        raise RequestError(
            "the address cannot be taken",
            got=f"{host} port {port} ({error})",
            expected="a free port of this machine",
            do="Use port 0 for any free port.",
        ) from error


def _write_port(path: Path, port: int) -> None:
    """Whole or not at all: whoever polls the file never reads half a number."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(f"{port}\n")
    os.replace(name, path)
