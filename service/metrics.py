"""What the gateway counts, for Prometheus. One registry a process."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

# From a cached read to a slow generation.
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class WorkerCounts(Collector):
    """What workers have counted in Redis: they have no port of their own to be scraped at."""

    def __init__(self) -> None:
        self.counted: Mapping[tuple[str, str], int] = {}
        """(name, label) -> how often, as last read; the gateway reads it when it is scraped."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        families = {
            "optimize": CounterMetricFamily(
                "fastslow_optimizations", "Optimizations of users' contexts by how they ended", labels=["outcome"]
            ),
            "optimize_without": CounterMetricFamily(
                "fastslow_optimizations_without", "Optimizations that had to do without a helper", labels=["missing"]
            ),
        }
        for (name, label), times in self.counted.items():
            if name in families:
                families[name].add_metric([label], times)
        yield from families.values()


class Metrics:
    """Counters and histograms; a fresh set for each application, so that tests don't share them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.workers = WorkerCounts()
        self.registry.register(self.workers)
        self.requests = Counter(
            "fastslow_requests_total", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.overhead = Histogram(
            "fastslow_chat_overhead_seconds",
            "The gateway's own time in a chat: all but the wait for vLLM",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.chat = Histogram(
            "fastslow_chat_seconds",
            "A chat from request to last byte",
            ["stream"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.feedback = Histogram(
            "fastslow_feedback_seconds",
            "A feedback from request to reply",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.signals = Counter(
            "fastslow_feedback_signals_total", "Signals received", ["signal"], registry=self.registry
        )
        self.degraded = Counter(
            "fastslow_degraded_total",
            "Chats served with less than was due, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.adapter_failures = Counter(
            "fastslow_adapter_failures_total",
            "Adapter versions that vLLM could not serve, so that the base did",
            registry=self.registry,
        )
        self.context_tokens = Histogram(
            "fastslow_context_tokens",
            "Tokens of the rendered context",
            buckets=(0, 16, 32, 64, 128, 256, 512, 1024, 2048),
            registry=self.registry,
        )
        self.recall = Counter(
            "fastslow_recall_total",
            "Recalls of exemplars by outcome: ok, timeout, unavailable; and feedback whose embeddings were not-remembered",
            ["outcome"],
            registry=self.registry,
        )
        self.served = Counter(
            "fastslow_chats_total", "Chats by what served them", ["served_by"], registry=self.registry
        )
        self.norm_checks = Counter(
            "fastslow_norm_checks_total",
            "Replies held against their scopes' norms, by kind of norm (its checker) and whether it was held: yes, no",
            ["norm", "held"],
            registry=self.registry,
        )
        self.norms_unchecked = Counter(
            "fastslow_norms_unchecked_total",
            "Replies that should have been held against norms and were not, by reason: busy, failed, long, store",
            ["reason"],
            registry=self.registry,
        )
