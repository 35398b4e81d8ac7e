"""Whether a reply follows what others have in common."""

from service.domain.inference.candidates import RULES
from service.domain.inference.phrases import Key, edge
from service.domain.inference.phrases import without as without_key
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
        at_end = axis == "closing"
        return edge(reply, at_end=at_end).has(_key(value, at_end=at_end))
    traits = traits_of(reply)
    if axis == "language":
        return None if traits.language is None else traits.language.casefold() == value
    held = [rule.holds(traits) for rule in RULES if (rule.axis, rule.value) == (axis, value)]
    return None if not held or None in held else any(held)


def without(reply: str, phrase: str, *, at_end: bool) -> str:
    """A reply without its opening or closing phrase, however often it says it."""
    key = _key(phrase, at_end=at_end)
    while key and (shorter := without_key(reply, key, at_end=at_end)) != reply:
        reply = shorter
    return reply


def _key(phrase: str, *, at_end: bool) -> Key:
    return edge(phrase, at_end=at_end).keys
