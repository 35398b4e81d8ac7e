"""Which axes of style an instruction speaks of, and which way; two instructions contradict each other where they go different ways."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from service.domain.comments import signs
from service.domain.comments.polarity import stances_of_clause
from service.domain.comments.text import QUOTED, WORD

STANCE_CHARS = 300
"""No more of a text is read: as much as a guideline has."""
NOT = "not "
"""Before a value that is refused where no other one is asked for."""

# A quotation stands as this word, so that nothing in it is read.
_QUOTE = "\ue000"
_QUOTED = re.compile(QUOTED)
_POSTSCRIPT = re.compile(r"\bp\.?\s?s\b\.?(?!\w)", re.I)
_ABBREVIATED = re.compile(r"\b(max|min)\.", re.I)
_EXCUSES = re.compile(r"\b(?:if|when|where) (?:possible|you can|needed|necessary|you could)\b", re.I)
_SENTENCE = re.compile(r"[.!?…;]+(?=\s|$)|[。！？；।؟]+|\n")
_CLAUSE = re.compile(rf"{WORD.pattern}|[,:，、(]|\s[–—-]+\s")
_ELISION = re.compile(r"^[dl]'")
MAX_FEW_WORDS = 60
_PHRASE_WORDS = 5
_PHRASE_GAP = 9


def stances(text: str) -> dict[str, str]:
    """Axis -> value of all that an instruction takes a stance on; an axis of which it speaks both ways is left out."""
    return dict(_stances(text[:STANCE_CHARS]))


def contradicts(older: str, newer: str) -> bool:
    """Whether no reply can follow both: "more detail" and "shorter", two different closing phrases, three sentences and one."""
    mine, theirs = _stances(older[:STANCE_CHARS]), _stances(newer[:STANCE_CHARS])
    return any(_clash(axis, mine[axis], theirs[axis]) for axis in mine.keys() & theirs.keys())


def phrase_key(phrase: str) -> str:
    """An opening or closing phrase without case and punctuation, as its axis holds it."""
    return " ".join(WORD.findall(phrase.casefold())) or phrase.strip()


# A new guideline is compared with each of the user's old ones, which are read again at every feedback.
@lru_cache(maxsize=4096)
def _stances(text: str) -> Mapping[str, str]:
    quotes = [m[0][1:-1] for m in _QUOTED.finditer(text)]
    text = _QUOTED.sub(f" {_QUOTE} ", text.replace(_QUOTE, " "))
    text = _EXCUSES.sub(" ", _ABBREVIATED.sub(r"\1", _POSTSCRIPT.sub("postscript", text.replace("’", "'"))))
    found: dict[str, set[str]] = {}
    for sentence in _SENTENCE.split(text):
        words = WORD.findall(sentence)
        said_here = iter([quotes.pop(0) for _ in range(min(words.count(_QUOTE), len(quotes)))])
        if not signs.CONDITIONS.isdisjoint(w.casefold() for w in words):
            continue  # it speaks of some replies only
        for axis, value in (*_phrases(words, said_here), *_of_clauses(sentence)):
            found.setdefault(axis, set()).add(value)
    resolved = {axis: _resolve(values) for axis, values in found.items()}
    return {axis: value for axis, value in resolved.items() if value is not None}


def _of_clauses(sentence: str) -> Iterator[tuple[str, str]]:
    after_refusal = False
    for words in _clauses(sentence):
        pairs, refuses = stances_of_clause(words, after_refusal=after_refusal and words[0] not in signs.CONTRASTS)
        yield from pairs
        yield from _counts(words)
        after_refusal = refuses


def _clauses(sentence: str) -> Iterator[list[str]]:
    clause: list[str] = []
    for token in _CLAUSE.findall(sentence.casefold()):
        ends = not WORD.match(token)
        if clause and (ends or token in signs.CONTRASTS):
            yield clause
            clause = []
        if not ends:
            clause.extend(_ELISION.sub("", token).split("-"))
    if clause:
        yield clause


def _counts(words: list[str]) -> Iterator[tuple[str, str]]:
    """ "At most three sentences": intervals of sentences or paragraphs; of words only whether few or many are wanted."""
    for at, word in enumerate(words):
        unit, count = signs.COUNTED.get(word), _number(words[at - 1]) if at else None
        if unit is None or not count or words[at + 1 : at + 2] in (["per"], ["about"], ["each"], ["of"], ["long"]):
            continue
        before, after = words[max(0, at - 7) : at - 1], words[at + 1 : at + 3]
        if not signs.COUNTED.keys().isdisjoint(before) or (relation := _relation(before, after)) is None:
            continue
        if relation == "<":
            relation, count = "<=", max(1, count - 1)
        if unit != "words":
            yield unit, f"{relation}{count}"
        few = {"words": MAX_FEW_WORDS, "sentences": 2, "paragraphs": 0}[unit]
        if relation == ">=":
            yield "length", "longer"
        elif count <= few or (relation == "<=" and unit == "words"):
            yield "length", "shorter"


def _number(word: str) -> int | None:
    return int(word[:6]) if word.isascii() and word.isdigit() else signs.NUMBERS.get(word)


def _relation(before: list[str], after: list[str]) -> str | None:
    """How a number stands to what is wanted: "<", "<=", ">=", "" for just that many, None if it is not wanted at all."""
    refuses = not (signs.REFUSALS - signs.UNDER | signs.REMOVALS).isdisjoint(before)
    last, pair_after = before[-1] if before else "", tuple(after[:2])
    is_range = _number(last) or (last in ("to", "or") and _number(" ".join(before[-2:-1])))
    relation: str | None = ""
    if is_range or pair_after in signs.OR_LESS or not signs.AT_MOST.isdisjoint([*before, *after[:1]]):
        relation = "<="
    elif not signs.UNDER.isdisjoint(before):
        relation = "<"
    elif pair_after in signs.OR_MORE or not signs.AT_LEAST.isdisjoint(before):
        relation = ">="
    elif last in signs.OTHERWISE_COUNTED or "add" in before or not signs.DESCRIBING.isdisjoint(before):
        relation = None
    if refuses and relation != "<=":
        return "<=" if relation == ">=" and "least" not in before else None  # "no more than"
    return relation


def _phrases(words: list[str], quotes: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Opening and closing phrases: 'end with "Cheers!"', 'put "Ahoy" at the start'."""
    folded = [w.casefold() for w in words]
    verb_at: int | None = None
    for at, word in enumerate(folded):
        if word in signs.OPENERS or word in signs.CLOSERS:
            verb_at = at
        near = verb_at is not None and at - verb_at <= _PHRASE_GAP
        phrase = None
        if word == _QUOTE:
            phrase = next(quotes, None)
        elif near and word in ("with", "by") and words[at + 1 : at + 2] and _QUOTE not in folded[at:]:
            phrase = _unquoted(words[at + 1 :])
        if phrase is None:
            continue
        if near and verb_at is not None:
            axis = "opening" if folded[verb_at] in signs.OPENERS else "closing"
            refused = signs.REFUSALS.union(signs.REMOVALS, {"need"}).intersection(folded[max(0, verb_at - 3) : verb_at])
        elif place := {"start", "beginning", "end"}.intersection(folded[at + 1 : at + 6]):
            axis = "closing" if "end" in place else "opening"
            refused = signs.REFUSALS.union(signs.REMOVALS).intersection(folded[max(0, at - 3) : at])
        else:
            continue
        yield axis, (NOT if refused else "") + phrase_key(phrase)
        verb_at = None


def _unquoted(words: list[str]) -> str | None:
    """ "Cheers" of "end with Cheers": a phrase in capitals, without an article or a name for what it is."""
    if len(words) > _PHRASE_WORDS or not words[0][0].isupper():
        return None
    return " ".join(words)


def _resolve(values: set[str]) -> str | None:
    """One value: the only one that is asked for, if it is not refused too, or else the only one that is refused."""
    asked = {v for v in values if not v.startswith(NOT)}
    if len(asked or values) > 1:
        return None
    (value,) = asked or values
    return None if NOT + value in values else value


def _clash(axis: str, older: str, newer: str) -> bool:
    if axis in ("sentences", "paragraphs"):
        (low, high), (other_low, other_high) = _interval(older), _interval(newer)
        return high < other_low or other_high < low
    if older.startswith(NOT) or newer.startswith(NOT):
        return older == NOT + newer or newer == NOT + older
    return older != newer


def _interval(value: str) -> tuple[int, float]:
    if value.startswith("<="):
        return 0, int(value[2:])
    if value.startswith(">="):
        return int(value[2:]), float("inf")
    return int(value), int(value)
