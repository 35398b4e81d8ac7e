"""The histogram of ours says what the library's says of the same values."""

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Theirs

from service.histogram import Histogram

BOUNDS = (0.001, 0.25, 1, 16)
VALUES = (0.0, 0.001, 0.0011, 0.25, 0.9, 1, 16, 16.01, 4000)


def told(registry: CollectorRegistry) -> list[str]:
    """But for when a series began, which ours leaves out."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_values_on_between_and_beyond_the_bounds_are_told_as_the_library_tells_them() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("waits_seconds", "How long", bounds=BOUNDS, registry=ours)
    library = Theirs("waits_seconds", "How long", buckets=BOUNDS, registry=theirs)
    assert told(ours) == told(theirs)
    for value in VALUES:
        histogram.observe(value)
        library.observe(value)
    assert 'waits_seconds_bucket{le="0.25"} 4.0' in told(ours)
    assert told(ours) == told(theirs)


def test_each_label_has_values_of_its_own() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("waits_seconds", "How long", bounds=BOUNDS, label="stream", registry=ours)
    library = Theirs("waits_seconds", "How long", ["stream"], buckets=BOUNDS, registry=theirs)
    for label, value in (("no", 0.5), ("yes", 2), ("no", 0.1)):
        histogram.labels(label).observe(value)
        library.labels(label).observe(value)
    assert 'waits_seconds_count{stream="no"} 2.0' in told(ours)
    assert told(ours) == told(theirs)
