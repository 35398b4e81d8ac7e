"""The phrase that most wanted replies begin or end with."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from service.domain.comments.words import words

MAX_PHRASE_WORDS = 8
MAX_PHRASE_CHARS = 60
# Nothing longer than this is looked at for a phrase of so many words.
EDGE_CHARS = 200
# A phrase of fewer words must be parted from the rest by a mark: two replies that begin with "The" have no phrase.
MIN_UNMARKED_WORDS = 3

_TOKEN = re.compile(r"\S+")
_MARKS = ".,!?;:…—–-'\"“”‘’()*_~"
_MARKED = re.compile(r"[.,!?;:…—–)\"”*]$")
# It will be quoted in one line of a prompt.
_UNFIT = re.compile(r"[<>|`{}\\\x00-\x1f\x7f]")
COMMON = words(
    "a an the and or but of to in on it is are this that i you he she they we for with as at by be so if not"
)

Key = tuple[str, ...]


class Phrase(NamedTuple):
    """A common opening (or closing) with what the edges of replies must be to have it."""

    key: Key
    text: str
    support: int
    against: int


class Edge(NamedTuple):
    """The words at one end of a reply, outermost first, and for how many of them a mark parts them from the rest."""

    tokens: tuple[str, ...]
    keys: Key
    marked: frozenset[int]

    def has(self, key: Key) -> bool:
        return self.keys[: len(key)] == key


@lru_cache(1024)
def edge(text: str, *, at_end: bool) -> Edge:
    part = text.strip()[-EDGE_CHARS:] if at_end else text.strip()[:EDGE_CHARS]
    matches = list(_TOKEN.finditer(part))
    if at_end:
        matches.reverse()
    matches = matches[: MAX_PHRASE_WORDS + 1]
    marked = set()
    for size in range(1, len(matches)):
        inner, outer = (matches[size], matches[size - 1]) if at_end else (matches[size - 1], matches[size])
        if _MARKED.search(inner[0]) or "\n" in part[inner.end() : outer.start()]:
            marked.add(size)
    tokens = tuple(m[0] for m in matches)
    return Edge(tokens, tuple(t.casefold().strip(_MARKS) or t for t in tokens), frozenset(marked))


def without(text: str, key: Key, *, at_end: bool) -> str:
    """A reply without the phrase, if it has it."""
    if not edge(text, at_end=at_end).has(key):
        return text
    text = text.strip()
    matches = list(_TOKEN.finditer(text[-EDGE_CHARS:] if at_end else text[:EDGE_CHARS]))
    if at_end:
        return text[: len(text) - len(text[-EDGE_CHARS:]) + matches[-len(key)].start()].rstrip()
    return text[matches[len(key) - 1].end() :].lstrip()


def common_phrase(pairs: Sequence[tuple[str, str]], *, at_end: bool) -> Phrase | None:
    """The phrase with the most support among (wanted, unwanted) replies, the longest of those; None without a clear majority."""
    edges = [(edge(wanted, at_end=at_end), edge(unwanted, at_end=at_end)) for wanted, unwanted in pairs]
    support: Counter[Key] = Counter()
    for wanted, unwanted in edges:
        for size in range(1, min(MAX_PHRASE_WORDS, len(wanted.tokens) - 1) + 1):
            key = wanted.keys[:size]
            if (size in wanted.marked or size >= MIN_UNMARKED_WORDS) and not unwanted.has(key):
                support[key] += 1
    for key, count in sorted(support.items(), key=lambda item: (-item[1], -len(item[0]), item[0])):
        against = sum(1 for wanted, _ in edges if not wanted.has(key))
        if count < 2 or count < 2 * against:
            return None
        if 2 * sum(1 for _, unwanted in edges if unwanted.has(key)) > len(edges):
            continue
        text = _shown([wanted.tokens[: len(key)] for wanted, _ in edges if wanted.has(key)], at_end=at_end)
        if text is not None and not COMMON.issuperset(key):
            return Phrase(key, text, count, against)
    return None


def _shown(occurrences: list[tuple[str, ...]], *, at_end: bool) -> str | None:
    """The phrase as it is written most often, None if it can't stand in a guideline."""
    written = Counter(" ".join(reversed(tokens) if at_end else tokens) for tokens in occurrences)
    text = min(written, key=lambda t: (-written[t], t)).replace('"', "'").strip("*_ ")
    if not at_end:
        text = text.rstrip(",;:—–- ")
    says = any(c.isalpha() or c > "\u2190" for c in text)  # not just "1."
    return text if says and len(text) <= MAX_PHRASE_CHARS and text.isprintable() and not _UNFIT.search(text) else None
