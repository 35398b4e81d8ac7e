"""House norms: everyday questions whose replies should have a certain form, as a company asks of all that it writes.

`norms:<name>` asks the question alone: that there are norms shows in the verdicts only, for contexts and weights to learn.
`norms-told:<name>` says them after the question, for a model that begins to follow when it is told.
"""

import functools
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from service.domain.norms import Norm, checked
from service.verifiers.norms import adherence
from service.verifiers.problems import TEST_SHARE, Problem, Split, Task, Verdict, problem_id

PREFIX, TOLD_PREFIX = "norms:", "norms-told:"
FEWEST_WORDS = 2
# So many same words in a row, so often: a model that has caught itself in a loop.
LOOP_WORDS, LOOP_TIMES = 4, 3


def _norms(**checkers: dict[str, Any]) -> tuple[Norm, ...]:
    return checked([Norm(name=name, checker=name, arguments=arguments) for name, arguments in checkers.items()])


HOUSES: dict[str, tuple[Norm, ...]] = {
    "brief": _norms(max_sentences={"sentences": 1}, max_words={"words": 20}),
    "lowercase": _norms(lowercase={}, max_words={"words": 40}),
    "short-quoted": _norms(quoted={}, max_words={"words": 40}),
    "sign-off": _norms(ends_with={"phrase": "Cheers!"}, max_sentences={"sentences": 3}),
    "greeting": _norms(starts_with={"phrase": "Good question"}, max_words={"words": 40}),
    "no-commas": _norms(no_commas={}, min_words={"words": 8}, max_words={"words": 40}),
    "bullets": _norms(bullets={"at_least": 3}, max_words={"words": 60}),
    "memo": _norms(title={}, bullets={"at_least": 2}, no_commas={}, max_words={"words": 60}),
    "brief-json": _norms(json={"keys": ["answer"]}, max_words={"words": 30}),
}
NAMES = tuple(prefix + name for prefix in (PREFIX, TOLD_PREFIX) for name in HOUSES)


@dataclass(frozen=True)
class Question:
    """One everyday question."""

    ask: str
    topic: tuple[str, ...]
    """Beginnings of words of which an answer has at least one."""


@functools.cache
def questions() -> tuple[Question, ...]:
    rows = json.loads((files("service.verifiers") / "questions.json").read_text(encoding="utf-8"))
    return tuple(Question(row["ask"], tuple(row["topic"])) for row in rows)


@dataclass(frozen=True)
class House:
    """Everyday questions under the norms of one house."""

    name: str
    norms: tuple[Norm, ...]
    told: bool

    @property
    def about(self) -> str:
        return f"Everyday questions, answered as the house asks{'' if self.told else ' without saying so'}: {self._rules()}"

    def problems(self, split: Split, *, count: int, seed: int) -> list[Problem]:
        """See `Task`; there are a hundred questions, a fifth of them to test with."""
        rng = random.Random(f"{self.name} {split} {seed}")
        found: list[Problem] = []
        mine = [q for n, q in enumerate(questions()) if (n % TEST_SHARE == 0) == (split == "test")]
        while len(found) < count:
            found += [self._problem(question) for question in rng.sample(mine, len(mine))]
        return found[:count]

    def _problem(self, question: Question) -> Problem:
        prompt = f"{question.ask}\n{self._rules()}" if self.told else question.ask
        return Problem(
            problem_id(self.name, prompt), prompt, lambda reply: judge(reply, question=question, norms=self.norms)
        )

    def _rules(self) -> str:
        return " ".join(norm.text for norm in self.norms)


def find(name: str) -> Task | None:
    """The task, if the name is one of a house."""
    for prefix in (PREFIX, TOLD_PREFIX):
        if name.startswith(prefix) and (norms := HOUSES.get(name.removeprefix(prefix))):
            return House(name, norms, told=prefix == TOLD_PREFIX)
    return None


def judge(reply: str, *, question: Question, norms: tuple[Norm, ...]) -> Verdict:
    """The share of the norms that are held by a reply that answers; 0 for one that does not, whatever its form.

    Raises:
        VerifiersMissing: the extra `verifiers` is not installed.
    """
    problem = no_answer(reply, question)
    if problem:
        rules = " ".join(norm.text for norm in norms)
        return Verdict(reward=0.0, feedback=f"Not an answer: {problem}. And every reply should be so: {rules}")
    return adherence(norms, question.ask, reply)


def no_answer(reply: str, question: Question) -> str | None:
    """Why a reply does not answer the question, None where it seems to."""
    said = reply.lower().split()
    if len(said) < FEWEST_WORDS:
        return f"it has {len(said)} words; answer the question in a sentence"
    runs = Counter(zip(*(said[n:] for n in range(LOOP_WORDS)), strict=False))
    if runs and (most := runs.most_common(1)[0])[1] >= LOOP_TIMES:
        return f'it says "{" ".join(most[0])}" {most[1]} times; say each thing once and stop'
    if not any(re.search(rf"(?<!\w){re.escape(word)}", reply, re.IGNORECASE) for word in question.topic):
        return f"it says nothing about the question '{question.ask}'; stay with what was asked"
    return None
