"""From pairs of replies to candidate guidelines: each rule asks in how many pairs what was wanted has something that was not got."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from service.domain.comments import phrase_key
from service.domain.inference.phrases import Phrase, common_phrase, without
from service.domain.inference.traits import Traits, traits_of

MAX_PAIRS = 64
"""Only the last so many are looked at."""
MAX_CANDIDATES = 8
MIN_SUPPORT = 2

# Of what was unwanted, so much would be expected by chance in the wanted reply before its absence says something.
MIN_EXPECTED = 0.5
# Wanted replies of at most this share of the unwanted ones' words are shorter on purpose.
SHORTER = 0.75
# Most wanted replies are within the limit that is asked for, not all: one long one must not raise it.
WITHIN = 0.8
SLACK = 1.1
MAX_COUNTED_SENTENCES = 4


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, the one that the user wanted and the one that they did not."""

    prompt: str
    wanted: str
    unwanted: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guideline that may explain what was wanted."""

    text: str
    axis: str
    value: str
    """As `stances` reads the text on this axis."""
    shareable: bool
    """It is of our own words, so that it may be shown to another user."""
    support: int
    """Pairs whose wanted reply has it and whose unwanted one does not."""
    against: int
    """Pairs whose wanted reply does not have it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A guideline and whether a reply follows it; None where that can't be told."""

    axis: str
    value: str
    text: str
    holds: Callable[[Traits], bool | None]
    amount: Callable[[Traits], int] | None = None
    """For rules of absence: how much of it a reply has. A short reply may lack it by chance."""


RULES = (
    Rule("bullets", "yes", "Use bullet points.", lambda t: t.bullets > 1),
    Rule("bullets", "numbered", "Use a numbered list.", lambda t: t.numbered > 1),
    Rule(
        "bullets", "no", "Write in prose, without bullet points or lists.",
        lambda t: not t.bullets and not t.numbered, lambda t: t.bullets + t.numbered,
    ),
    Rule("case", "lower", "Write everything in lowercase letters.", lambda t: t.case and t.case == "lower"),
    Rule("case", "upper", "Write everything in capital letters.", lambda t: t.case and t.case == "upper"),
    Rule("case", "normal", "Use normal capitalization.", lambda t: t.case and t.case == "normal"),
    Rule("commas", "no", "Use no commas.", lambda t: not t.commas, lambda t: t.commas),
    Rule("exclamation", "yes", "Use exclamation marks.", lambda t: t.exclamations > 0),
    Rule("exclamation", "no", "Use no exclamation marks.", lambda t: not t.exclamations, lambda t: t.exclamations),
    Rule("emoji", "yes", "Use emoji.", lambda t: t.emoji > 0),
    Rule("emoji", "no", "Use no emoji.", lambda t: not t.emoji, lambda t: t.emoji),
    Rule("questions", "yes", "End with a question.", lambda t: t.asks),
    Rule("questions", "no", "Do not end with a question.", lambda t: not t.asks),
    Rule("postscript", "yes", "Add a P.S. at the end.", lambda t: t.has_postscript),
    Rule("postscript", "no", "Add no P.S. at the end.", lambda t: not t.has_postscript),
    Rule("title", "yes", "Begin with a title line.", lambda t: t.has_title),
    Rule("title", "no", "Write no title.", lambda t: not t.has_title),
    Rule("quotes", "yes", "Put the whole reply in quotation marks.", lambda t: t.is_quoted),
    Rule("quotes", "no", "Do not put the reply in quotation marks.", lambda t: not t.is_quoted),
    Rule("code", "yes", "Include a code block.", lambda t: t.has_code),
    Rule("code", "no", "Write without code.", lambda t: not t.has_code),
    Rule("formality", "casual", "Write casually, with contractions.", lambda t: t.casual > t.formal),
    Rule("formality", "formal", "Write in a formal style.", lambda t: t.formal > t.casual),
    Rule("formality", "formal", "Write formally, without contractions.", lambda t: not t.casual, lambda t: t.casual),
)  # fmt: skip


