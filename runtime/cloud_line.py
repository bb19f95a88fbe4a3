"""One line to a cloud: an httpx client for one handoff at a time, whose reads can be ended from outside.

httpx bounds each read and not the whole, and a read in another thread cannot be cancelled; so a `Watch` shuts the
line's sockets down when the deadline passes or the caller cancels, whatever the cloud does meanwhile. httpx's errors
become ours here and in async_cloud_client.py, nowhere else.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from latentrelay.runtime.cloud_answers import ALONE, Answer
from latentrelay.runtime.cloud_exchange import Exchange
from latentrelay.runtime.cloud_trust import certificate_error
from latentrelay.runtime.errors import CloudError, CloudProtocolError, CloudUnavailableError

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0
_POLL_S = 0.05


class Line:
    """An httpx client and the sockets it has open. For one thread at a time."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self.client, self.url = client, url
        self._sockets: list[socket.socket] = []

    def ask(self, exchange: Exchange) -> Answer:
        """Make one request. Raises CloudUnavailableError where no answer begins, CloudProtocolError for broken HTTP or
        too much of it; an answer that ends early says so in `cut`."""
        import httpx

        head: tuple[int, dict[str, str]] | None = None
        data = bytearray()
        try:
            with self.client.stream(
                exchange.method,
                self.url + exchange.path,
                content=exchange.body,
                headers=exchange.headers,
                timeout=httpx.Timeout(**waits(exchange)),
                extensions={"trace": self._trace},
            ) as response:
                head = (response.status_code, {key.lower(): value for key, value in response.headers.items()})
                check_head(exchange, *head)
                for chunk in response.iter_raw():
                    if take(exchange, head[0], chunk, data):
                        break
        except CloudError:
            raise
        except Exception as error:
            failure = translated(error, self.url, exchange, begun=head is not None)
            if failure is None:
                raise
            if head is None or not isinstance(failure, CloudUnavailableError):
                raise failure from error
            return Answer(*head, bytes(data), failure)
        return Answer(*head, bytes(data))

    def hang_up(self) -> None:
        """End every read and write under way. From any thread."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # not SSLSocket's own, which is not for other threads

    def close(self) -> None:
        """Close the connections."""
        self.client.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore tells of every connection it opens; there is no other way to its sockets before an answer."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            opened = info["return_value"].get_extra_info("socket")
            self._sockets = [each for each in self._sockets if each.fileno() >= 0]
            if opened is not None:
                self._sockets.append(opened)


class Watch:
    """While it is entered, a thread hangs the line up at `deadline`, or once `cancel()` is true: `.cancelled` says."""

    def __init__(self, line: Line, deadline: float, cancel: Callable[[], bool] | None) -> None:
        self._line, self._deadline, self._cancel = line, deadline, cancel
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="latentrelay-watch", daemon=True)
        self._error: BaseException | None = None
        self.cancelled = False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def pause(self, seconds: float) -> None:
        """Sleep, no longer than until the caller cancels."""
        end = time.monotonic() + seconds
        while not self.cancelled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_S if self._cancel is not None else left))

    def check(self) -> bool:
        """Whether the caller has cancelled; raises what its function raised."""
        if self._error is not None:
            raise self._error
        return self.cancelled

    def _run(self) -> None:
        for _ in self._ticks():
            try:
                self.cancelled = self._cancel is not None and self._cancel()
            except BaseException as error:
                self._error, self.cancelled = error, True
            if self.cancelled or time.monotonic() >= self._deadline:
                break
        while not self._done.is_set():  # again and again: a connection may open meanwhile
            self._line.hang_up()
            self._done.wait(_POLL_S)

    def _ticks(self) -> Iterator[None]:
        while not self._done.is_set():
            yield
            left = max(0.0, self._deadline - time.monotonic())
            self._done.wait(min(left, _POLL_S) if self._cancel is not None else left)


def waits(exchange: Exchange) -> dict[str, float]:
    """httpx's time-outs for an exchange, in seconds."""
    left = max(0.001, exchange.deadline - time.monotonic())
    silence = min(left, exchange.silence_s)
    return {"connect": min(left, CONNECT_S), "read": silence, "write": silence, "pool": left}


def check_head(exchange: Exchange, status: int, headers: dict[str, str]) -> None:
    """Raise CloudProtocolError for a body that will not be read: encoded, or too long by its own words."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise CloudProtocolError("the cloud's answer is encoded", got=encoding, expected="identity")
    length, most = headers.get("content-length", "0"), exchange.most(status)
    if not length.isascii() or not length.isdecimal() or len(length) > 15 or int(length) > most:
        raise CloudProtocolError("the cloud's answer is too large", got=f"{length} bytes", expected=most)


def take(exchange: Exchange, status: int, chunk: bytes, data: bytearray) -> bool:
    """Put a piece of a body where it belongs; whether that is enough. Raises CloudError past limit or deadline."""
    if time.monotonic() > exchange.deadline:
        raise late()
    if exchange.on_bytes is not None and status == 200:
        return exchange.on_bytes(chunk)
    data += chunk
    if len(data) > exchange.most(status):
        raise CloudProtocolError(
            "the cloud's answer is too large", got=f"> {len(data) - 1} bytes", expected=exchange.most(status)
        )
    return False


def late() -> CloudUnavailableError:
    """The error of an answer that was still coming at the deadline."""
    return CloudUnavailableError("the cloud's answer came too slowly", kind="timeout", do=ALONE)


def translated(error: Exception, url: str, exchange: Exchange, begun: bool) -> CloudError | None:
    """httpx's and the operating system's errors as ours; None for what is neither. `begun`: an answer had."""
    import httpx

    untrusted = certificate_error(error, url)
    if untrusted is not None:
        return untrusted
    over = time.monotonic() >= exchange.deadline and isinstance(error, (httpx.HTTPError, OSError))
    if over or isinstance(error, TimeoutError):
        if begun:
            return late()
        waited = f"{url} did not answer in {exchange.deadline_s:g} s"
        return CloudUnavailableError(waited, kind="timeout", do=ALONE)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)):
        return CloudUnavailableError(f"{url} cannot be reached: {error}", kind="unreachable", do=ALONE)
    if isinstance(error, httpx.TimeoutException):
        return CloudUnavailableError(f"{url} was silent for too long", kind="dropped", do=ALONE)
    cut = isinstance(error, httpx.RemoteProtocolError) and ("disconnected" in str(error) or "closed" in str(error))
    if cut or isinstance(error, httpx.NetworkError):
        return CloudUnavailableError(f"the connection to {url} was cut: {error}", kind="dropped", do=ALONE)
    if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
        return CloudProtocolError(f"{url} answered in broken HTTP: {error}", do=ALONE)
    if isinstance(error, OSError):
        return CloudUnavailableError(f"the connection to {url} was cut: {error}", kind="dropped", do=ALONE)
    return None
