"""Whether a reply follows what others have in common."""

from service.domain.comments import phrase_key
from service.domain.inference.candidates import RULES
from service.domain.inference.phrases import edge
from service.domain.inference.traits import traits_of

TELLING = frozenset(
    {"opening", "closing", "case", "bullets", "quotes", "title", "postscript", "code", "emoji", "language"}
)
"""Axes on which a reply that goes the other way is an oversight. How long it is, and how formal, varies for good reasons."""


def follows(reply: str, axis: str, value: str) -> bool | None:
    """Whether a reply has a style; None where that can't be told.

    Args:
        value: as `Candidate.value`; of `opening` and `closing` the phrase itself will do.
    """
    if axis in ("opening", "closing"):
        key = tuple(phrase_key(value).split())
        words = edge(reply, at_end=axis == "closing").keys
        outermost = tuple(reversed(key)) if axis == "closing" else key
        return tuple(phrase_key(word) for word in words[: len(key)]) == outermost
    traits = traits_of(reply)
    if axis == "language":
        return None if traits.language is None else traits.language.casefold() == value
    held = [rule.holds(traits) for rule in RULES if (rule.axis, rule.value) == (axis, value)]
    return None if not held or None in held else any(held)
