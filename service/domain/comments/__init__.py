"""Comments in the user's own words: what they ask for, how good they find a reply, and when two of them clash. Rules only, no model."""

from service.domain.comments.canonical import canonical
from service.domain.comments.reading import MAX_CHARS, MAX_WORDS, guideline_text, implied_rating
from service.domain.comments.stances import contradicts, phrase_key, stances

__all__ = [
    "MAX_CHARS",
    "MAX_WORDS",
    "canonical",
    "contradicts",
    "guideline_text",
    "implied_rating",
    "phrase_key",
    "stances",
]
