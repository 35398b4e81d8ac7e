"""What a gateway tells Prometheus for those that it can't ask: workers, who count in Redis, and Redis itself.

Every gateway reads the same, so a query takes the maximum over gateways, never the sum.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.errors import StoreUnavailable
from service.store import Store
from service.store.backlog import Memory, Queue

Sorted = Mapping[str, Mapping[str, float]]
"""name -> label -> how often, how long, or how much."""

COUNTED = {
    "optimize": ("optimizations", "Optimizations of users' contexts by how they ended", "outcome"),
    "optimize_without": ("optimizations_without", "Optimizations that had to do without a helper", "missing"),
    "consolidate": ("consolidations", "Consolidations by how they ended: promoted, rejected, failed", "outcome"),
    "move": ("pointer_moves", "Moves of a scope's pointer: promote, rollback, quarantine", "action"),
    "undone": ("background_undone", "Users, scopes and versions that a background task could not deal with", "task"),
}
"""Name in Redis -> name, help and label of the counter."""
KL = {
    "kl": (
        "promoted_kl_nats",
        "95 % bound of the KL to the base, nats per token, of the version that a job promoted last",
    ),
    "kl_budget": ("promoted_kl_budget_nats", "The KL budget that it had to keep, nats per token"),
}


@dataclass(eq=False)
class StoredMetrics(Collector):
    """What Redis held when it was read last."""

    counted: Mapping[tuple[str, str], float] = field(default_factory=dict)
    queues: Mapping[str, Queue] = field(default_factory=dict)
    memory: Memory | None = None
    up: bool = False

    async def refresh(self, store: Store, *, now: float) -> None:
        """Read all of it; with Redis away what was counted stays as it was read last."""
        self.up, self.queues, self.memory = False, {}, None
        try:
            self.counted = await store.counts.read()
            self.queues = await store.backlog.queues(now=now)
            self.memory = await store.backlog.memory()
            self.up = True
        except StoreUnavailable:
            # Said by `fastslow_redis_up`.
            return

    def collect(self) -> Iterator[Metric]:
        found: dict[str, dict[str, float]] = {}
        for (name, label), amount in self.counted.items():
            found.setdefault(name, {})[label] = amount
        yield from _counters(found)
        yield from _consolidations(found)
        yield from self._gauges(found)

    def _gauges(self, found: Sorted) -> Iterator[Metric]:
        sweep = GaugeMetricFamily(
            "fastslow_last_sweep_timestamp_seconds", "When due scopes were looked for last, seconds since the epoch"
        )
        for at in found.get("sweep", {}).values():
            sweep.add_metric([], at)
        yield sweep
        yield _by_queue("waiting", "What waits for a worker, by queue", self.queues, lambda q: q.waiting)
        yield _by_queue(
            "oldest_seconds", "How long the first of it has waited", self.queues, lambda q: q.oldest_seconds
        )
        yield GaugeMetricFamily("fastslow_redis_up", "Whether Redis answered this scrape", value=int(self.up))
        if self.memory is not None:
            used, limit, share = self.memory.used, self.memory.limit, self.memory.fullest
            yield GaugeMetricFamily("fastslow_redis_memory_bytes", "Memory that Redis uses", value=used)
            yield GaugeMetricFamily("fastslow_redis_memory_limit_bytes", "Memory that Redis may use", value=limit)
            yield GaugeMetricFamily(
                "fastslow_redis_fullest_share", "Share of its memory that the fullest node uses", value=share
            )


def _counters(found: Sorted) -> Iterator[Metric]:
    for key, (name, told, label) in COUNTED.items():
        family = CounterMetricFamily(f"fastslow_{name}", told, labels=[label])
        for value, times in found.get(key, {}).items():
            family.add_metric([value], times)
        yield family


def _consolidations(found: Sorted) -> Iterator[Metric]:
    seconds, times = found.get("stage_seconds", {}), found.get("stages", {})
    stages = SummaryMetricFamily(
        "fastslow_consolidation_stage_seconds", "Time that ended consolidations took, by stage", labels=["stage"]
    )
    for stage in seconds.keys() & times.keys():
        stages.add_metric([stage], count_value=int(times[stage]), sum_value=seconds[stage])
    yield stages
    for key, (name, told) in KL.items():
        family = GaugeMetricFamily(f"fastslow_{name}", told, labels=["scope", "anchors"])
        for label, nats in found.get(key, {}).items():
            family.add_metric(label.split("/"), nats)
        yield family


def _by_queue(name: str, told: str, queues: Mapping[str, Queue], amount: Callable[[Queue], float]) -> Metric:
    family = GaugeMetricFamily(f"fastslow_queue_{name}", told, labels=["queue"])
    for queue, found in queues.items():
        family.add_metric([queue], amount(found))
    return family
