"""Metrics: what the observers count, and that no client can make up a label."""

from __future__ import annotations

from dataclasses import dataclass

from latentrelay.cloud.metrics import Metrics


@dataclass
class Load:
    waiting: int
    running: int
    limit: int


def value(metrics: Metrics, name: str) -> float:
    found = [line for line in metrics.text().decode().splitlines() if line.startswith(name + " ")]
    return float(found[0].split()[-1])


def test_what_is_counted() -> None:
    metrics = Metrics()
    metrics.step(3, 4, 0.02)
    metrics.step(4, 4, 0.02)
    metrics.joined(0.5)
    metrics.left("done")
    metrics.cache("text", True)
    metrics.cache("text", False)
    metrics.job_accepted(False)
    metrics.job_ended("done", 1.5)
    metrics.job_ended("failed", 1.5)
    metrics.job_recovered()
    metrics.sent(100)
    metrics.load(Load(2, 3, 16))
    metrics.answered("/v1/handoffs", 503, "queue-full")
    metrics.answered("/v1/handoffs", 422, "invalid-request")
    metrics.refused("head-timeout")
    for name, expected in {
        "latentrelay_steps_total": 7,
        "latentrelay_batch_occupancy_sum": 1.75,
        "latentrelay_step_seconds_count": 2,
        "latentrelay_queue_seconds_sum": 0.5,
        'latentrelay_batch_left_total{reason="done"}': 1,
        'latentrelay_cache_total{hit="true",kind="text"}': 1,
        'latentrelay_cache_total{hit="false",kind="text"}': 1,
        'latentrelay_jobs_accepted_total{replayed="false"}': 1,
        'latentrelay_jobs_total{state="done"}': 1,
        'latentrelay_jobs_total{state="failed"}': 1,
        "latentrelay_handoff_seconds_count": 1,
        "latentrelay_jobs_recovered_total": 1,
        "latentrelay_handoff_bytes_total": 100,
        "latentrelay_queue_waiting": 2,
        "latentrelay_queue_running": 3,
        "latentrelay_queue_limit": 16,
        "latentrelay_in_flight": 5,
        'latentrelay_requests_total{route="/v1/handoffs",status="503"}': 1,
        'latentrelay_refusals_total{reason="queue-full"}': 1,
        'latentrelay_refusals_total{reason="head-timeout"}': 1,
    }.items():
        assert value(metrics, name) == expected, name
    assert "invalid-request" not in metrics.text().decode()


def test_labels_stay_few() -> None:
    metrics = Metrics()
    for word in ['a"b', "a\nb", "", "A", "x" * 41, "\u00e9"]:
        metrics.refused(word)
    for number in range(1000):
        metrics.refused(f"word-{number}")
    text = metrics.text().decode()
    assert text.count("latentrelay_refusals_total{") == 65
    assert value(metrics, 'latentrelay_refusals_total{reason="other"}') == 6 + 1000 - 64


def test_services_do_not_add_up() -> None:
    first, second = Metrics(), Metrics()
    first.sent(1)
    assert value(second, "latentrelay_handoff_bytes_total") == 0
