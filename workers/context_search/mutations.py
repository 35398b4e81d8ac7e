"""Small edits of a candidate that need no language model: add, drop, swap, move, merge, cross.

Each takes a parent and gives one child, or None where it does not apply. Randomness is an argument, so a search can be repeated.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from random import Random
from typing import TypeVar

from workers.context_search.candidates import Candidate, Pool

# How much likelier the newest item is to be added than the oldest.
NEWEST_WEIGHT = 3.0
# How many edits are tried before a parent counts as worked out.
MOST_TRIES = 40

CandidateT = TypeVar("CandidateT")


def first_unseen(
    edits: Sequence[Callable[[CandidateT], CandidateT | None]],
    parent: CandidateT,
    *,
    unseen: Callable[[CandidateT], CandidateT | None],
    chance: Random,
) -> CandidateT | None:
    """The first child of `parent` by edits drawn at random that `unseen` lets pass; None where it counts as worked out."""
    for _ in range(MOST_TRIES):
        edited = chance.choice(edits)(parent)
        child = unseen(edited) if edited is not None else None
        if child is not None:
            return child
    return None


class Mutations:
    """Children of candidates, none of which was seen before.

    Args:
        similar: guideline -> newer ones that say nearly the same, so that one may do.
    """

    def __init__(self, pool: Pool, *, random: Random, similar: Mapping[str, Collection[str]] | None = None) -> None:
        self._pool = pool
        self._random = random
        self._similar = similar or {}
        self._seen: set[Candidate] = set()

    @property
    def tried(self) -> int:
        return len(self._seen)

    def unseen(self, candidate: Candidate) -> Candidate | None:
        """The candidate as it would be served; None where that one was tried before."""
        fitted = self._pool.fitted(candidate)
        if fitted in self._seen:
            return None
        self._seen.add(fitted)
        return fitted

    def child(self, parent: Candidate, others: Sequence[Candidate]) -> Candidate | None:
        """A new candidate one edit away from `parent`, or between it and one of the `others`; None where none was found."""
        edits: list[Callable[[Candidate], Candidate | None]] = [self.add, self.drop, self.swap, self.move, self.merge]
        if others:
            edits.append(lambda candidate: self.cross(candidate, self._random.choice(others)))
        return first_unseen(edits, parent, unseen=self.unseen, chance=self._random)

    def add(self, parent: Candidate) -> Candidate | None:
        """One more item, at the end of its kind, so that what a chat has in the prefix cache stays in front."""
        left = [name for name in self._names() if name not in parent.items]
        if not left:
            return None
        weights = [1 + (NEWEST_WEIGHT - 1) * n / max(len(left) - 1, 1) for n in range(len(left))]
        return _with(parent, self._random.choices(left, weights)[0], guideline=self._is_guideline)

    def drop(self, parent: Candidate) -> Candidate | None:
        """One item fewer."""
        loose = [name for name in parent.items if name not in self._pool.fixed]
        return parent.without([self._random.choice(loose)]) if loose else None

    def swap(self, parent: Candidate) -> Candidate | None:
        """Another exemplar in the place of one."""
        there = [name for name in parent.exemplars if name not in self._pool.fixed]
        left = [x.id for x in self._pool.exemplars if x.id not in parent.exemplars]
        if not there or not left:
            return None
        gone, new = self._random.choice(there), self._random.choice(left)
        return parent._replace(exemplars=tuple(new if name == gone else name for name in parent.exemplars))

    def move(self, parent: Candidate) -> Candidate | None:
        """One item in another place among its kind."""
        field = self._random.choice(Candidate._fields)
        names = list(getattr(parent, field))
        if len(names) < 2:
            return None
        name = names.pop(self._random.randrange(len(names)))
        names.insert(self._random.randrange(len(names) + 1), name)
        return parent._replace(**{field: tuple(names)})

    def merge(self, parent: Candidate) -> Candidate | None:
        """Of two guidelines that say nearly the same the newer one alone."""
        there = set(parent.guidelines)
        older = [g for g in parent.guidelines if there & set(self._similar.get(g, ())) and g not in self._pool.fixed]
        return parent.without([self._random.choice(older)]) if older else None

    def cross(self, parent: Candidate, other: Candidate) -> Candidate | None:
        """What both hold, and of the rest each item with even odds, in the parent's order, then in the other's."""
        both = set(parent.items) & set(other.items)

        def mixed(ours: tuple[str, ...], theirs: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(n for n in dict.fromkeys((*ours, *theirs)) if n in both or self._random.random() < 0.5)

        if set(parent.items) == set(other.items):
            return None
        return Candidate(mixed(parent.guidelines, other.guidelines), mixed(parent.exemplars, other.exemplars))

    def _names(self) -> list[str]:
        """All items, the oldest first."""
        return [
            item.id for item in sorted((*self._pool.guidelines, *self._pool.exemplars), key=lambda i: (i.born, i.id))
        ]

    def _is_guideline(self, name: str) -> bool:
        return name in self._pool.state.guidelines


def _with(candidate: Candidate, name: str, *, guideline: Callable[[str], bool]) -> Candidate:
    if guideline(name):
        return candidate._replace(guidelines=(*candidate.guidelines, name))
    return candidate._replace(exemplars=(*candidate.exemplars, name))
