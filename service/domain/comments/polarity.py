"""What a clause asks for and what it refuses: one scan from left to right that keeps which of the two stands."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.domain.comments import signs
from service.domain.comments.axes import COMPARATIVES, CONCEPT_STARTS, CONCEPTS, MAX_CONCEPT_WORDS, Concept
from service.domain.comments.signs import ASKED, NEITHER, REFUSED


def stances_of_clause(words: Sequence[str], *, after_refusal: bool) -> tuple[list[tuple[str, str]], bool]:
    """(axis, value) pairs of a clause, and whether it ends in a refusal that a list may go on with.

    Args:
        after_refusal: the clause before ended so: "no emoji, bullets or headings". Without an "or" it can't be told whether bullets are
            refused too, so nouns say nothing then.
    """
    is_listed = after_refusal and signs.SIGNALS.isdisjoint(words)
    goes_on = is_listed and ("or" in words or "nor" in words)
    scan = Scan(words, is_bare=_is_bare(words), sign=REFUSED if goes_on else NEITHER, is_listed=is_listed)
    return list(scan.stances()), scan.sign == REFUSED or is_listed


def _phrase_at(words: Sequence[str], at: int) -> str | None:
    """The longest concept that starts here."""
    if words[at] not in CONCEPT_STARTS:
        return None
    for size in range(min(MAX_CONCEPT_WORDS, len(words) - at), 0, -1):
        phrase = " ".join(words[at : at + size])
        if phrase in CONCEPTS:
            return phrase
    return None


def _is_bare(words: Sequence[str]) -> bool:
    at = 0
    while at < len(words):
        phrase = _phrase_at(words, at)
        if phrase is None and words[at] not in signs.BARE:
            return False
        at += len(phrase.split()) if phrase else 1
    return True


@dataclass(slots=True)
class Scan:
    """The scan of one clause, by what the words that it has passed leave standing."""

    words: Sequence[str]
    is_bare: bool
    """It is nothing but concepts."""
    sign: int = NEITHER
    is_listed: bool = False
    is_spent: bool = False
    """The sign has had its noun: others may join it by "and", but manners don't."""
    is_blocked: bool = False
    """What is refused is something we don't know ("no comments in code"): only a verb or a new refusal leads on."""
    prefers: bool = False
    describes: bool = False
    degree: bool = False
    """The word before was "too" or the like."""
    after_noun: bool = False
    of_other: bool = False
    """A thing passed that a manner after it may be of: "keep the title short"."""

    def stances(self) -> Iterator[tuple[str, str]]:
        """(axis, value) of each concept that the clause asks for or refuses."""
        at = 0
        while at < len(self.words):
            phrase = _phrase_at(self.words, at)
            if phrase is None:
                at += self._step(at)
                continue
            concept, end = CONCEPTS[phrase], at + len(phrase.split())
            if concept.is_noun:
                value = self._noun(concept, at, end)
                self.is_spent = True
                self.of_other = self.of_other or self._word(at - 1) in signs.DEFINITE
            else:
                value = self._manner(concept, phrase, at, end)
            if value is not None:
                yield concept.axis, value
            self.degree, self.after_noun = False, concept.is_noun
            at = end

    def _word(self, at: int) -> str:
        return self.words[at] if 0 <= at < len(self.words) else ""

    def _step(self, at: int) -> int:
        """Pass one word, or a pair, that is no concept; return how many."""
        word, before = self.words[at], self._word(at - 1)
        self.degree, self.after_noun = word in signs.DEGREES, False
        if (pair := f"{word} {self._word(at + 1)}") in signs.PAIRS:
            self._turn(signs.PAIRS[pair])
            return 2
        if word in signs.REMOVALS:
            self._turn(ASKED if self.sign == REFUSED and not self.is_spent else REFUSED)
        elif word in signs.REFUSALS or (word in ("over", "to") and self.prefers and self.is_spent):
            self._turn(REFUSED)
        elif word in signs.LACKS:
            self._turn(ASKED)
            self.describes = False
        elif word in signs.DESCRIBING:
            self.describes = True
        elif word in signs.WISHES:
            self.describes = False
        elif word in signs.ASKING and before not in signs.DETERMINERS:
            self._ask(word, at)
        elif word == "than":
            self._turn(NEITHER)
        elif word in ("or", "nor"):
            self.is_spent = False
        elif word in signs.CUES:
            if (self.sign == NEITHER and not self.is_blocked) or (word in signs.MORE and self.is_spent):
                self._turn(ASKED)
        elif word not in signs.NEUTRAL:
            self.is_blocked = self.is_blocked or (self.sign == REFUSED and not self.is_spent)
            self.sign, self.of_other = NEITHER, True
        return 1

    def _turn(self, sign: int) -> None:
        self.sign, self.is_spent, self.is_blocked = sign, False, False

    def _ask(self, verb: str, at: int) -> None:
        before = self._word(at - 1)
        self.prefers = self.prefers or verb in signs.PREFERRING
        if before == "you":
            self.describes = self._word(at - 2) not in signs.WISHES  # "why do you use", but "could you use"
        elif before not in signs.DESCRIBING:
            self.describes = False
        if before in ("and", "then"):
            self.of_other = False
        if self.sign != REFUSED or self.is_spent:
            self._turn(ASKED)

    def _noun(self, concept: Concept, at: int, end: int) -> str | None:
        before = self._word(at - 1)
        if self.describes and not signs.PAIRS.get(f"{self._word(at - 2)} {before}"):
            return None
        if concept.axis == "language" and not self._is_language(at, end):
            return None
        if concept.axis == "questions" and not self._is_question_to_user(before):
            return None
        if self.sign == REFUSED:
            return concept.opposite
        is_certain = before in signs.DEFINITE and "only" not in self.words and "just" not in self.words
        if is_certain or (concept.axis == "code" and before == "in"):
            return None
        return concept.value if self.sign == ASKED or (self.is_bare and not self.is_listed) else None

    def _is_question_to_user(self, before: str) -> bool:
        """ "Ask a question", but not "answer my question"."""
        is_asked = self.sign == REFUSED or not signs.QUESTION_CUES.isdisjoint(self.words)
        return is_asked and before not in signs.DEFINITE

    def _is_language(self, at: int, end: int) -> bool:
        """ "In German", but not "German cities"."""
        before = self._word(at - 1)
        is_second = before in ("or", "and") and self._word(at - 2) in CONCEPTS
        is_cued = before in signs.LANGUAGE_CUES or before in signs.REFUSALS or is_second or self.is_bare
        return is_cued and self._is_free(end)

    def _manner(self, concept: Concept, phrase: str, at: int, end: int) -> str | None:
        if not self._is_of_reply(phrase, at, end):
            return None
        if self._word(end) in ("enough", "genug"):
            return concept.value if self.sign == REFUSED else None
        if phrase not in COMPARATIVES and (self.degree or self.describes):
            return concept.opposite if self.degree else None
        if self.sign == REFUSED:
            return None if self.is_spent else concept.opposite
        return concept.value

    def _is_of_reply(self, phrase: str, at: int, end: int) -> bool:
        """Whether a manner is said of the replies: not "keep the title short", "the short answer is no" or "as long as"."""
        before = self._word(at - 1)
        if self._word(end) in signs.REPLIES:
            return before not in signs.DEFINITE
        if self.after_noun or self.of_other or not (phrase.endswith("ly") or self._is_free(end)):
            return False
        return before not in signs.TEMPORAL or list(self.words[end : end + 2]) == ["as", "possible"]

    def _is_free(self, end: int) -> bool:
        """Whether what stands before `end` is said of the replies, not of a thing that is named after it."""
        word = self._word(end)
        known = (signs.NEUTRAL, signs.CUES, signs.ASKING, signs.REFUSALS, CONCEPTS)
        return not word or any(word in vocabulary for vocabulary in known)
