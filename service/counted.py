"""Metrics of one thread, the event loop: plain additions, where the library's take locks and look through buckets (docs/benchmarks.md).

Every chat counts some seven times. They are told as the library tells its own.
"""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Count:
    """How often, or how much, under one combination of labels."""

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        self.value += amount


class Counter(Collector):
    """As the library's. Its name ends as the library's does, with `_total`."""

    def __init__(self, name: str, told: str, labels: Sequence[str] = (), *, registry: CollectorRegistry) -> None:
        self._name, self._told, self.label_names = name, told, labels
        self._counts: dict[tuple[str, ...], Count] = {}
        if not labels:
            self.inc = self.labels().inc
        registry.register(self)

    def labels(self, *values: object) -> Count:
        """The count of one combination, in the order of the labels."""
        return self._counts.setdefault(tuple(map(str, values)), Count())

    def collect(self) -> list[Metric]:
        family = CounterMetricFamily(self._name, self._told, labels=self.label_names)
        for values, count in self._counts.items():
            family.add_metric(values, count.value)
        return [family]


class Observed:
    """Values under one combination of labels, counted by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Collector):
    """As the library's.

    Args:
        bounds: upper ends of the buckets, ascending; infinity comes on top.
    """

    def __init__(
        self,
        name: str,
        told: str,
        labels: Sequence[str] = (),
        *,
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._told, self.label_names = name, told, labels
        self._bounds = (*bounds, float("inf"))
        self._observed: dict[tuple[str, ...], Observed] = {}
        if not labels:
            self.observe = self.labels().observe
        registry.register(self)

    def labels(self, *values: str) -> Observed:
        """The values under one combination, in the order of the labels."""
        return self._observed.setdefault(values, Observed(self._bounds))

    def collect(self) -> list[Metric]:
        family = HistogramMetricFamily(self._name, self._told, labels=self.label_names)
        names = [str(floatToGoString(bound)) for bound in self._bounds]  # type: ignore[no-untyped-call]
        for values, observed in self._observed.items():
            buckets = list(zip(names, map(float, accumulate(observed.counts)), strict=True))
            family.add_metric(values, buckets, observed.total)
        return [family]