def infer(pairs: Sequence[Pair]) -> list[Candidate]:
    """At most `MAX_CANDIDATES` candidate guidelines, strongest first; the same whatever the order of the pairs."""
    replies = [
        (pair.wanted, pair.unwanted) for pair in pairs[-MAX_PAIRS:] if pair.wanted.strip() and pair.unwanted.strip()
    ]
    if len(replies) < MIN_SUPPORT:
        return []
    found: list[Candidate] = []
    for axis, at_end in (("closing", True), ("opening", False)):
        if phrase := common_phrase(replies, at_end=at_end):
            found.append(_quoting(axis, phrase))
            # What the phrase itself has (an exclamation mark, say) is no trait of the rest.
            replies = [(without(wanted, phrase.key, at_end=at_end), unwanted) for wanted, unwanted in replies]
    traits = [(traits_of(wanted), traits_of(unwanted)) for wanted, unwanted in replies]
    judged = (_judge(rule, traits) for rule in (*_length(traits), *_sentences(traits), *_language(traits), *RULES))
    found.extend(candidate for candidate in judged if candidate is not None)
    strongest: dict[tuple[str, str], Candidate] = {}
    for candidate in sorted(found, key=lambda c: (c.against - c.support, -c.support)):
        strongest.setdefault((candidate.axis, candidate.value), candidate)
    return list(strongest.values())[:MAX_CANDIDATES]


def _quoting(axis: str, phrase: Phrase) -> Candidate:
    verb = "End" if axis == "closing" else "Begin"
    return Candidate(
        text=f'{verb} every reply with "{phrase.text}"',
        axis=axis,
        value=phrase_key(phrase.text),
        shareable=False,
        support=phrase.support,
        against=phrase.against,
    )


def _judge(rule: Rule, traits: Sequence[tuple[Traits, Traits]]) -> Candidate | None:
    """The rule as a candidate, if a clear majority differs by it and not already most unwanted replies follow it."""
    support = against = already = 0
    for wanted, unwanted in traits:
        follows, followed = rule.holds(wanted), rule.holds(unwanted)
        already += followed is True
        if follows is False:
            against += 1
        elif follows and followed is False and _is_telling(rule, wanted, unwanted):
            support += 1
    if support < MIN_SUPPORT or support < 2 * against or 2 * already > len(traits):
        return None
    return Candidate(rule.text, rule.axis, rule.value, shareable=True, support=support, against=against)


def _is_telling(rule: Rule, wanted: Traits, unwanted: Traits) -> bool:
    """Whether a wanted reply as rich as the unwanted one would have had some of what it lacks."""
    return rule.amount is None or rule.amount(unwanted) * wanted.words >= MIN_EXPECTED * max(unwanted.words, 1)


def _length(traits: Sequence[tuple[Traits, Traits]]) -> Iterator[Rule]:
    shorter = sorted(w.words for w, u in traits if w.words <= SHORTER * u.words)
    if shorter:
        most = _rounded(shorter[int(WITHIN * (len(shorter) - 1))], up=True)
        yield Rule("length", "shorter", f"Keep replies under about {most} words.", lambda t: t.words <= SLACK * most)
    longer = sorted(w.words for w, u in traits if u.words <= SHORTER * w.words)
    if longer:
        least = _rounded(longer[-1 - int(WITHIN * (len(longer) - 1))], up=False)
        yield Rule("length", "longer", f"Write at least about {least} words.", lambda t: t.words * SLACK >= least)


def _rounded(words: int, *, up: bool) -> int:
    step = 5 if words < 50 else 10 if words < 100 else 50
    return max(step, (words + (step if up else 0)) // step * step)


def _sentences(traits: Sequence[tuple[Traits, Traits]]) -> Iterator[Rule]:
    counts = Counter(w.sentences for w, _ in traits)
    count = min(counts, key=lambda n: (-counts[n], n))
    if 1 <= count <= MAX_COUNTED_SENTENCES:
        number = ("one sentence", "two sentences", "three sentences", "four sentences")[count - 1]
        yield Rule(
            "sentences",
            str(count),
            f"Answer in {number}.",
            lambda t: None if t.bullets + t.numbered > 1 else t.sentences == count,
        )


def _language(traits: Sequence[tuple[Traits, Traits]]) -> Iterator[Rule]:
    names = Counter(w.language for w, _ in traits if w.language)
    if names:
        name = min(names, key=lambda n: (-names[n], n))
        yield Rule(
            "language",
            name.casefold(),
            f"Reply in {name}.",
            lambda t: None if t.language is None else t.language == name,
        )
