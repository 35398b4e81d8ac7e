"""How near a generated reply is to what a user wants, by what can be measured of a text: no likelihood, no model.

Each feature's distance is in [0, 1]. It counts by how well it tells the user's wanted replies from the unwanted ones, and by how far
the wanted ones agree with each other on it; so an ending that all of them share counts, and the first word of replies to unlike questions
does not.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from service.domain.inference.traits import traits_of

# A reply four times as long, or a quarter, is as far away as it gets.
FARTHEST_RATIO = 4.0
# A reply that says one phrase of four words so often, or whose words are so few, goes round in circles.
MOST_REPEATS = 3
LEAST_DISTINCT_SHARE = 0.3
# Shorter ones may repeat themselves for good reason.
REPETITION_FROM_WORDS = 20

_WORD = re.compile(r"\w+(?:'\w+)?")

Pair = tuple[str, str]
"""(wanted, unwanted) replies to one prompt."""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


@lru_cache(256)
def _measured(text: str) -> tuple[dict[str, int], dict[str, object]]:
    """(what has a size, what is there or not) of a text."""
    traits, words = traits_of(text), _words(text)
    sizes = {"words": traits.words, "sentences": traits.sentences}
    marks: dict[str, object] = {
        "bullets": traits.bullets > 1,
        "numbered": traits.numbered > 1,
        "case": traits.case,
        "commas": traits.commas > 0,
        "exclamations": traits.exclamations > 0,
        "emoji": traits.emoji > 0,
        "formality": (traits.formal > traits.casual) - (traits.formal < traits.casual),
        "code": traits.has_code,
        "quoted": traits.is_quoted,
        "title": traits.has_title,
        "postscript": traits.has_postscript,
        "asks": traits.asks,
        "language": traits.language,
        "opening": words[:1],
        "closing": words[-1:],
        "last character": text.rstrip()[-1:],
    }
    return sizes, marks


def distances(one: str, other: str) -> dict[str, float]:
    """By feature how far two texts are apart, in [0, 1]."""
    (sizes, marks), (other_sizes, other_marks) = _measured(one), _measured(other)
    ratios = {name: math.log((size + 1) / (other_sizes[name] + 1)) for name, size in sizes.items()}
    return {name: min(abs(ratio) / math.log(FARTHEST_RATIO), 1.0) for name, ratio in ratios.items()} | {
        name: float(mark != other_marks[name]) for name, mark in marks.items()
    }


def weights(pairs: Sequence[Pair]) -> dict[str, float]:
    """By feature how much a user cares for it, in [0, 1]: it tells wanted from unwanted replies, and the wanted ones share it."""
    apart = [distances(wanted, unwanted) for wanted, unwanted in pairs]
    unlike = [distances(a, b) for n, (a, _) in enumerate(pairs) for b, _ in pairs[n + 1 :]]
    if not apart:
        return {}

    def weight(name: str) -> float:
        contrast = sum(d[name] for d in apart) / len(apart)
        agreement = 1.0 - sum(d[name] for d in unlike) / len(unlike) if unlike else 1.0
        return contrast * agreement

    return {name: weight(name) for name in apart[0]}


def closeness(reply: str, wanted: str, by: dict[str, float]) -> float:
    """How near a reply is to the wanted one, in [0, 1], by the features' weights; 1 where none counts."""
    total = sum(by.values())
    if total == 0.0:
        return 1.0
    apart = distances(reply, wanted)
    return 1.0 - sum(by[name] * apart[name] for name in by) / total


def is_broken(reply: str, *, prompt: str, shown: Sequence[str] = ()) -> bool:
    """Whether a reply is none: empty, going round in circles, or the prompt or a reply of the context over again.

    Args:
        shown: the replies that the context held.
    """
    words = _words(reply)
    if not words:
        return True
    plain = " ".join(words)
    if plain in {" ".join(_words(text)) for text in (prompt, *shown)}:
        return True
    if len(words) < REPETITION_FROM_WORDS:
        return False
    phrases = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    return max(phrases.values()) > MOST_REPEATS or len(set(words)) < LEAST_DISTINCT_SHARE * len(words)
