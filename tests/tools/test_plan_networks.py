"""Networks by name and by numbers, and what a request and its answer take on the way."""

from __future__ import annotations

import pytest
from latentrelay.runtime.errors import RequestError
from latentrelay.tools.networks import INITIAL_WINDOW, NETWORKS, Network, parse_network

SLOW = Network("slow", 100.0, 1.0, 1.0, "given", "a test")


def test_every_network_says_where_its_figures_come_from() -> None:
    assert list(NETWORKS) == ["offline", "3g", "4g", "5g", "wifi", "lan"]
    for network in NETWORKS.values():
        assert network.label in ("published", "estimate", "given")
        assert network.source
        assert network.connected == (network.name != "offline")


def test_a_network_of_ones_own_is_two_numbers() -> None:
    network = parse_network("70:12.5")
    assert (network.rtt_ms, network.down_mbit, network.up_mbit, network.label) == (70.0, 12.5, 12.5, "given")
    assert parse_network("4G") is NETWORKS["4g"]


@pytest.mark.parametrize("words", ["6g", "", "70", "70:", ":12", "70:0", "-1:12", "70:inf", "nan:1", "70:12:3"])
def test_what_is_no_network_is_refused_with_what_there_is(words: str) -> None:
    with pytest.raises(RequestError, match=r"offline \| 3g .* RTT_MS:MBIT"):
        parse_network(words)


def test_a_small_exchange_takes_its_round_trips_and_its_bandwidth() -> None:
    # Two handshakes and the request itself, 1,000 bytes each way at 1 Mbit/s: 8 ms each.
    assert SLOW.transfer_ms(1000, 1000) == pytest.approx(3 * 100 + 16)
    assert SLOW.transfer_ms(1000, 1000, cold=False) == pytest.approx(100 + 16)


def test_what_exceeds_tcps_first_window_waits_for_acknowledgements() -> None:
    fast = Network("fast", 100.0, 1e6, 1e6, "given", "a test")
    assert fast.transfer_ms(10, INITIAL_WINDOW, cold=False) == pytest.approx(100, abs=0.01)
    assert fast.transfer_ms(10, INITIAL_WINDOW + 1, cold=False) == pytest.approx(200, abs=0.01)
    assert fast.transfer_ms(10, 3 * INITIAL_WINDOW, cold=False) == pytest.approx(200, abs=0.01)
    assert fast.transfer_ms(10, 3 * INITIAL_WINDOW + 1, cold=False) == pytest.approx(300, abs=0.01)


def test_offline_carries_nothing() -> None:
    with pytest.raises(RequestError, match="no network"):
        NETWORKS["offline"].transfer_ms(1, 1)
