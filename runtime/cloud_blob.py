"""A blob that comes in parts: what is there already, what to ask for next, and the check of the whole.

Bytes that came before a connection was cut stay, with the strong ETag they came under; the rest is asked for by Range
with If-Range, so a blob that has changed meanwhile comes whole. The digest is checked over what was put together.
"""

from __future__ import annotations

from latentrelay.runtime.cloud_answers import Answer, check_digests, etag_of, range_start
from latentrelay.runtime.errors import CloudProtocolError
from latentrelay.runtime.handoff import MEDIA_TYPE


class BlobParts:
    """The bytes of one blob so far. `grown` says whether the last answer brought any that were not there yet."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = bytearray()
        self._headers: dict[str, str] = {}
        self._longest = 0
        self.grown = False

    def range_headers(self) -> dict[str, str]:
        """The headers that ask for the rest; empty where the whole is to be asked for."""
        if not self._bytes:
            return {}
        return {"Range": f"bytes={len(self._bytes)}-", "If-Range": self._headers["etag"]}

    @property
    def room(self) -> int:
        """How many more bytes may come."""
        return self._max_bytes - len(self._bytes)

    def drop(self) -> None:
        """Begin anew."""
        self._bytes.clear()

    def take(self, answer: Answer) -> bytes | None:
        """The whole blob where this 200 or 206 completes it, else None. Raises CloudProtocolError for another media
        type, and for a whole answer that differs from its digest."""
        if answer.status == 206:
            if not self._continues(answer):
                self.drop()
                return None
        elif answer.media_type != MEDIA_TYPE:
            raise CloudProtocolError(
                "the cloud answered in another media type", got=answer.media_type, expected=MEDIA_TYPE
            )
        else:
            self.drop()
            self._headers = dict(answer.headers)
        self._bytes += answer.data
        self.grown = len(self._bytes) > self._longest
        self._longest = max(self._longest, len(self._bytes))
        if answer.cut is not None:
            if etag_of(self._headers) is None:
                self.drop()  # without a strong ETag nothing says that the rest would belong to it
            return None
        return self._whole(resumed=answer.status == 206)

    def _continues(self, answer: Answer) -> bool:
        """Whether a 206 brings what was asked for, of the same blob."""
        start = range_start(answer.headers)
        same = answer.headers.get("etag") == self._headers.get("etag")
        return start is not None and start[0] == len(self._bytes) and start[1] <= self._max_bytes and same

    def _whole(self, resumed: bool) -> bytes | None:
        whole = bytes(self._bytes)
        try:
            check_digests(whole, self._headers)
        except CloudProtocolError:
            self.drop()
            if resumed:
                return None  # once more, in one piece
            raise
        return whole
