"""Examples as rows of tokens: each with its user's context before the conversation, and without."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.context import choose, render
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message
from service.domain.population import leading
from workers.consolidation.base import Base, TemplateRefused
from workers.consolidation.dataset import Example, without_own
from workers.consolidation.rows import Row

# A step's time grows with these; a longer conversation loses its oldest turns, a longer reply its end.
MAX_PROMPT_TOKENS = 1024
MAX_REPLY_TOKENS = 256
# Two or three short exemplars. The student sees a context half of the time; a full one would triple the time of such a step.
TRAIN_CONTEXT_TOKENS = 128


@dataclass(frozen=True)
class Prepared:
    """An example in tokens. Both rows have the same replies: the one spoken of, then the rejected or a mismatched one."""

    example: Example
    alone: Row
    with_context: Row | None
    """None where the user has no context for this example, or it does not fit."""

    def row(self, *, context: bool) -> Row:
        return self.with_context if context and self.with_context is not None else self.alone


def prepare(
    base: Base,
    examples: Sequence[Example],
    fast_weights: dict[str, FastWeights],
    *,
    budget_tokens: int,
    dropped: Counter[str],
) -> list[Prepared]:
    """Encode examples in their order; `dropped` counts those that the chat template refuses or that are too long.

    Args:
        fast_weights: by user.
        budget_tokens: most tokens of a context.
    """
    replies = [_replies(base, example, _mismatched(examples, i)) for i, example in enumerate(examples)]
    prepared = []
    for example, encoded in zip(examples, replies, strict=True):
        alone = _prompt(base, example.messages)
        if alone is None:
            dropped["a conversation too long or refused by the chat template"] += 1
            continue
        state = fast_weights.get(example.user, FastWeights())
        with_context = context_row(base, example, state, encoded, absorbed=frozenset(), budget_tokens=budget_tokens)
        prepared.append(Prepared(example=example, alone=Row(alone, encoded), with_context=with_context))
    return prepared


def context_row(
    base: Base,
    example: Example,
    state: FastWeights,
    replies: tuple[tuple[int, ...], ...],
    *,
    absorbed: frozenset[str],
    budget_tokens: int,
) -> Row | None:
    """The example's row with the context that its user would get without having spoken of it; None if that is empty or too long."""
    own_left_out = without_own(state, example)
    context = choose(
        own_left_out,
        absorbed=absorbed,
        budget_tokens=budget_tokens,
        count=base.tokens.count,
        member=leading(state, adapter=state.population.adapter),
    )
    if not context.items:
        return None
    prompt = _prompt(base, render(context, example.messages), shorten=False)
    return None if prompt is None else Row(prompt, replies)


def _prompt(base: Base, messages: Sequence[Message], *, shorten: bool = True) -> tuple[int, ...] | None:
    """The prompt's tokens, after dropping the oldest turns until it fits if it may be shortened."""
    head = [m for m in messages[:1] if m.role in ("system", "developer")]
    turns = list(messages[len(head) :])
    while turns:
        try:
            prompt = base.encode_chat([*head, *turns])
        except TemplateRefused:
            prompt = ()
        if prompt and len(prompt) <= MAX_PROMPT_TOKENS:
            return prompt
        if not shorten:
            return None
        # The next user turn: templates want one first.
        turns = next((turns[i:] for i in range(1, len(turns)) if turns[i].role == "user"), [])
    return None


def _replies(base: Base, example: Example, other: Example | None) -> tuple[tuple[int, ...], ...]:
    reply = _reply(base, example.reply, ended=example.reply_ended)
    if example.rejected is not None:
        return (reply, _reply(base, example.rejected, ended=example.rejected_ended))
    return (reply, _reply(base, other.reply, ended=other.reply_ended)) if other else (reply, reply)


def _reply(base: Base, text: str, *, ended: bool) -> tuple[int, ...]:
    ids = base.encode_reply(text, ended=ended)
    # What is cut off did not end here, so its end of turn goes with it.
    return ids[:MAX_REPLY_TOKENS]


def _mismatched(examples: Sequence[Example], index: int) -> Example | None:
    """The next example with another prompt, in a circle."""
    around = (*examples[index + 1 :], *examples[:index])
    return next((other for other in around if other.prompt != examples[index].prompt), None)
