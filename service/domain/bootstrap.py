"""Paired bootstrap: how sure it is that one thing is better than another on the same examples.

The examples are drawn again with replacement, as many as there are; the mean difference of each such draw is one that could as well have
been measured. Its 5 % quantile is the bound (Efron 1979, the percentile method). With few examples it is too bold, whatever the method:
`Difference.is_few`.
"""

import random
from collections.abc import Sequence

from service.domain.measures import Difference

RESAMPLES = 2000


def paired(candidate: Sequence[float], other: Sequence[float], *, seed: int) -> Difference:
    """The candidate's values against another's, example by example.

    Args:
        candidate, other: one value an example, in the same order; the higher the better. Not empty.

    Raises:
        ValueError: they are not of the same length, or empty.
    """
    if not candidate:
        raise ValueError("a comparison needs at least one example")
    differences = [ours - theirs for ours, theirs in zip(candidate, other, strict=True)]
    return Difference(
        mean=sum(differences) / len(differences),
        lower95=lower95(differences, seed=seed),
        examples=len(differences),
        positive=sum(difference > 0 for difference in differences),
    )


def lower95(values: Sequence[float], *, seed: int) -> float:
    """One-sided lower 95 % bound of the mean of values, in their unit."""
    source = random.Random(seed)
    count = len(values)
    means = sorted(sum(source.choices(values, k=count)) / count for _ in range(RESAMPLES))
    return means[RESAMPLES // 20 - 1]
