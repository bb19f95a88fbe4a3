"""A cache by content: values under a digest of what made them, the least recently used dropped first, bounded by bytes
and, where it is wanted, by age.

The digest is keyed with bytes of this process, so a key that leaks says nothing of the text behind it; the text itself
is not kept.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import threading
import time
from collections import OrderedDict
from typing import Generic, TypeVar

from latentrelay.runtime.digest import canonical_json

T = TypeVar("T")
_SECRET = secrets.token_bytes(32)


def content_key(content: object) -> bytes:
    """32 bytes that stand for a JSON document in this process and in no other."""
    return hashlib.blake2b(canonical_json(content), key=_SECRET, digest_size=32).digest()


class ContentCache(Generic[T]):
    """At most `max_bytes` of values by key, none older than `max_age_s`. Safe from any thread."""

    def __init__(self, max_bytes: int, max_age_s: float = math.inf) -> None:
        self.max_bytes, self.max_age_s = max_bytes, max_age_s
        self._held: OrderedDict[bytes, tuple[T, int, float]] = OrderedDict()  # and when it was put
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> T | None:
        """The value, which counts as used now, or None."""
        with self._lock:
            if key not in self._held:
                return None
            value, _, since = self._held[key]
            if time.monotonic() - since >= self.max_age_s:
                self._drop(key)
                return None
            self._held.move_to_end(key)
            return value

    def put(self, key: bytes, value: T, size: int) -> None:
        """Keep a value of `size` bytes; what was used longest ago makes room. One over `max_bytes` is not kept."""
        with self._lock:
            if key in self._held:
                self._drop(key)
            if size > self.max_bytes:
                return
            self._held[key] = (value, size, time.monotonic())
            self._bytes += size
            while self._bytes > self.max_bytes:
                self._bytes -= self._held.popitem(last=False)[1][1]

    def drop(self, prefix: bytes) -> None:
        """Forget every value whose key begins so."""
        with self._lock:
            for key in [each for each in self._held if each.startswith(prefix)]:
                self._drop(key)

    def drop_old(self) -> float | None:
        """Forget what is too old; seconds until the next will be, None where nothing is kept."""
        with self._lock:
            now = time.monotonic()
            for key in [each for each, (_, _, since) in self._held.items() if now - since >= self.max_age_s]:
                self._drop(key)
            first = min((since for _, _, since in self._held.values()), default=None)
            return None if first is None else max(0.0, first + self.max_age_s - now)

    def _drop(self, key: bytes) -> None:
        self._bytes -= self._held.pop(key)[1]

    @property
    def held_bytes(self) -> int:
        """Bytes of the values that are kept now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._held)
