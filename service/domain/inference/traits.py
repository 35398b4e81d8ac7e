"""What can be counted in one reply."""

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from service.domain.comments.words import words
from service.domain.inference.language import language_of

READ_CHARS = 2000
"""No more of a reply is read for its traits; its length in words is that of the whole."""
END_CHARS = 400
# Fewer letters at its start are no evidence of a reply's case.
MIN_CASED_LETTERS = 10
MAX_TITLE_WORDS = 8

SLANG = words(
    """hey yeah yep yup nope gonna wanna gotta kinda sorta dunno lemme gimme lol haha omg btw dude bro cool awesome stuff folks y'all ain't
    cuz cya super totally oops"""
)
FORMAL = words(
    """dear sir madam sincerely regards furthermore moreover therefore thus hereby kindly shall pursuant accordingly consequently
    nevertheless henceforth respectfully esteemed"""
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_CONTRACTION = re.compile(r"n['’]t$|['’](?:re|ve|ll|m|d)$|^(?:it|that|there|here|what|let|he|she|who|where|how)['’]s$")
_SENTENCE_END = re.compile(r"(?<![\s.]\w)[.!?…]+(?=[\s\"'’”)\]]|$)|[。！？।]|\n+")
_BULLET = re.compile(r"^[^\S\n]{0,12}[-*+•‣◦–][^\S\n]+\S", re.M)
_NUMBERED = re.compile(r"^[^\S\n]{0,12}\d{1,3}[.)][^\S\n]+\S", re.M)
_EMOJI = re.compile(r"[\U0001f300-\U0001faff\u2600-\u27bf\u2b50]")
_POSTSCRIPT = re.compile(r"^\W{0,4}p\.?\s?s\b", re.I | re.M)
_TITLE = re.compile(r"#{1,6} \S|\*\*[^*\n]+\*\*\s*$|<<[^<>\n]+>>")
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“"}

Case = Literal["lower", "upper", "normal"]


class Traits(NamedTuple):
    """Counts and marks of one reply."""

    words: int
    sentences: int
    bullets: int
    """Lines that begin with a bullet."""
    numbered: int
    case: Case | None
    """None with too few letters to tell."""
    commas: int
    exclamations: int
    emoji: int
    casual: int
    """Contractions and slang."""
    formal: int
    has_code: bool
    is_quoted: bool
    has_title: bool
    has_postscript: bool
    asks: bool
    """It ends with a question."""
    language: str | None


# A user's corrections are compared anew with each further one.
@lru_cache(4096)
def traits_of(text: str) -> Traits:
    text = text.strip()
    read = text[:READ_CHARS]
    folded = [w.casefold() for w in _WORD.findall(read)]
    return Traits(
        words=len(text.split()),
        sentences=sum(1 for part in _SENTENCE_END.split(read) if part and any(c.isalnum() for c in part)),
        bullets=len(_BULLET.findall(read)),
        numbered=len(_NUMBERED.findall(read)),
        case=_case(read),
        commas=sum(map(read.count, ",，、")),
        exclamations=sum(map(read.count, "!！")),
        emoji=len(_EMOJI.findall(read)),
        casual=sum(1 for w in folded if w in SLANG or (not w.isalpha() and _CONTRACTION.search(w))),
        formal=sum(1 for w in folded if w in FORMAL),
        has_code="```" in read,
        is_quoted=len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1],
        has_title=_has_title(read),
        has_postscript=_POSTSCRIPT.search(text[-END_CHARS:]) is not None,
        asks=text[-END_CHARS:].rstrip("\"'”’)*_ ").endswith(("?", "？", "؟")),
        language=language_of(read),
    )


def _case(text: str) -> Case | None:
    has_upper, has_lower = text != text.lower(), text != text.upper()
    if not (has_upper or has_lower) or sum(map(str.isalpha, text[:100])) < MIN_CASED_LETTERS:
        return None
    return "normal" if has_lower and has_upper else "lower" if has_lower else "upper"


def _has_title(text: str) -> bool:
    """A heading, or a short first line without a sentence's end and with a blank line after it."""
    first, _, rest = text.partition("\n")
    if not rest.strip():
        return False
    if _TITLE.match(first):
        return True
    ends = first.rstrip()[-1:] in ".!?,:;…。"
    return rest.startswith("\n") and len(first.split()) <= MAX_TITLE_WORDS and not ends and not _BULLET.match(first)
