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
from workers.consolidation.rows import Row, batches
from workers.consolidation.sampling import sample
from workers.consolidation.speaker import GENERATE_TOKENS

# A step's time grows with these; a longer conversation loses its oldest turns, a longer reply its end.
MAX_PROMPT_TOKENS = 1024
MAX_REPLY_TOKENS = 256
# Two or three short exemplars. The student sees a context half of the time; a full one would triple the time of such a step.
TRAIN_CONTEXT_TOKENS = 128

# Of what the base says by itself: enough to show how it talks.
BASE_REPLY_TOKENS = 48

Replies = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Prepared:
    """An example in tokens. All rows have the same replies: the one spoken of, then the rejected one, or the base's own."""

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

    A rated reply is set beside what the base says to the same prompt by itself, so that the rating says something of how it was said: a
    reply to another prompt of the same user would mostly be of the same style, good or bad.

    Args:
        fast_weights: by user.
        budget_tokens: most tokens of a context.
        full_tokens: likewise of the full one; 0 for none.
    """

    def row(example: Example, encoded: Replies, tokens: int) -> Row | None:
        state = fast_weights.get(example.user, FastWeights())
        return context_row(base, example, state, encoded, absorbed=frozenset(), budget_tokens=tokens)

    prompts = [_prompt(base, example.messages) for example in examples]
    others = _others(base, examples, prompts)
    prepared = []
    for example, alone, other in zip(examples, prompts, others, strict=True):
        if alone is None:
            dropped["a conversation too long or refused by the chat template"] += 1
            continue
        encoded = (_reply(base, example.reply, ended=example.reply_ended), other)
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


def _others(
    base: Base, examples: Sequence[Example], prompts: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...]]:
    """What each example's reply is set beside: the rejected one, or the base's likeliest without a context."""
    asked = list(
        dict.fromkeys(
            prompt
            for example, prompt in zip(examples, prompts, strict=True)
            if prompt is not None and example.rejected is None
        )
    )
    said: dict[tuple[int, ...] | None, tuple[int, ...]] = {}
    for batch in batches(asked, [len(prompt) + BASE_REPLY_TOKENS for prompt in asked], max_tokens=GENERATE_TOKENS):
        replies = sample(base, [asked[i] for i in batch], max_new_tokens=BASE_REPLY_TOKENS)
        said |= dict(zip((asked[i] for i in batch), replies, strict=True))
    return [
        said.get(prompt, ())
        if example.rejected is None
        else _reply(base, example.rejected, ended=example.rejected_ended)
        for example, prompt in zip(examples, prompts, strict=True)
    ]


def _reply(base: Base, text: str, *, ended: bool) -> tuple[int, ...]:
    ids = base.encode_reply(text, ended=ended)
    # What is cut off did not end here, so its end of turn goes with it.
    return ids[:MAX_REPLY_TOKENS]
