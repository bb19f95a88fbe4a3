"""One HTTP request to make and what it is made with: the seam between the conversation and the clients that drive it.

Also where a caller's address, token, key and trace are checked before anything is sent.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from latentrelay.runtime.cloud_answers import MAX_JSON_BYTES
from latentrelay.runtime.errors import RequestError

_TRACE = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Exchange:
    """One HTTP request to make by `deadline` (monotonic seconds): no more than `max_bytes` of a 2xx answer's body and
    MAX_JSON_BYTES of another's are read, and silence of `silence_s` seconds ends it. With `on_bytes` the body of a 200
    goes there piece by piece, and is not kept; it returns True when it has seen enough."""

    method: str
    path: str
    headers: dict[str, str]
    deadline: float
    silence_s: float
    deadline_s: float = 0.0  # what the deadline was to begin with, for messages
    body: bytes | None = None
    max_bytes: int = MAX_JSON_BYTES
    on_bytes: Callable[[bytes], bool] | None = None

    def most(self, status: int) -> int:
        """How many bytes of a body with this status are read."""
        return self.max_bytes if 200 <= status < 300 else MAX_JSON_BYTES


@dataclass(frozen=True)
class Pause:
    """Seconds to wait before going on."""

    seconds: float


Step = Exchange | Pause


def check_address(url: str, token: str | None, insecure: bool) -> bool:
    """Whether the address is a loopback one. Raises RequestError for what is no http(s) address, plain HTTP to another
    machine (`insecure` allows it), and a token that no header can hold."""
    parts = _split_url(url)
    loopback = _is_loopback(parts.hostname or "")
    if parts.scheme == "http" and not (loopback or insecure):
        raise RequestError(
            f"{'prompts' if token is None else 'prompts and the token'} would cross the network in plain text",
            got=url,
            do="Use an https address, or insecure=True (--insecure) in a network that you trust.",
        )
    if token is not None and not (token.isascii() and token.isprintable()):
        raise RequestError("the token cannot be sent", expected="printable ASCII", do="Choose another token.")
    return loopback


def check_key(key: str) -> str:
    """The idempotency key, 1 to 128 printable ASCII characters. Raises RequestError."""
    if not (1 <= len(key) <= 128 and key.isascii() and key.isprintable()):
        raise RequestError("the idempotency key cannot be sent", expected="1 to 128 printable ASCII characters")
    return key


def check_traceparent(text: str) -> str:
    """A W3C traceparent of version 00. Raises RequestError."""
    if not _TRACE.fullmatch(text):
        raise RequestError("the traceparent is not one", got=text, expected="00-<32 hex>-<16 hex>-<2 hex>")
    return text


def check_deadline(seconds: float) -> float:
    """A positive, finite number of seconds. Raises RequestError."""
    if not 0 < seconds < 10**9:
        raise RequestError("the deadline is out of range", got=seconds, expected="seconds, more than 0")
    return seconds


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
