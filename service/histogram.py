"""A histogram for one thread: two plain additions a value, where the library's takes locks and looks through its buckets."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Observed:
    """Values of one label, counted by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * len(bounds)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Histogram(Collector):
    """As the library's, for values that the event loop alone observes.

    Args:
        bounds: upper ends of the buckets, ascending; infinity comes on top.
        label: of which each value has values of its own; empty: there is none.
    """

    def __init__(
        self, name: str, told: str, *, bounds: Sequence[float], registry: CollectorRegistry, label: str = ""
    ) -> None:
        self._name, self._told = name, told
        self._bounds = (*bounds, float("inf"))
        self._label = label
        self._observed: dict[str, Observed] = {}
        if not label:
            self.observe = self.labels("").observe
        registry.register(self)

    def labels(self, value: str) -> Observed:
        """The values of one label."""
        return self._observed.setdefault(value, Observed(self._bounds))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._told, labels=[self._label] if self._label else [])
        names = [str(floatToGoString(bound)) for bound in self._bounds]  # type: ignore[no-untyped-call]
        for value, observed in self._observed.items():
            buckets = list(zip(names, map(float, accumulate(observed.counts)), strict=True))
            family.add_metric([value] if self._label else [], buckets, observed.total)
        yield family
