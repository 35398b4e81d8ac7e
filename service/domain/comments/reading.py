"""What a comment asks for, in the user's own words, or how good it finds the reply.

A comment is read as sentences and clauses. What is only courtesy, praise or blame goes from the ends of a sentence, and with it the
politeness around what is left. Nothing is added but the marks between sentences that were lines.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from service.domain.comments.quality import quality, total
from service.domain.comments.text import QUOTED, WORD, plain
from service.domain.comments.words import phrases, words

MAX_WORDS = 30
MAX_CHARS = 300
"""For scripts without spaces."""

# Further boundaries are not looked at: what they part is read as one clause.
MAX_BOUNDARIES = 40

POLITE_STARTS = phrases(
    """please, pls, plz, kindly, thanks, thank you, thx, hi, hello, hey, ok, okay, well, so, um, uh, hmm, but, however, and,
    also, oh, sorry, could you, can you, would you, will you, would you mind, do you mind, i'd like you to,
    i would like you to, i want you to, i need you to, i'd love it if you could, i'd love you to,
    i'd appreciate it if you could, i would appreciate it if you could, i wish you would, i wish you could,
    i'd prefer it if you, it would be great if you could, it would be nice if you could, it would be better if you,
    it'd be great if you could, it'd be nice if you could, if you could, if possible, if you can, i think, i feel, i guess,
    in my opinion, imo, imho, maybe you could, perhaps you could, maybe, perhaps, you should, you could, you need to,
    you must, you have to, be sure to, make sure to, make sure you, make sure that you, try to, remember to, feedback,
    just a thought, one thing, yes, yeah, bitte, danke, hallo, könntest du, könnten sie, kannst du, können sie, würdest du,
    aber, und, ich möchte dass du, merci, bonjour, salut, s'il te plaît, s'il vous plaît, svp, stp, peux-tu, pouvez-vous,
    pourrais-tu, pourriez-vous, mais, por favor, gracias, hola, pero, puedes, podrías, podría, per favore, ciao, potresti,
    puoi, obrigado, obrigada, olá, mas, você pode, você poderia, пожалуйста"""
)
# Written without a blank after them.
POLITE_STARTS_UNSPACED = phrases("请你, 请您, 请, 麻烦你, 谢谢, 你好")
POLITE_ENDS = phrases(
    """please, pls, plz, thanks, thank you, thank you so much, thank you very much, thanks a lot, many thanks, thx, ty, ok,
    okay, cheers, if possible, if you can, if you could, if that's ok, if that is ok, sorry, bitte, danke, merci, svp, stp,
    s'il te plaît, s'il vous plaît, por favor, gracias, per favore, grazie, obrigado, obrigada, пожалуйста"""
)
# After these such a word is what the user speaks of: "end with thanks".
GOVERNING = words(
    """say says saying with without write writing word words use using the a an of no or and my me your more less include add skip drop
    avoid never always don't not about than for to mit ohne kein avec sans con sin"""
)
_REQUEST = re.compile(r"\b(?:could|can|would|will|do|k[aö]nn|würd|peux|pouv|pour|pued|podr|pot|puoi)", re.I)


def _any_of(alternatives: frozenset[str]) -> str:
    longest_first = sorted(alternatives, key=lambda p: (-len(p), p))
    return "|".join(re.escape(p).replace("'", "['’]") for p in longest_first)


_START = re.compile(
    rf"(?:(?:{_any_of(POLITE_STARTS)})(?![\w'’/-])|(?:{_any_of(POLITE_STARTS_UNSPACED)})++"
    r"|[\s,;:!?…–—)\]}，、。！？；：।؟]|\.(?=[\s.])|-(?=\s))++",
    re.I,
)
_END = re.compile(rf"(?<![\s,:–—-])[\s,:–—-]++(?:{_any_of(POLITE_ENDS)})\s*$", re.I)
_END_CHARS = 60
_LOOSE_END = " ,;:–—-，、；："
_CONNECTORS = "but|however|although|though|aber|mais|pero"
_BOUNDARY = re.compile(
    r"(?=[^\w\-/()])(?:"  # a quick no for most characters
    rf"(?P<quoted>{QUOTED})"
    r"|(?P<sentence>[.!?…;]++(?=\s|$)|[。！？；।؟۔]++|\n)"
    r"|(?P<clause>[,:](?=\s)|[，、：،]|\s[–—-]++(?=\s)"
    rf"|(?<!nothing)(?<!anything)(?<!all)\s(?=(?i:{_CONNECTORS})\s)))"
)
_CUT = re.compile(r"[.!?…;,:](?=\s|$)|[。！？；।؟۔，、：،]")
_UNSPACED_MARKS = "。！？；"


