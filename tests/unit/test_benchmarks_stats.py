"""The arithmetic of the benchmarks: their figures are only as good as this."""

import json
import math

import pytest

from tests.benchmarks.load import http_request
from tests.benchmarks.stats import Round, json_line, median_added_ms, median_ms, median_rps, percentile


def round_of(*milliseconds: float, seconds: float = 1.0) -> Round:
    latencies = tuple(m / 1000 for m in milliseconds)
    return Round(seconds=seconds, latencies=latencies, first_bytes=latencies)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_a_percentile_is_the_measured_value_of_that_rank(share: float, expected: int) -> None:
    assert percentile([*range(100, 0, -1)], share) == expected


def test_a_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([7.0], share) for share in (0.01, 0.5, 0.99)] == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.01)])
def test_a_percentile_of_nothing_or_out_of_range_is_refused(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(values, share)


def test_one_disturbed_round_does_not_move_the_medians() -> None:
    rounds = [round_of(1, 2, 3), round_of(1, 2, 3), round_of(100, 200, 300, seconds=9.0)]
    assert median_ms(rounds, 0.5) == pytest.approx(2.0)
    assert median_rps(rounds) == 3.0


def test_added_latency_is_the_difference_within_a_repeat() -> None:
    direct, full = [round_of(5), round_of(50), round_of(6)], [round_of(7), round_of(52), round_of(9)]
    assert median_added_ms(full, direct, 0.5) == pytest.approx(2.0)


def test_added_latency_wants_as_many_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError, match="shorter"):
        median_added_ms([round_of(1), round_of(2)], [round_of(1)], 0.5)


def test_the_line_names_the_bench_first_then_the_headline_in_order_then_details() -> None:
    line = json_line("gateway", {"b": 1.23456, "a": 2}, {"by": {"16": 3.00004}, "list": (0.1 + 0.2,)})
    assert line == '{"bench":"gateway","b":1.235,"a":2,"by":{"16":3.0},"list":[0.3]}'
    assert list(json.loads(line)) == ["bench", "b", "a", "by", "list"]


def test_a_figure_that_is_no_number_never_gets_into_the_line() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_line("gateway", {"rps": math.nan}, {})


def test_a_detail_may_not_take_a_headlines_name() -> None:
    with pytest.raises(ValueError, match="named twice"):
        json_line("gateway", {"rps": 1.0}, {"rps": 2.0})


def test_a_request_tells_the_length_of_its_body() -> None:
    head, _, body = http_request("POST", "/x", {"A": "b"}, b"12345").partition(b"\r\n\r\n")
    assert body == b"12345"
    assert head.split(b"\r\n") == [b"POST /x HTTP/1.1", b"Host: 127.0.0.1", b"A: b", b"Content-Length: 5"]
