"""Networks that a plan can name: round trip, bandwidth both ways, and where the figures come from.

In: a name of the table, or "RTT_MS:MBIT". Out: a `Network`; `transfer_ms` says how long a request and its answer take
there. The figures are of typical users, not of a place: whoever knows their link gives it as two numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentrelay.runtime.errors import RequestError

INITIAL_WINDOW = 10 * 1460  # bytes that TCP sends before the first acknowledgement (RFC 6928)
COLD_ROUND_TRIPS = 2  # TCP's handshake and TLS 1.3's, before the request leaves


@dataclass(frozen=True)
class Network:
    """One link. `rtt_ms` None: there is none. Bandwidths in Mbit/s; `label` is published or estimate, or given."""

    name: str
    rtt_ms: float | None
    down_mbit: float
    up_mbit: float
    label: str
    source: str

    @property
    def connected(self) -> bool:
        """Whether a cloud can be reached at all."""
        return self.rtt_ms is not None

    def transfer_ms(self, up_bytes: int, down_bytes: int, *, cold: bool = True) -> float:
        """Milliseconds that one request of `up_bytes` and its answer spend on the way, the server's own time apart.

        A cold connection shakes hands first. What does not fit TCP's first window costs round trips while the window
        doubles, or the bandwidth's time where that is longer. Raises RequestError where there is no link.
        """
        if self.rtt_ms is None:
            raise RequestError("there is no network", got=self.name, expected="a network with a round trip")
        hands = COLD_ROUND_TRIPS * self.rtt_ms if cold else 0.0
        ways = ((up_bytes, self.up_mbit), (down_bytes, self.down_mbit))
        return hands + self.rtt_ms + sum(_sending_ms(size, mbit, self.rtt_ms) for size, mbit in ways)


_SPEEDTEST = "Speedtest Global Index (Ookla), medians of mobile and fixed users, 2024"
_OPENSIGNAL = "Opensignal, The State of Mobile Network Experience, latency by generation"
NETWORKS = {
    each.name: each
    for each in (
        Network("offline", None, 0.0, 0.0, "given", "no network"),
        Network("3g", 100.0, 4.0, 1.0, "estimate", "HSPA in the field; Lighthouse calls 1.6 Mbit/s, 150 ms slow 4G"),
    )
}


def parse_network(words: str) -> Network:
    """The network of a name or of "RTT_MS:MBIT" (both ways alike). Raises RequestError."""
    raise NotImplementedError


def _sending_ms(size: int, mbit: float, rtt_ms: float) -> float:
    by_bandwidth = 8e-3 * size / mbit
    windows = math.ceil(math.log2(size / INITIAL_WINDOW + 1)) - 1 if size > 0 else 0
    return max(by_bandwidth, windows * rtt_ms)
