"""Networks that a plan can name: round trip, bandwidth both ways, and where the figures come from.

In: a name of the table, or "RTT_MS:MBIT". Out: a `Network`; `transfer_ms` says how long a request and its answer take
there. The figures stand for typical users, not for a place: whoever knows their link gives it as two numbers. Loss,
jitter and a radio that has to wake up are not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentrelay.runtime.errors import RequestError

INITIAL_WINDOW = 10 * 1460  # bytes that TCP sends before the first acknowledgement (RFC 6928)
COLD_ROUND_TRIPS = 2  # TCP's handshake and TLS 1.3's, before a request can leave
_MAX_RTT_MS, _MAX_MBIT = 60_000.0, 1e6


@dataclass(frozen=True)
class Network:
    """One link. `rtt_ms` None: there is none. Bandwidths in Mbit/s. `label`: published, estimate, or given."""

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

        A cold connection shakes hands first. What does not fit TCP's first window takes a round trip for every doubling
        of the window, or the bandwidth's time where that is longer. Raises RequestError where there is no link.
        """
        if self.rtt_ms is None:
            raise RequestError("there is no network", got=self.name, expected="a network with a round trip")
        hands = COLD_ROUND_TRIPS * self.rtt_ms if cold else 0.0
        ways = ((up_bytes, self.up_mbit), (down_bytes, self.down_mbit))
        return hands + self.rtt_ms + sum(_sending_ms(size, mbit, self.rtt_ms) for size, mbit in ways)


_WEBPAGETEST = "WebPageTest's connectivity profile"
NETWORKS = {
    each.name: each
    for each in (
        Network("offline", None, 0.0, 0.0, "given", "no network"),
        Network("3g", 300.0, 1.6, 0.768, "published", f'{_WEBPAGETEST} "3G": 1.6 Mbit/s / 768 kbit/s, 300 ms'),
        Network("4g", 70.0, 12.0, 12.0, "published", f'{_WEBPAGETEST} "LTE": 12 Mbit/s, 70 ms'),
        Network(
            "5g",
            40.0,
            166.13,
            21.08,
            "published",
            "Ookla, Growing and Slowing: The State of 5G Worldwide in 2021 (global medians, Q3 2021: 166.13 / 21.08 "
            "Mbit/s); the round trip is an estimate",
        ),
        Network("wifi", 20.0, 30.0, 15.0, "estimate", "Firefox's throttling profile Wi-Fi, 30 / 15 Mbit/s, with 20 ms"),
        Network("lan", 1.0, 1000.0, 1000.0, "estimate", "gigabit Ethernet through one switch"),
    )
}


def parse_network(words: str) -> Network:
    """The network of a name or of "RTT_MS:MBIT", the same bandwidth both ways. Raises RequestError."""
    named = NETWORKS.get(words.strip().lower())
    if named is not None:
        return named
    rtt, colon, mbit = words.partition(":")
    rtt_ms, rate = _number(rtt), _number(mbit)
    if not colon or not 0 <= rtt_ms <= _MAX_RTT_MS or not 0 < rate <= _MAX_MBIT:
        expected = f"{' | '.join(NETWORKS)}, or RTT_MS:MBIT as in 70:12"
        raise RequestError("no such network", got=words, expected=expected)
    return Network(words.strip(), rtt_ms, rate, rate, "given", "the command line")


def _number(words: str) -> float:
    try:
        value = float(words)
    except ValueError:
        return -1.0
    return value if math.isfinite(value) else -1.0


def _sending_ms(size: int, mbit: float, rtt_ms: float) -> float:
    by_bandwidth = 8e-3 * size / mbit
    windows = math.ceil(math.log2(size / INITIAL_WINDOW + 1)) - 1 if size > 0 else 0
    return max(by_bandwidth, windows * rtt_ms)
