"""Counters and histograms of ours say what the library's say of the same."""

import prometheus_client as library
from prometheus_client import CollectorRegistry, generate_latest

from service.counted import Counter, Histogram

BOUNDS = (0.001, 0.25, 1, 16)
VALUES = (0.0, 0.001, 0.0011, 0.25, 0.9, 1, 16, 16.01, 4000)


def told(registry: CollectorRegistry) -> list[str]:
    """But for when a series began, which ours leaves out."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_values_on_between_and_beyond_the_bounds_are_told_as_the_library_tells_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("waits_seconds", "How long", bounds=BOUNDS, registry=ours)
    their = library.Histogram("waits_seconds", "How long", buckets=BOUNDS, registry=theirs)
    assert told(ours) == told(theirs)
    for value in VALUES:
        histogram.observe(value)
        their.observe(value)
    assert 'waits_seconds_bucket{le="0.25"} 4.0' in told(ours)
    assert told(ours) == told(theirs)


def test_each_label_has_values_of_its_own() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("waits_seconds", "How long", ["stream"], bounds=BOUNDS, registry=ours)
    their = library.Histogram("waits_seconds", "How long", ["stream"], buckets=BOUNDS, registry=theirs)
    for label, value in (("no", 0.5), ("yes", 2), ("no", 0.1)):
        histogram.labels(label).observe(value)
        their.labels(label).observe(value)
    assert 'waits_seconds_count{stream="no"} 2.0' in told(ours)
    assert told(ours) == told(theirs)


def test_counts_are_told_as_the_library_tells_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counters = [
        kind("chats_total", "How many", ["route", "status"], registry=registry)
        for kind, registry in ((Counter, ours), (library.Counter, theirs))
    ]
    for counter in counters:
        for route, status in (("/a", 200), ("/b", 404), ("/a", 200)):
            counter.labels(route, status).inc()
        counter.labels("/a", 503).inc(2.5)
    assert 'chats_total{route="/a",status="200"} 2.0' in told(ours)
    assert told(ours) == told(theirs)

    ours, theirs = CollectorRegistry(), CollectorRegistry()
    Counter("tokens_total", "How many", registry=ours).inc(7)
    library.Counter("tokens_total", "How many", registry=theirs).inc(7)
    assert "tokens_total 7.0" in told(ours)
    assert told(ours) == told(theirs)
