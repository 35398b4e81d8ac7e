"""Examples as rows of tokens: each with its user's context before the conversation, without, and with what was said of the reply."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.context import Context, choose, render
from service.domain.fast_weights import FastWeights
from service.domain.feedback import Message
from service.domain.items import Guideline
from service.domain.population import leading
from workers.consolidation.base import Base, TemplateRefused
from workers.consolidation.dataset import Example, without_own
from workers.consolidation.rows import Row

# A step's time grows with these; a longer conversation loses its oldest turns, a longer reply its end.
MAX_PROMPT_TOKENS = 1024
MAX_REPLY_TOKENS = 256
# Two or three short exemplars. The student sees a context half of the time; a full one would triple the time of such a step.
TRAIN_CONTEXT_TOKENS = 128

Replies = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prepared:
    """An example in tokens. Both rows have the same replies: the one spoken of, then the rejected or a mismatched one."""

    example: Example
    alone: Row
    with_context: Row | None
    """None where the user has no context for this example, or it does not fit."""
    full_context: Row | None = None
    """With a context as long as chats have, for what is computed without gradient; None where that is not asked for either."""
    with_comment: Row | None = None
    """The reply alone, as if its comment had been known before; None where there is no comment that says anything."""

    def row(self, *, context: bool) -> Row:
        return self.with_context if context and self.with_context is not None else self.alone


def prepare(
    base: Base,
    examples: Sequence[Example],
    fast_weights: dict[str, FastWeights],
    *,
    budget_tokens: int,
    full_tokens: int = 0,
    dropped: Counter[str],
) -> list[Prepared]:
    """Encode examples in their order; `dropped` counts those that the chat template refuses or that are too long.

    Args:
        fast_weights: by user.
        budget_tokens: most tokens of a context.
        full_tokens: likewise of the full one; 0 for none.
    """

    def row(example: Example, encoded: Replies, tokens: int) -> Row | None:
        state = fast_weights.get(example.user, FastWeights())
        return context_row(base, example, state, encoded, absorbed=frozenset(), budget_tokens=tokens)

    replies = [_replies(base, example, _mismatched(examples, i)) for i, example in enumerate(examples)]
    prepared = []
    for example, encoded in zip(examples, replies, strict=True):
        alone = _prompt(base, example.messages)
        if alone is None:
            dropped["a conversation too long or refused by the chat template"] += 1
            continue
        prepared.append(
            Prepared(
                example=example,
                alone=Row(alone, encoded),
                with_context=row(example, encoded, budget_tokens),
                full_context=row(example, encoded, full_tokens) if full_tokens else None,
                with_comment=_comment_row(base, example, encoded[0]),
            )
        )
    return prepared


def context_row(
    base: Base,
    example: Example,
    state: FastWeights,
    replies: Replies,
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


def _comment_row(base: Base, example: Example, reply: tuple[int, ...]) -> Row | None:
    if example.comment is None:
        return None
    said = Context(guidelines=(Guideline(id="comment", text=example.comment),))
    prompt = _prompt(base, render(said, example.messages), shorten=False)
    return None if prompt is None else Row(prompt, (reply,))


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


def _replies(base: Base, example: Example, other: Example | None) -> Replies:
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
