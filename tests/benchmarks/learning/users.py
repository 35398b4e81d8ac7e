"""Simulated users: what they want, when they say so, and what they say. All of it is drawn from the seed, none of it from the replies."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.learning.preferences import PREFERENCES, Draft, Preference, compatible, opposite, write
from tests.benchmarks.learning.prompts import Prompt, answers

WITHHELD, FLIPPED = 0.3, 0.1
"""Shares of the ratings."""
COMMENTED, UNSPECIFIC = 1 / 3, 0.25
"""Share of the unsatisfied replies with a comment; share of the comments that say only that something is wrong."""
CORRECTED, CARELESS = 0.5, 0.1
"""Share of the unsatisfied replies with a correction; share of the corrections that mend what is said and forget how."""
COMPARED = 0.15
"""Share of the replies, if not corrected, that are compared with a second one."""
GRUMBLES = ("meh", "Not great.", "Hmm, no.", "That's not it.", "I don't like this one.", "bad")


@dataclass(frozen=True)
class Person:
    """One simulated user."""

    name: str
    preferences: tuple[Preference, ...]

    def wanted(self, prompt: Prompt) -> str:
        """The reply to a question that satisfies all of their preferences."""
        return write(self.preferences, Draft((prompt.answer, prompt.more), prompt.topic))

    def at_odds(self, other: "Person") -> bool:
        """Whether the other wants none of what this one wants."""
        return not set(self.preferences) & set(other.preferences)


@dataclass(frozen=True)
class Verdict:
    """What a user finds of a reply."""

    unmet: tuple[Preference, ...]
    answers: bool
    fraction: float
    """The share of the preferences that hold; 0 if the reply does not answer."""

    @property
    def satisfied(self) -> bool:
        return self.answers and not self.unmet


def judge(person: Person, reply: str, prompt: Prompt, taught: Sequence[Prompt]) -> Verdict:
    """A user's verdict; `taught` are the questions whose answers a reply could be copied from."""
    unmet = tuple(p for p in person.preferences if not p.check(reply))
    right = answers(reply, prompt, taught)
    return Verdict(unmet, right, right * (1 - len(unmet) / len(person.preferences)))


def population(count: int, sizes: Sequence[int], *, seed: int) -> tuple[Person, ...]:
    """So many users in pairs of opposites; the pairs have the given numbers of preferences in turn.

    Raises:
        ValueError: the count is odd.
    """
    if count % 2:
        raise ValueError(f"{count} users can't be paired")
    draws = {size: _sets(size, random.Random(f"{seed} {size}")) for size in sizes}
    people = []
    for pair, size in zip(range(count // 2), itertools.cycle(sizes)):
        wanted = next(draws[size])
        for half, preferences in (("a", wanted), ("b", tuple(map(opposite, wanted)))):
            people.append(Person(f"{pair:02d}{half}", preferences))
    return tuple(people)


def _sets(size: int, draw: random.Random) -> Iterator[tuple[Preference, ...]]:
    """Compatible preferences without end; no set twice, and none whose opposites came, before all have had their turn."""
    sets = [c for c in itertools.combinations(PREFERENCES.values(), size) if compatible(c)]
    while True:
        left = draw.sample(sets, len(sets))
        while left:
            chosen = left.pop()
            against = set(map(opposite, chosen))
            left = [c for c in left if set(c) != against]
            yield chosen


@dataclass(frozen=True)
class Mood:
    """What a user is going to do about a reply, decided before they see it."""

    withheld: bool
    flipped: bool
    comments: bool
    unspecific: bool
    corrects: bool
    careless: bool
    compares: bool
    wording: float
    """In [0, 1): which of their words they choose."""


def mood(person: Person, number: int, *, seed: int) -> Mood:
    """The user's mood at their reply of this number."""
    draw = random.Random(f"{seed} {person.name} {number}")
    shares = (WITHHELD, FLIPPED, COMMENTED, UNSPECIFIC, CORRECTED, CARELESS, COMPARED)
    return Mood(*(draw.random() < share for share in shares), wording=draw.random())


def curriculum(person: Person, train: Sequence[Prompt], *, seed: int) -> Iterator[Prompt]:
    """What a user asks while they teach: all training questions in an order of their own, again and again."""
    draw = random.Random(f"{seed} {person.name} asks")
    while True:
        yield from draw.sample(train, len(train))


def react(
    mood: Mood, person: Person, prompt: Prompt, verdict: Verdict, other: tuple[str, Verdict] | None
) -> dict[str, Any]:
    """The signals that a user gives on a reply, as the body of `POST /v1/feedback` has them; none if they say nothing.

    Args:
        other: the id of a second reply to the same question and what the user finds of it, where they compare.
    """
    signals: dict[str, Any] = {}
    if not mood.withheld:
        signals["rating"] = verdict.satisfied != mood.flipped
    if not verdict.satisfied and mood.comments:
        signals["comment"] = _comment(mood, verdict)
    if not verdict.satisfied and mood.corrects:
        signals["correction"] = prompt.plain if mood.careless else person.wanted(prompt)
    elif other is not None and other[1].fraction != verdict.fraction:
        better = "other" if other[1].fraction > verdict.fraction else "this"
        signals["preference"] = {"interaction_id": other[0], "better": better}
    return signals


def _comment(mood: Mood, verdict: Verdict) -> str:
    unspecific = mood.unspecific or not verdict.unmet
    words = GRUMBLES if unspecific else tuple(hint for p in verdict.unmet for hint in p.hints)
    return words[int(mood.wording * len(words))]
