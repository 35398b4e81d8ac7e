"""The questions, with a plain answer to each; training and test questions have no topic in common. And whether a reply answers one."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

STEM_CHARS = 4
FEWEST_WORDS = 3
LOOP_WORDS = 3
LOOP_TIMES = 3
COPIED_SHARE = 0.75
# Words that say nothing of the topic.
STOP_WORDS = """
    a about after all also an and any are as at be because been but by can could do does for from get give good had has have he her
    his how i if in into is it its just like make me more most much my no not of on one only or other our out over question same say she
    so some such than that the their them then there these they thing this those to up use very was way we were what when where which
    who why will with would you your
"""
STOP = frozenset(re.findall(r"\w+", STOP_WORDS))


@dataclass(frozen=True)
class Prompt:
    """A question with a plain answer: one sentence, and one more."""

    topic: str
    ask: str
    answer: str
    more: str

    @property
    def plain(self) -> str:
        return f"{self.answer} {self.more}"


def load() -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Training and test questions."""
    found = json.loads(Path(__file__).with_name("prompts.json").read_text())
    train, test = (tuple(Prompt(**row) for row in found[part]) for part in ("train", "test"))
    if {p.topic for p in train} & {p.topic for p in test}:
        raise ValueError("training and test questions share a topic")
    return train, test


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def stems(text: str) -> frozenset[str]:
    """The beginnings of the words that say something of the topic."""
    return frozenset(word[:STEM_CHARS] for word in words(text) if word not in STOP and len(word) > 1)


def loops(text: str) -> bool:
    """Whether the text says the same few words again and again."""
    said = words(text)
    runs = Counter(zip(*(said[i:] for i in range(LOOP_WORDS)), strict=False))
    return any(times >= LOOP_TIMES for times in runs.values())


def answers(reply: str, prompt: Prompt, taught: Iterable[Prompt]) -> bool:
    """Whether a reply is about its question: long enough, on its topic, no loop, and no copy of an answer to another question."""
    said = stems(reply)
    if len(words(reply)) < FEWEST_WORDS or loops(reply) or not said & stems(f"{prompt.ask} {prompt.plain}"):
        return False
    return not any(
        len(said & stems(other.plain)) >= COPIED_SHARE * len(said) for other in taught if other.topic != prompt.topic
    )
