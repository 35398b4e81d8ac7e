"""The curve that rewards are fitted with, and what is read off curves.

    R(C) - R0 = (A - R0) / (1 + (C_mid / C)^B)        (arXiv 2605.12484)

R0 is the reward before any sample, A the asymptote, C_mid the samples at half of the way, B the steepness.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Steepness beyond which a curve is a step.
STEEPNESS = (0.3, 8.0)
GRID = 40
ROUNDS = 4


@dataclass(frozen=True)
class Fit:
    """A fitted curve."""

    start: float
    asymptote: float
    mid: float
    steepness: float
    error: float
    """Root of the mean squared residual."""

    def at(self, samples: float) -> float:
        return self.start + (self.asymptote - self.start) * share(samples, self.mid, self.steepness)


def share(samples: float, mid: float, steepness: float) -> float:
    """How much of the way is done after so many samples."""
    return 1 / (1 + (mid / samples) ** steepness) if samples > 0 else 0.0


def fit(points: Sequence[tuple[float, float]], *, start: float) -> Fit | None:
    """Least squares over (samples, reward); None where it can't be told: fewer than four points, no rise, or less than half of it seen.

    For each steepness and midpoint the best asymptote has a closed form, so only two numbers are searched for: on a grid, which is drawn
    in around the best place a few times.
    """
    seen = [(c, r) for c, r in points if c > 0]
    if len({c for c, _ in seen}) < 4:
        return None
    first, last = min(c for c, _ in seen), max(c for c, _ in seen)
    steep, mid = STEEPNESS, (math.log(first / 4), math.log(last * 4))
    best: Fit | None = None
    for _ in range(ROUNDS):
        candidates = [_closed(seen, start, math.exp(m), b) for b in _grid(*steep) for m in _grid(*mid)]
        best = min([*candidates, *([best] if best else [])], key=lambda f: f.error)
        steep = _around(best.steepness, steep, STEEPNESS)
        mid = _around(math.log(best.mid), mid, (math.log(first / 4), math.log(last * 4)))
    # Beyond the half-way point the data say nothing of where it ends.
    return best if best and best.asymptote > start and best.mid <= last else None


def _closed(points: Sequence[tuple[float, float]], start: float, mid: float, steepness: float) -> Fit:
    """The best asymptote for a midpoint and a steepness; rewards end at 1."""
    shares = [share(c, mid, steepness) for c, _ in points]
    rises = [r - start for _, r in points]
    rise = sum(s * r for s, r in zip(shares, rises, strict=True)) / max(sum(s * s for s in shares), 1e-12)
    rise = min(rise, 1.0 - start)
    error = math.sqrt(sum((rise * s - r) ** 2 for s, r in zip(shares, rises, strict=True)) / len(points))
    return Fit(start, start + rise, mid, steepness, error)


def _grid(low: float, high: float) -> Iterable[float]:
    return (low + (high - low) * n / (GRID - 1) for n in range(GRID))


def _around(value: float, span: tuple[float, float], limits: tuple[float, float]) -> tuple[float, float]:
    """A quarter of the span, around a value."""
    reach = (span[1] - span[0]) / 8
    return max(limits[0], value - reach), min(limits[1], value + reach)


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a curve of (x, y), a straight line between its points, first reaches a level; None where it never does."""
    if points and points[0][1] >= level:
        return points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= level:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None
