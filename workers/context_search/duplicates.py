"""Guidelines that say the same in other words: found by embedding, merged for good where nothing tells them apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.domain.comments import contradicts
from service.domain.items import Guideline
from service.embedding import Embedder, near_duplicates

# From here on one of two may do, and the search tries it.
SIMILAR_COSINE = 0.75
# What an embedding hardly sees and a user means: numbers, negations, and words in quotes or capitals ("end with Cheers", "in French").
_PARTICULARS = re.compile(r"\d+|\b(?:not|no|never|without|don't|avoid)\b|[\"'“‘«](.+?)[\"'”’»]|(?<!^)\b[A-Z]\w*")


@dataclass(frozen=True)
class Duplicates:
    """What was found among a user's guidelines."""

    merged: dict[str, str] = field(default_factory=dict)
    """Guideline that says the same as an older one -> that one."""
    similar: dict[str, set[str]] = field(default_factory=dict)
    """Guideline -> newer ones that say nearly the same."""


def find(guidelines: Sequence[Guideline], embedder: Embedder) -> Duplicates:
    """Near-duplicates among guidelines. What was put there by hand is never merged into another.

    Raises:
        EmbedderUnavailable: the model failed.
    """
    order = sorted(guidelines, key=lambda g: (not g.by_hand, not g.stated, g.born, g.id))
    vectors = embedder.embed([g.text for g in order])

    def apart(later: int, earlier: int) -> bool:
        return order[later].by_hand or not same(order[later].text, order[earlier].text)

    merged = {order[later].id: order[earlier].id for later, earlier in near_duplicates(vectors, apart=apart)}
    cosines = vectors @ vectors.T
    similar: dict[str, set[str]] = {}
    for later, newer in enumerate(order):
        for earlier, older in enumerate(order[:later]):
            if cosines[later, earlier] >= SIMILAR_COSINE and not contradicts(older.text, newer.text):
                similar.setdefault(older.id, set()).add(newer.id)
    return Duplicates(merged, similar)


def same(one: str, other: str) -> bool:
    """Whether nothing that an embedding overlooks tells two guidelines apart."""
    return not contradicts(one, other) and particulars(one) == particulars(other)


def particulars(text: str) -> set[str]:
    """What makes a guideline another one even where most words are the same."""
    return {(match[1] or match[0]).casefold() for match in _PARTICULARS.finditer(text)}
