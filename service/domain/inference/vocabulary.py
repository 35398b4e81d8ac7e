"""The closed vocabulary: every guideline that the rules can come to in our own words. Only these may be shown to another user."""

import re

from service.domain.inference.candidates import RULES
from service.domain.inference.language import SCRIPTS, STOP_WORDS

_LANGUAGES = "|".join(map(re.escape, {**SCRIPTS, **STOP_WORDS}))
_SHAREABLE = re.compile(
    "|".join(
        (
            *(re.escape(rule.text) for rule in RULES),
            r"Keep replies under about \d{1,6} words\.",
            r"Write at least about \d{1,6} words\.",
            r"Answer in (?:one sentence|two sentences|three sentences|four sentences)\.",
            rf"Reply in (?:{_LANGUAGES})\.",
        )
    ),
    re.ASCII,
)


def is_shareable(text: str) -> bool:
    """Whether a guideline is of the closed vocabulary, word for word."""
    return _SHAREABLE.fullmatch(text) is not None
