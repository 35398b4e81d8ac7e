"""How likely replies are, out of runs over sequences that vLLM's prefix cache has in part.

A run computes the states of a sequence's tokens but for the last one, and leaves out those that are cached. Each computed state tells
how likely the next token was. So after a hit of c tokens a run tells of token c+1 and those behind it, and of the last token always.

The cache may reach into the reply: it was scored before, a chat has said it, or another reply begins like it. Then the sequence is run
again, cut where the last run began to tell. Its hit ends at least a block earlier, because a run's last state is never taken from the
cache. A repeated reply so costs a few short runs, and never its whole context.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from math import fsum
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Runs(Protocol):
    """The engine under one adapter, and over one user's part of the prefix cache. Sequences are token ids."""

    async def fill(self, tokens: list[int]) -> None:
        """Compute the states of a sequence into the prefix cache."""
        ...

    async def run(self, tokens: list[int]) -> Sequence[float]:
        """Log-probabilities (nats) of the last tokens of a sequence of two or more: of as many as were told of, at least one."""
        ...


class Seats:
    """How much of the engine scoring may hold, so that chats find room. All requests to a replica share them.

    Args:
        runs: sequences at once.
        fills: contexts at once that are computed for the first time.
    """

    def __init__(self, *, runs: int, fills: int) -> None:
        self.runs = asyncio.Semaphore(runs)
        self.fills = asyncio.Semaphore(fills)


async def score_replies(runs: Runs, context: list[int], replies: Sequence[list[int]], *, seats: Seats) -> list[float]:
    """The log-probability (nats) of each reply after `context`. None of them is empty."""

    async def score(reply: list[int]) -> float:
        async with seats.runs:
            return await reply_logprob(runs, context, reply)

    # Faster by a tenth than as a part of the first reply's run: nobody wants the logits over a context, and they take memory.
    async with seats.fills:
        await runs.fill(context)
    return await together(score(reply) for reply in replies)


async def reply_logprob(runs: Runs, context: list[int], reply: list[int]) -> float:
    """The log-probability (nats) of `reply` after `context`, in as many runs as the cache makes it take."""
    tokens, total = [*context, *reply], 0.0
    while (untold := len(tokens) - len(context)) > 0:
        logprobs = (await runs.run(tokens))[-untold:]
        total += fsum(logprobs)
        del tokens[-len(logprobs) :]
    return total


def told(tokens: list[int], output: Any) -> list[float] | None:
    """What a run over `tokens` told of, as `Runs.run` has it.

    Args:
        output: vLLM's `RequestOutput` of all tokens but the last as prompt, the last one sampled, and flat log-probabilities of both.

    Returns:
        None if they are of other tokens: where states were cached vLLM may leave garbage, and it computes a sequence that it had to
        put aside with another hit than it reports.
    """
    computed = len(tokens) - 2 - (output.num_cached_tokens or 0)
    prompt, sampled = output.prompt_logprobs, output.outputs[0].logprobs
    start = len(prompt.logprobs) - computed
    if start < 0 or [*prompt.token_ids[start:], *sampled.token_ids] != tokens[-computed - 1 :]:
        return None
    return [*prompt.logprobs[start:], *sampled.logprobs]


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first error ends the rest of the work, and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
