"""The device's side of the cloud's HTTP: ask for a handoff, check what comes back, tell apart why it did not.

No answer in time, 5xx, 408, 425 and 429 are CloudUnavailableError (the device can go on alone); other 4xx are
CloudRefusedError (the request is wrong); answers that break the protocol are CloudProtocolError. httpx is imported when
a client is first used. No retries: one request costs the cloud k steps.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from latentrelay.runtime.errors import (
    CloudProtocolError,
    CloudRefusedError,
    CloudUnavailableError,
    MissingExtraError,
    RequestError,
)
from latentrelay.runtime.handoff import DEFAULT_LIMITS, MEDIA_TYPE, Handoff, HandoffLimits
from latentrelay.runtime.handoff_request import HandoffRequest
from latentrelay.runtime.strict_json import read_json

if TYPE_CHECKING:
    import httpx

_BUSY = (408, 425, 429)
_MAX_JSON_BYTES = 2**20
_ALONE = "Check the address and the network, or run all steps on the device."


class CloudClient:
    """A client of one cloud. `transport` is an httpx transport, for tests; `timeout_s` bounds a whole request.

    A bearer token is sent over https, or to a loopback address, only; `insecure=True` lifts that.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        limits: HandoffLimits = DEFAULT_LIMITS,
        insecure: bool = False,
    ) -> None:
        parts = _split_url(url)
        self._loopback = _is_loopback(parts.hostname or "")
        if token is not None and parts.scheme == "http" and not (self._loopback or insecure):
            raise RequestError("a token would cross the network in plain text", got=url, do="Use an https address.")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise RequestError("the token cannot be sent", expected="printable ASCII", do="Choose another token.")
        self.url = url.rstrip("/")
        self._headers = {"User-Agent": "latentrelay", "Accept-Encoding": "identity"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._timeout_s, self._transport, self._limits = timeout_s, transport, limits
        self._client: httpx.Client | None = None

    def __enter__(self) -> CloudClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; the client may be used again."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def capabilities(self) -> dict[str, Any]:
        """What the cloud serves: wire versions, model, samplers, limits. Raises CloudError."""
        document, _ = self._request("GET", "/v1/capabilities", None, "application/json", _MAX_JSON_BYTES)
        capabilities = _json_object(document)
        if capabilities is None:
            raise CloudProtocolError(
                "the capabilities are not a JSON object", do="Check that the address is a cloud's."
            )
        return capabilities

    def handoff(self, request: HandoffRequest) -> Handoff:
        """Have the cloud run its steps; returns the parsed handoff. Raises CloudError, HandoffFormatError.

        Whether it fits a bundle is `Handoff.check`'s to say.
        """
        data, headers = self._request(
            "POST", "/v1/handoffs", request.to_dict(), MEDIA_TYPE, self._limits.max_bytes, {"Prefer": "wait"}
        )
        _check_digests(data, headers)
        return Handoff.from_bytes(data, self._limits)

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        media_type: str,
        max_bytes: int,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        deadline = time.monotonic() + self._timeout_s
        accept = {"Accept": f"{media_type}, application/problem+json", **(headers or {})}
        with self._translated(), self._http().stream(method, self.url + path, json=body, headers=accept) as response:
            ok = response.status_code == 200
            data = _read_body(response, max_bytes if ok else _MAX_JSON_BYTES, deadline)
            if not ok:
                _raise_for(response.status_code, data)
            got = response.headers.get("content-type", "").split(";")[0].strip().lower()
            if got != media_type:
                raise CloudProtocolError("the cloud answered in another media type", got=got, expected=media_type)
            return data, response.headers

    def _http(self) -> httpx.Client:
        if self._client is None:
            try:
                import httpx
            except ImportError as error:
                raise MissingExtraError("httpx", None, purpose="Asking a cloud") from error
            self._client = httpx.Client(
                headers=self._headers,
                timeout=self._timeout_s,
                transport=self._transport,
                trust_env=not self._loopback,  # no proxy stands between a machine and itself
            )
        return self._client

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """httpx's errors become ours, here and nowhere else."""
        self._http()
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise CloudUnavailableError(f"{self.url} did not answer in {self._timeout_s:g} s", do=_ALONE) from error
        except httpx.TransportError as error:
            raise CloudUnavailableError(f"{self.url} cannot be reached: {error}", do=_ALONE) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CloudProtocolError(f"{self.url} answered in broken HTTP: {error}", do=_ALONE) from error


def _split_url(url: str) -> Any:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        parts, port_ok = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok or parts.query or parts.fragment:
        raise RequestError("the cloud's address is not one", got=url, expected="http://host:port or https://host")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_body(response: httpx.Response, max_bytes: int, deadline: float) -> bytes:
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            raise CloudProtocolError("the cloud's answer is too large", got=f"> {size - 1} bytes", expected=max_bytes)
        if time.monotonic() > deadline:
            raise CloudUnavailableError("the cloud's answer came too slowly", do=_ALONE)
    return b"".join(chunks)


def _raise_for(status: int, data: bytes) -> None:
    problem = _json_object(data) or {"detail": data[:200].decode("utf-8", "replace")}
    detail = str(problem.get("detail") or problem.get("title") or "no detail was given").rstrip(".")
    if status in _BUSY or status >= 500:
        raise CloudUnavailableError(f"the cloud cannot serve now ({status}): {detail}", do=_ALONE)
    if 400 <= status < 500:
        raise CloudRefusedError(status, problem)
    raise CloudProtocolError("the cloud answered with an unexpected status", got=status, expected=200)


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        document = read_json(data)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _check_digests(data: bytes, headers: Mapping[str, str]) -> None:
    """ETag holds the sha256 in hex, Repr-Digest (RFC 9530) in base64: at least one must be there, all must be right."""
    digest = hashlib.sha256(data)
    etag = headers.get("etag", "").removeprefix("W/").strip('"')
    members = [member.strip() for member in headers.get("repr-digest", "").split(",")]
    stated = [member for member in members if member.startswith("sha-256=")]
    expected = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    if not etag and not stated:
        raise CloudProtocolError("the cloud sent no digest of its answer", expected="ETag or Repr-Digest")
    if (etag and etag != digest.hexdigest()) or any(member != expected for member in stated):
        raise CloudProtocolError(
            "the cloud's answer differs from its digest",
            got=etag or stated[0],
            expected=digest.hexdigest(),
            do="Ask again; something between here and there alters the bytes.",
        )
