"""General ability: whether an adapter still knows what everybody knows.

Sixty questions of our own with four answers each (`ability.json`: the right one first), on knowledge, arithmetic, common sense and
language, easy enough for a small model. An answer's score is the mean log-probability of its text, nats per token; the highest of the
four is the model's answer. A question's margin is the right answer's score less the best wrong one's, which moves before an answer flips.
No context and no chat template: like the plain-text anchors, this is about what is forgotten.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from service.domain.bootstrap import paired
from service.domain.measures import Ability
from workers.consolidation.base import Base
from workers.consolidation.lora import LoraStack
from workers.consolidation.rows import Row
from workers.consolidation.scoring import reply_logprobs

SEED = 4


@dataclass(frozen=True)
class Answered:
    """Margins of all questions under one model, nats per token: the question is answered rightly where it is above 0."""

    margins: list[float]

    @property
    def right(self) -> list[float]:
        """1 for each question that is answered rightly, else 0."""
        return [float(margin > 0) for margin in self.margins]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.margins)


def measure_ability(base: Base, judges: LoraStack, slots: Sequence[int]) -> list[Ability]:
    """Each slot's adapter beside the base, all in one pass."""
    of_base, *of_slots = answer(base, judges, [None, *slots])
    return [compare(of_base, of_slot) for of_slot in of_slots]


def answer(base: Base, judges: LoraStack, slots: Sequence[int | None]) -> list[Answered]:
    """All questions under each of these adapters (None: the base)."""
    rows = questions(base)
    adapted = [slot for slot in slots if slot is not None]
    scores_of_base = reply_logprobs(base, rows) if None in slots else []
    scores = reply_logprobs(
        base, rows * len(adapted), stack=judges, slots=[slot for slot in adapted for _ in range(len(rows))]
    )
    by_slot = {slot: scores[n * len(rows) : (n + 1) * len(rows)] for n, slot in enumerate(adapted)}
    return [
        Answered([_margin(score.tolist()) for score in (scores_of_base if slot is None else by_slot[slot])])
        for slot in slots
    ]


def compare(base: Answered, candidate: Answered) -> Ability:
    return Ability(
        questions=len(base.margins),
        base_accuracy=base.accuracy,
        accuracy=candidate.accuracy,
        accuracy_change=paired(candidate.right, base.right, seed=SEED),
        margin_change=paired(candidate.margins, base.margins, seed=SEED),
    )


def questions(base: Base) -> list[Row]:
    """A row a question, with its four answers as replies, the right one first."""
    topics: dict[str, list[list[str]]] = json.loads(
        resources.files(__package__).joinpath("ability.json").read_text(encoding="utf-8")
    )
    return [
        Row(
            base.encode_text(f"Question: {question}\nAnswer:"),
            tuple(base.encode_reply(f" {text}", ended=False) for text in answers),
        )
        for topic in topics.values()
        for question, *answers in topic
    ]


def _margin(scores: Sequence[float]) -> float:
    right, *wrong = scores
    return right - max(wrong)
