"""The last word before a context replaces another: replies generated under both, to prompts that the user has answered for us."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from service.domain.context import render
from service.domain.feedback import Message
from workers.consolidation.dataset import Example
from workers.context_search.candidates import Candidate, Pool
from workers.context_search.style import closeness, is_broken, weights

# The newest prompts with a wanted reply.
PROMPTS = 4
# Enough to see a style, and whether the reply ends.
REPLY_TOKENS = 64


class Generator(Protocol):
    """Generates greedily."""

    async def reply(self, model: str, messages: Sequence[Message], *, max_tokens: int) -> str:
        """The reply's text.

        Raises:
            EngineUnavailable: vLLM is away.
        """
        ...


async def compare(
    candidates: Sequence[Candidate], examples: Sequence[Example], *, pool: Pool, generator: Generator, model: str
) -> dict[Candidate, float]:
    """Mean closeness of each candidate's replies to the wanted ones, in [0, 1]; a reply that is none counts 0.

    The context that answers a prompt is the one that its feedback judges. Where no reply was wanted only soundness is looked at.
    """
    chosen = [e for e in examples if e.rejected is not None or e.rating > 0][-PROMPTS:] or examples[-PROMPTS:]
    pairs = [(e.reply, e.rejected) for e in examples if e.rejected is not None]
    by = weights(pairs)

    async def score(candidate: Candidate, example: Example) -> float:
        context = pool.context(candidate.items, judged_by=example)
        reply = await generator.reply(model, render(context, example.messages), max_tokens=REPLY_TOKENS)
        if is_broken(reply, prompt=example.prompt, shown=[x.reply for x in context.exemplars]):
            return 0.0
        return closeness(reply, example.reply, by)

    rows = await asyncio.gather(*(asyncio.gather(*(score(c, e) for e in chosen)) for c in candidates))
    return {c: sum(row) / len(row) if row else 1.0 for c, row in zip(candidates, rows, strict=True)}


def not_losing(scores: Mapping[Candidate, float], incumbent: Candidate) -> list[Candidate]:
    """The challengers whose replies are at least as near to what the user wants as the incumbent's."""
    return [c for c in scores if c != incumbent and scores[c] >= scores[incumbent]]
