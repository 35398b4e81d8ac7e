"""From scored candidates to a population: who is clearly worse, who stays, who may be drawn."""

from collections.abc import Iterable, Mapping, Sequence

from service.domain.events import Member
from service.domain.population import MAX_MEMBERS, member_id
from workers.context_search.candidates import Candidate
from workers.context_search.judge import NOISE_NATS, median, noise, trimmed_mean

Gains = Mapping[Candidate, Sequence[float]]
"""Candidate -> its gain over no context on each example, in the same order for all; nats per token."""
# Members that are more alike would only divide the ratings and the prefix cache among them.
MIN_DIFFERENCE = 0.2
# Medians are told apart to this many digits; closer ones by what remains without the extremes.
SCORE_DIGITS = 3


def ranked(gains: Gains, prices: Mapping[Candidate, float], *, incumbents: Iterable[Candidate] = ()) -> list[Candidate]:
    """Best first by S(c), the median gain less the price; then by trimmed mean. A tie leaves what serves now in its place."""
    stay = set(incumbents)

    def key(candidate: Candidate) -> tuple[float, float, tuple[str, ...]]:
        score = median(gains[candidate]) - prices[candidate]
        if candidate in stay:
            score += NOISE_NATS
        return (-round(score, SCORE_DIGITS), -trimmed_mean(gains[candidate]), candidate.items)

    return sorted(gains, key=key)


def clearly_worse(candidate: Candidate, best: Candidate, gains: Gains) -> bool:
    """Whether the median of what a candidate lacks on the best one is beyond its standard error: every chat draws among members."""
    lacks = [b - c for b, c in zip(gains[best], gains[candidate], strict=True)]
    return median(lacks) > noise(lacks)


def standing(order: Sequence[Candidate], gains: Gains) -> list[Candidate]:
    """Of candidates in their order the first, and those that add something: not clearly worse than it, on some example the best or as
    good, and unlike all that come before.
    """
    near = [c for c in order if not clearly_worse(c, order[0], gains)]
    wins = wins_of(near, gains)
    kept = list(order[:1])
    for candidate in near:
        if wins[candidate] > 0 and all(difference(candidate, other) >= MIN_DIFFERENCE for other in kept):
            kept.append(candidate)
    return kept


def difference(one: Candidate, other: Candidate) -> float:
    """The share of the items of both that only one of them holds."""
    ours, theirs = set(one.items), set(other.items)
    return len(ours ^ theirs) / max(len(ours | theirs), 1)


def wins_of(candidates: Sequence[Candidate], gains: Gains) -> dict[Candidate, int]:
    """On how many examples each does at least as well as all the others."""
    rows = list(zip(*(gains[c] for c in candidates), strict=True))
    return {c: sum(row[n] >= max(row) - NOISE_NATS for row in rows) for n, c in enumerate(candidates)}


def members(chosen: Sequence[Candidate], gains: Gains) -> tuple[Member, ...]:
    """The population, best first. `win` is kept off 0 and 1, as a Beta prior wants it."""
    chosen = chosen[:MAX_MEMBERS]
    wins = wins_of(chosen, gains)
    return tuple(
        Member(
            id=member_id(c.items),
            items=c.items,
            win=round((wins[c] + 1) / (len(gains[c]) + 2), SCORE_DIGITS),
            score=round(median(gains[c]), 6),
        )
        for c in chosen
    )
