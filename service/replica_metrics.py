"""What this process knows of the vLLM replicas, for Prometheus: read when it is scraped, and labelled by index, which is bounded."""

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from service.replicas import Replica, Replicas

GAUGES: dict[str, tuple[str, Callable[[Replica], float | None]]] = {
    "fastslow_replica_up": ("Whether the replica answers", lambda replica: replica.failures == 0),
    "fastslow_replica_in_flight": ("Requests of this process at the replica", lambda replica: replica.in_flight),
    "fastslow_replica_waiting": (
        "Requests in the replica's own queue at the last look",
        lambda replica: replica.waiting,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[Replica], float]]] = {
    "fastslow_replica_answered": ("Requests that the replica answered", lambda replica: replica.answered),
    "fastslow_replica_failed": ("Requests that failed at the replica", lambda replica: replica.failed),
    "fastslow_replica_passed_over": (
        "Requests that others got, though they were the replica's by affinity",
        lambda replica: replica.passed_over,
    ),
}


class ReplicaStates(Collector):
    """The replicas as metrics."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for name, (told, value) in GAUGES.items():
            gauge = GaugeMetricFamily(name, told, labels=["replica"])
            for replica in self._replicas.all:
                if (known := value(replica)) is not None:
                    gauge.add_metric([str(replica.index)], known)
            yield gauge
        for name, (told, count) in COUNTERS.items():
            counter = CounterMetricFamily(name, told, labels=["replica"])
            for replica in self._replicas.all:
                counter.add_metric([str(replica.index)], count(replica))
            yield counter
