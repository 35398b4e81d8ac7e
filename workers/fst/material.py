"""What contexts are made of: good replies found so far, and what the verifier says of the others."""

import re
from collections.abc import Iterable
from typing import Self

from service.domain.feedback import Frozen
from workers.fst.contexts import Shown

# What a good reply earns at least. Some verifiers give a few hundredths for a reply that only holds the answer somewhere.
GOOD = 0.2
# Good replies kept, the best and then the newest.
MOST_FOUND = 48
# Good replies to choose exemplars from: when the task changes, those of the old one must make room soon.
MOST_SHOWN = 12
# Sentences of feedback kept, those that were said last.
MOST_SAID = 64
# Advice in a verdict is a sentence or two; a longer one is about this one reply.
MOST_WORDS = 40
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+|;\s+")
# What a reply was like. Several replies draw the same, but it tells nobody what to do.
OF_THE_REPLY = re.compile(r"(?:But|It|The reply)\b")


class Found(Frozen):
    """A good reply."""

    shown: Shown
    reward: float
    at: int
    """The sample's number: newer ones win a tie."""


class Said(Frozen):
    """A sentence of feedback, with the problems whose replies drew it (the first few)."""

    text: str
    problems: tuple[str, ...]


class Material(Frozen):
    """Grows with every scored reply; immutable, so that a checkpoint holds it as it was."""

    found: tuple[Found, ...] = ()
    said: tuple[Said, ...] = ()

    def with_reply(self, *, problem: str, prompt: str, reply: str, reward: float, feedback: str, at: int) -> Self:
        """With one more scored reply: the best one of each problem is kept, and what was said of it where it was not all right."""
        found, said = self.found, self.said
        if reward >= GOOD and reply.strip():
            others = tuple(f for f in found if f.shown.prompt != prompt)
            rival = next((f for f in found if f.shown.prompt == prompt), None)
            if rival is None or reward >= rival.reward:
                new = Found(shown=Shown(prompt=prompt, reply=reply.strip()), reward=reward, at=at)
                found = tuple(sorted((*others, new), key=lambda f: (-f.reward, -f.at))[:MOST_FOUND])
        if reward < 1.0:
            said = _heard(said, problem, sentences(feedback))
        return self.model_copy(update={"found": found, "said": said})

    @property
    def advice(self) -> tuple[Said, ...]:
        """Sentences that replies to several problems drew: what is said of one problem alone holds its answer, not a rule."""
        return tuple(said for said in self.said if len(said.problems) > 1)

    @property
    def good(self) -> tuple[Found, ...]:
        """Good replies that are worth showing: the newest of those as good as the best."""
        best = self.found[0].reward if self.found else 0.0
        return tuple(f for f in self.found if f.reward >= best)[:MOST_SHOWN]


def sentences(feedback: str) -> list[str]:
    """The sentences of a feedback that could be guidelines, without what introduces them ("Not held: ...")."""
    parts = (part.strip().rpartition(": ")[2] for part in SENTENCE.split(feedback))
    return [part for part in parts if 2 < len(part.split()) <= MOST_WORDS and not OF_THE_REPLY.match(part)]


def _heard(said: tuple[Said, ...], problem: str, texts: Iterable[str]) -> tuple[Said, ...]:
    """The newest last."""
    by_text = {s.text: s for s in said}
    for text in texts:
        before = by_text.pop(text, Said(text=text, problems=())).problems
        by_text[text] = Said(text=text, problems=before if problem in before else (*before, problem)[:MOST_FOUND])
    return tuple(by_text.values())[-MOST_SAID:]
