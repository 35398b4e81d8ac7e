"""Simulated users' feedback in this process: all ask at once, the base replies with each one's context, and they say what they think of it.

The users, their moods and their words are those of the learning benchmark; what it does over HTTP, with contexts that are optimized
between the chats, is done here with the fold alone and the chats of all users in one batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count as numbers
from typing import Any

from service.domain.context import Context, choose, render
from service.domain.fast_weights import FastWeights
from service.domain.feedback import FeedbackEvent, Interaction, Message, Preference, Signals, VersionTuple
from service.domain.fold import apply
from service.domain.population import leading
from tests.benchmarks.learning.prompts import Prompt
from tests.benchmarks.learning.users import Mood, Person, Verdict, curriculum, judge, mood, react
from workers.consolidation.base import Base
from workers.consolidation.sampling import GumbelNoise, sample

TENANT = "bench"
REPLY_TOKENS = 64


@dataclass
class Pupil:
    """The service's side of a person: their log and its fold."""

    person: Person
    asks: Iterator[tuple[int, Prompt]]
    events: list[FeedbackEvent] = field(default_factory=list)
    state: FastWeights = field(default_factory=FastWeights)

    def said(self, interaction: Interaction) -> None:
        revision = len(self.events) + 1
        event = FeedbackEvent(revision=revision, at=float(revision), interaction=interaction)
        self.events.append(event)
        self.state = apply(self.state, event)


def taught(
    base: Base,
    people: Sequence[Person],
    train: Sequence[Prompt],
    *,
    feedbacks: int,
    budget_tokens: int,
    seed: int,
    on_feedback: Callable[[int], None],
) -> list[Pupil]:
    """Pupils who have given so many feedbacks each.

    Args:
        on_feedback: told after each round of chats how many there have been in all.
    """
    pupils = [Pupil(person, zip(numbers(), curriculum(person, train, seed=seed))) for person in people]
    while learning := [pupil for pupil in pupils if len(pupil.events) < feedbacks]:
        _one_chat_each(base, learning, train, budget_tokens=budget_tokens, seed=seed)
        on_feedback(sum(len(pupil.events) for pupil in pupils))
    return pupils


def context_of(
    base: Base, state: FastWeights, *, budget_tokens: int, absorbed: frozenset[str] = frozenset()
) -> Context:
    """As a chat of this user has it under the base, or under an adapter that has absorbed some of it."""
    return choose(
        state,
        absorbed=absorbed,
        budget_tokens=budget_tokens,
        count=base.tokens.count,
        member=leading(state, adapter=state.population.adapter),
    )


def _one_chat_each(
    base: Base, pupils: Sequence[Pupil], train: Sequence[Prompt], *, budget_tokens: int, seed: int
) -> None:
    asked = [next(pupil.asks) for pupil in pupils]
    moods = [mood(pupil.person, number, seed=seed) for pupil, (number, _) in zip(pupils, asked, strict=True)]
    contexts = [context_of(base, pupil.state, budget_tokens=budget_tokens) for pupil in pupils]
    prompts = [
        base.encode_chat(render(context, [Message(role="user", content=prompt.ask)]))
        for context, (_, prompt) in zip(contexts, asked, strict=True)
    ]
    replies = sample(base, prompts, max_new_tokens=REPLY_TOKENS)
    comparing = [n for n, felt in enumerate(moods) if felt.compares]
    seconds = dict(
        zip(
            comparing,
            sample(
                base,
                [prompts[n] for n in comparing],
                max_new_tokens=REPLY_TOKENS,
                noise=GumbelNoise([1000 * seed + asked[n][0] for n in comparing], device=base.device),
            ),
            strict=True,
        )
    )
    for n, (pupil, (number, prompt)) in enumerate(zip(pupils, asked, strict=True)):
        reply, other = _text(base, replies[n]), _text(base, seconds[n]) if n in seconds else None
        signals = _signals(moods[n], pupil.person, prompt, train, reply, other)
        if signals.is_empty():
            continue
        pupil.said(
            Interaction(
                id=f"chatcmpl-{pupil.person.name}-{number}",
                tenant=TENANT,
                user=pupil.person.name,
                created=float(number),
                messages=(Message(role="user", content=prompt.ask),),
                reply=reply,
                finish_reason="stop" if replies[n][-1:] == (base.tokenizer.eos_token_id,) else "length",
                version=VersionTuple(model=base.name),
                items=contexts[n].items,
                signals=signals,
                rated_at=pupil.state.clock + 1,
            )
        )


def _signals(
    felt: Mood, person: Person, prompt: Prompt, train: Sequence[Prompt], reply: str, other: str | None
) -> Signals:
    verdict = judge(person, reply, prompt, train)
    second: tuple[str, Verdict] | None = None if other is None else ("other", judge(person, other, prompt, train))
    said: dict[str, Any] = react(felt, person, prompt, verdict, second)
    rating, preference = said.get("rating"), said.get("preference")
    return Signals(
        rating=None if rating is None else (1.0 if rating else -1.0),
        comment=said.get("comment"),
        correction=said.get("correction"),
        preference=Preference(other=other or "", better=preference["better"]) if preference else None,
    )


def _text(base: Base, tokens: Sequence[int]) -> str:
    return str(base.tokenizer.decode(tokens, skip_special_tokens=True))
