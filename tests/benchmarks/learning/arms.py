"""The arms: what each puts before a question, and under whose name it asks."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain.context import TOKENS_AROUND_MESSAGE
from tests.benchmarks.learning.client import Messages
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.learning.users import Person

LAST_K = 5
ORACLE_EXEMPLARS = 8
BUDGET_TOKENS = 512
"""Of any context, the client's as well as the service's default."""
HEADING = "What this user wants of every reply:"

Count = Callable[[str], int]


@dataclass(frozen=True)
class Lesson:
    """What one feedback showed by example: a question and the reply that was wanted."""

    ask: str
    wanted: str


POOLED, OWN, OWN_SMALL = STAGES = ("pooled", "own", "own-small")
"""Consolidations that are done together, in this order: one adapter for all, each user's own, these again under a smaller chat budget."""


@dataclass(frozen=True)
class Channel:
    """An arm that the service personalizes."""

    context: bool
    adapter: bool
    stage: str = ""
    """What is consolidated before it is measured, one of `STAGES`, or nothing."""

    @property
    def personalization(self) -> dict[str, bool]:
        return {"context": self.context, "adapter": self.adapter}


CHANNELS = {
    "fast": Channel(context=True, adapter=False),
    "pooled": Channel(context=False, adapter=True, stage=POOLED),
    "slow": Channel(context=False, adapter=True, stage=OWN),
    "both": Channel(context=True, adapter=True, stage=OWN),
    "both-small": Channel(context=True, adapter=True, stage=OWN_SMALL),
}
PLAIN = ("base", "last-k", "oracle")
"""Arms whose context, if any, the client sends as messages; the service personalizes nothing."""
FIXED = ("base", "oracle")
"""Arms that feedback does not change."""
SLOW = tuple(name for name, channel in CHANNELS.items() if channel.stage)
"""Arms that wait for adapters."""


def stage_of(arm: str) -> str:
    """What is consolidated before the arm is measured; nothing for most."""
    return CHANNELS[arm].stage if arm in CHANNELS else ""


def lesson(record: dict[str, Any]) -> Lesson | None:
    """The exemplar in a recorded interaction's feedback: its correction, or the better of two replies."""
    signals = record["signals"]
    if "correction" in signals:
        return Lesson(record["ask"], signals["correction"])
    if "preference" in signals:
        better = record["reply"] if signals["preference"]["better"] == "this" else record["other"]
        return Lesson(record["ask"], better["text"])
    return None


def last_k(given: Sequence[dict[str, Any]], count: Count) -> Messages:
    """The last corrections and preferences as turns, the oldest first, as many as fit the budget: what a client can do by itself."""
    lessons = [found for record in given if (found := lesson(record)) is not None]
    turns: list[Messages] = []
    used = 0
    for shown in reversed(lessons[-LAST_K:]):
        used += count(shown.ask) + count(shown.wanted) + 2 * TOKENS_AROUND_MESSAGE
        if used > BUDGET_TOKENS:
            break
        turns.append(turn(shown.ask, shown.wanted))
    return [message for pair in reversed(turns) for message in pair]


def oracle(person: Person, train: Sequence[Prompt], count: Count, *, seed: int) -> Messages:
    """The true preferences written out, with replies that satisfy them: the most that a context can do for this model."""
    rules = "\n".join([HEADING, *(f"- {p.told}" for p in person.preferences)])
    messages: Messages = [{"role": "system", "content": rules}]
    used = count(rules) + TOKENS_AROUND_MESSAGE
    for prompt in random.Random(f"{seed} {person.name} oracle").sample(train, ORACLE_EXEMPLARS):
        wanted = person.wanted(prompt)
        used += count(prompt.ask) + count(wanted) + 2 * TOKENS_AROUND_MESSAGE
        if used > BUDGET_TOKENS:
            break
        messages += turn(prompt.ask, wanted)
    return messages


def turn(ask: str, reply: str) -> Messages:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]


def in_words(signals: dict[str, Any], record: dict[str, Any]) -> str:
    """Feedback as the user would say it in the conversation, for a peer that has no feedback endpoint."""
    said = []
    if "rating" in signals:
        said.append("Good reply." if signals["rating"] else "Bad reply.")
    if "comment" in signals:
        said.append(signals["comment"])
    if (shown := lesson(record)) is not None:
        said.append(f"I wanted this reply: {shown.wanted}")
    return " ".join(said)
