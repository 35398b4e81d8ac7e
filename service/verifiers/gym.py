"""Generators of the package reasoning-gym (arXiv 2505.24760), each scored by its own scorer.

Feedback tells the expected answer, which a solver never sees: it is for what reflects on many solved problems.
"""

import itertools
import logging
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import InvalidRequest
from service.verifiers.packages import imported, without_entry
from service.verifiers.problems import TEST_SHARE, Problem, Split, Task, Verdict, problem_id, split_of

log = logging.getLogger(__name__)

PREFIX, EASY_PREFIX = "gym:", "gym-easy:"
# Their scorers run a reply as Python (eval, sympy.parse_expr), so whoever writes a reply would rule the worker.
UNSAFE = {
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion"),
}
# Shorter than by default, for small models.
EASY: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False},
    "letter_counting": {"min_words": 1, "max_words": 3},
    "spell_backward": {"min_word_len": 3, "max_word_len": 3},
}
NAMES = (*(EASY_PREFIX + name for name in EASY), *(PREFIX + name for name in EASY))
ASK = "\nGive the answer between <answer> and </answer>."
ASK_EASY = "\nReply with the answer alone."
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
# "The answer is 7.", "1 + 6 = 7", "Answer: **7**".
SAID = re.compile(r"^.*(?:\bis|[=:])\s+")
# Draws without a new question of the split, one in five, after which the generator is taken to have no more.
MAX_STALE = 500


@dataclass(frozen=True)
class Gym:
    """One generator with its configuration."""

    name: str
    dataset: str
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        return f"reasoning-gym's {self.dataset}{' with small numbers and short words' if self.config else ''}, scored by its own scorer."

    def problems(self, split: Split, *, count: int, seed: int) -> list[Problem]:
        """See `Task`.

        Raises:
            InvalidRequest: reasoning-gym has no such generator, or it has no question of this split.
            VerifiersMissing: it is not installed.
        """
        # The generator adds a question's number to the seed: neighbouring seeds would give the same questions.
        size = MAX_STALE + 4 * TEST_SHARE * count
        source = self._source(seed=random.Random(f"{self.name} {split} {seed}").getrandbits(31), size=size)
        found: dict[str, Problem] = {}
        stale = 0
        for n in range(size):
            if len(found) == count or stale == MAX_STALE:
                break
            try:
                entry = source[n]
            except IndexError:
                break  # A generator that has no more.
            question: str = entry["question"]
            new = split_of(question) == split and question not in found
            if new:
                found[question] = self._problem(source, entry)
            stale = 0 if new else stale + 1
        if count and not found:
            raise InvalidRequest(f"{self.name} has no question to {split} with.", param="task", code="unknown_task")
        return list(itertools.islice(itertools.cycle(found.values()), count))

    def _source(self, *, seed: int, size: int) -> Any:
        factory = _factory()
        known = factory.DATASETS.keys() - UNSAFE
        if self.dataset not in known:
            why = "scores by running replies as Python" if self.dataset in UNSAFE else "is none of reasoning-gym's"
            raise InvalidRequest(
                f"'{self.dataset[:80]}' {why}. There are: {', '.join(sorted(known))}.",
                param="task",
                code="unknown_task",
            )
        try:
            return factory.create_dataset(self.dataset, seed=seed, size=size, **self.config)
        except AssertionError as error:
            raise InvalidRequest(f"{self.name} can't be made without more settings: {error}.", param="task") from error

    def _problem(self, source: Any, entry: dict[str, Any]) -> Problem:
        question: str = entry["question"]
        return Problem(
            problem_id(self.name, question),
            question + (ASK_EASY if self.config else ASK),
            lambda reply: judge(answer_of(reply), source=source, entry=entry),
        )


def _factory() -> Any:
    """reasoning-gym's registry, filled by all of its categories but `logic`: that one wants pycosat, which is built by a C compiler."""
    without_entry("reasoning_gym")
    [folder] = imported("reasoning_gym").__path__
    categories = {path.parent.name for path in Path(folder).glob("*/__init__.py")} - {"logic", "coaching"}
    for category in sorted(categories):
        imported(f"reasoning_gym.{category}")
    return imported("reasoning_gym.factory")


def find(name: str) -> Task | None:
    """The task, if the name is one of reasoning-gym's; whether it has such a generator is seen when the first problem is made."""
    if name.startswith(PREFIX) and len(name) > len(PREFIX):
        return Gym(name, name.removeprefix(PREFIX))
    dataset = name.removeprefix(EASY_PREFIX)
    if name.startswith(EASY_PREFIX) and dataset in EASY:
        return Gym(name, dataset, EASY[dataset])
    return None


def answer_of(reply: str) -> str:
    """What stands in the last <answer> tags, else on the last line, after its last "is", "=" or ":"."""
    if tagged := TAGGED.findall(reply):
        return str(tagged[-1]).strip()
    lines = reply.strip().splitlines()
    return SAID.sub("", lines[-1].replace("**", "")).strip(" .*\"'`") if lines else ""


def judge(answer: str, *, source: Any, entry: dict[str, Any]) -> Verdict:
    """The generator's own score of an answer, with the expected one."""
    expected = "one of several that are right" if entry["answer"] is None else f"'{entry['answer']}'"
    try:
        reward = min(1.0, max(0.0, float(source.score_answer(answer or None, entry))))
    except Exception as error:  # A scorer that expects a certain form may raise anything at another one.
        log.info("the scorer of %s took an answer for none: %r", entry["metadata"].get("source_dataset"), error)
        reward = 0.0
    if reward == 1.0:
        return Verdict(reward=1.0, feedback=f"Right: {answer}.")
    if not answer:
        return Verdict(
            reward=reward, feedback=f"The reply holds no answer; expected {expected} between <answer> and </answer>."
        )
    found = "Close" if reward >= 0.5 else "Wrong"
    advice = "Put the answer alone between <answer> and </answer>."
    return Verdict(reward=reward, feedback=f"{found}: the answer was '{answer[:200]}', expected {expected}. {advice}")
