"""The key under which guidelines that say the same in nearly the same words fall together."""

import re
import unicodedata

from service.domain.comments.reading import GOVERNING
from service.domain.comments.text import QUOTED, plain
from service.domain.comments.words import phrases, words

# Left out: they change nothing of what is asked. No negation is among them, nor may one ever be.
UNSAID = words("please pls plz kindly thanks thank thx bitte danke merci svp gracias grazie obrigado obrigada a an the")
UNSAID_PHRASES = phrases(
    """could you, can you, would you, will you, would you mind, i would like you to, i'd like you to, i want you to, make sure to,
    be sure to, try to, remember to, thank you, por favor, per favore, s'il te plaît, s'il vous plaît"""
)
SAME = {
    "answer": "reply",
    "response": "reply",
    "message": "reply",
    "output": "reply",
    "replie": "reply",
    "respond": "reply",
}
NEGATIONS = {
    "dont": "do not",
    "don't": "do not",
    "doesnt": "does not",
    "doesn't": "does not",
    "cannot": "can not",
    "can't": "can not",
}
CANONICAL_CHARS = 600

_MARKS = ".,!?;:…'\"“”„‘’«»()[]{}。，、！？；：।؟،"
_QUOTED = re.compile(QUOTED)
_HYPHEN = re.compile(r"(?<=\w)-(?=\w)")
_UNSAID = re.compile(rf"(?<!\S)(?:{'|'.join(sorted(map(re.escape, UNSAID_PHRASES), key=len, reverse=True))})(?!\S)")


def canonical(text: str) -> str:
    """A text without case, punctuation, politeness, articles, plurals; "answer" is "reply"; order, negation and quotations are kept."""
    key = _once(text)
    while (again := _once(key)) != key:
        key = again
    return key


def _once(text: str) -> str:
    line = unicodedata.normalize("NFKC", plain(text[:CANONICAL_CHARS])).casefold().replace("’", "'")
    kept: list[str] = []
    at = 0
    for match in _QUOTED.finditer(line):
        _add_words(kept, line[at : match.start()])
        kept.append(f'"{_quoted(match[0][1:-1])}"')
        at = match.end()
    _add_words(kept, line[at:])
    return " ".join(_UNSAID.sub(" ", " ".join(kept)).split())


def _quoted(phrase: str) -> str:
    """What the user speaks of stays, without marks around it if it is more than marks."""
    return " ".join((phrase.strip(_MARKS + " ") or phrase).replace('"', "'").split())


def _add_words(kept: list[str], line: str) -> None:
    for token in _HYPHEN.sub(" ", line).split():
        word = _word(token.strip(_MARKS))
        if word and (word not in UNSAID or (kept and kept[-1] in GOVERNING)):
            kept.append(word)


def _word(word: str) -> str:
    word = NEGATIONS.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "'s")):
        word = word[:-1]
    return SAME.get(word, word)
