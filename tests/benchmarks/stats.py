"""Percentiles, medians over rounds, and the line of JSON that a benchmark ends with."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

DIGITS = 3


@dataclass(frozen=True)
class Round:
    """One short run of load against one target."""

    seconds: float
    latencies: tuple[float, ...]
    """Seconds from a request's last byte out to its reply's last byte in."""
    first_bytes: tuple[float, ...]
    """Seconds to the first byte of the reply's body; the first event of a stream."""

    @property
    def rps(self) -> float:
        return len(self.latencies) / self.seconds

    def ms(self, share: float) -> float:
        """The percentile `share` of the latency, in milliseconds."""
        return percentile(self.latencies, share) * 1000


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` (in (0, 1]) of the values don't exceed (nearest rank): always one that was measured.

    Raises:
        ValueError: there are no values, or `share` is out of range.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    # The product of two floats may lie a hair over the whole number it stands for.
    return sorted(values)[math.ceil(round(share * len(values), 9)) - 1]


def median_ms(rounds: Iterable[Round], share: float) -> float:
    """The median over rounds of a percentile of the latency, in milliseconds: one disturbed round does not move it."""
    return median(r.ms(share) for r in rounds)


def median_added_ms(rounds: Sequence[Round], baseline: Sequence[Round], share: float) -> float:
    """The median over repeats of what `rounds` take longer than the baseline's round of the same repeat, at a percentile."""
    return median(r.ms(share) - b.ms(share) for r, b in zip(rounds, baseline, strict=True))


def median_rps(rounds: Iterable[Round]) -> float:
    return median(r.rps for r in rounds)


def json_line(bench: str, headline: Mapping[str, float], details: Mapping[str, object]) -> str:
    """The last line of a benchmark: `bench`, the headline's figures in their order, then the details.

    Raises:
        ValueError: a figure is not finite, or a detail has a headline's name.
    """
    if clash := headline.keys() & details.keys():
        raise ValueError(f"named twice: {sorted(clash)}")
    return json.dumps(_rounded({"bench": bench, **headline, **details}), separators=(",", ":"), allow_nan=False)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