class Reading(NamedTuple):
    """A comment as an instruction or as a rating; neither, but never both."""

    guideline: str | None
    rating: float | None


class Sentence(NamedTuple):
    """A stretch of a text: (start, end) of its clauses, and the mark that closes it."""

    clauses: list[tuple[int, int]]
    mark: str


# One comment is read for its guideline, for its rating, and as what stood before the next one.
@lru_cache(256)
def read(comment: str) -> Reading:
    """Read a comment until nothing changes: what is taken away may uncover more of the kind, so a guideline reads as itself."""
    text = comment
    while True:
        line, rating = _read_once(text)
        if not line or line == text:
            return Reading(line or None, None if line else rating)
        text = line


def guideline_text(comment: str) -> str | None:
    """The comment as one line of at most 30 words and 300 characters in the user's wording; None if it asks for nothing specific."""
    return read(comment).guideline


def implied_rating(comment: str) -> float | None:
    """The rating that unspecific praise or blame amounts to: ±1, ±0.5 for weak words; None if specific, mixed or about nothing."""
    return read(comment).rating


def _read_once(comment: str) -> tuple[str, float | None]:
    text = plain(comment)
    line = ""
    scores: list[float] = []
    for sentence in _sentences(text):
        if len(line) > MAX_CHARS or line.count(" ") > MAX_WORDS:
            break
        body = _instruction(text, sentence, scores)
        if body:
            if line:
                line += ("" if line[-1] in ".!?…" + _UNSPACED_MARKS else ";") + (
                    "" if line[-1] in _UNSPACED_MARKS else " "
                )
            line += body
    rating = total([s for s in scores if s])
    return _cut(" ".join(line.split()).rstrip(_LOOSE_END)), rating or None


def _sentences(text: str) -> Iterator[Sentence]:
    clauses: list[tuple[int, int]] = []
    start = 0
    for match in islice(_BOUNDARY.finditer(text), MAX_BOUNDARIES):
        if match.lastgroup == "quoted":
            continue
        clauses.append((start, match.start()))
        start = match.end()
        if match.lastgroup == "sentence":
            yield Sentence(clauses, match[0].strip())
            clauses = []
    yield Sentence([*clauses, (start, len(text))], "")


def _instruction(text: str, sentence: Sentence, scores: list[float]) -> str:
    """What a sentence asks for, without praise, blame and courtesy at its ends; their scores go to `scores`."""
    said = [quality(text[start:end]) for start, end in sentence.clauses]
    scores.extend(s for s in said if s is not None)
    specific = [i for i, s in enumerate(said) if s is None]
    if not specific:
        return ""
    first, last = sentence.clauses[specific[0]][0], sentence.clauses[specific[-1]][1]
    body, is_request = _without_politeness(text[first:last])
    if not WORD.search(body):
        return ""
    mark = sentence.mark.rstrip(";；")
    asks_no_more = is_request or specific[-1] < len(said) - 1
    return body + ("." if asks_no_more and mark.startswith("?") else mark)


def _without_politeness(clause: str) -> tuple[str, bool]:
    """A clause without the politeness around it, and whether only that made a question of it: "could you be brief?"."""
    start = match.end() if (match := _START.match(clause)) else 0
    is_request = _REQUEST.search(clause[:start]) is not None
    body = clause[start:].rstrip(_LOOSE_END)
    while match := _END.search(body, max(0, len(body) - _END_CHARS)):
        before = WORD.findall(body[max(0, match.start() - _END_CHARS) : match.start()])
        if before and before[-1].casefold() in GOVERNING:
            break
        body, is_request = body[: match.start()].rstrip(_LOOSE_END), True
    return body, is_request


def _cut(text: str) -> str:
    """The text within the limits, at the end of a sentence or clause if that keeps half of what fits, else at a word's."""
    head = " ".join(text.split(" ")[:MAX_WORDS])
    if len(head) > MAX_CHARS:
        space = head.rfind(" ", 0, MAX_CHARS + 1)
        head = head[:space] if space > 0 else head[:MAX_CHARS]
    if len(head) == len(text):
        return text
    ends = [m.end() for m in _CUT.finditer(head, len(head) // 2)]
    return (head[: ends[-1]] if ends else head).rstrip(_LOOSE_END)
