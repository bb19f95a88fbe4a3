"""The metrics of several replicas as one text: every sample gets the label `replica`, the process id it comes from.

In: exposition texts as the replicas write them. Out: one, for the route /metrics of a service with replicas. Counters
of a replica that has ended are gone with it; rates and sums over `replica` take that as they take any restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families


def merged(texts: Iterable[tuple[str, bytes]]) -> bytes:
    """(replica, its metrics) of each -> the exposition format with the label `replica` on every sample."""
    families: dict[str, Metric] = {}
    for replica, text in texts:
        for family in text_string_to_metric_families(text.decode()):
            target = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                target.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Families(families))
    return generate_latest(registry)


class _Families:
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Those that are not only the times at which counters began."""
        return (each for name, each in self._families.items() if not name.endswith("_created"))
