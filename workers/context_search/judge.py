"""How good a candidate is: likelihood margins on the user's own feedback, without generating (facts: Drift, arXiv 2502.14289).

margin(c, i) = mean log p(wanted | prompt, c) - mean log p(unwanted | prompt, c) for a pair,
margin(c, i) = rating * mean log p(reply | prompt, c) for a rating, both in nats per token of the reply.
gain(c, i) = margin(c, i) - margin(no context, i); S(c) = median over i of gain(c, i), less what the context's tokens cost.

Cross-validated: what the examples of a fold support themselves is left out of the context that they judge, so nothing is scored on its own
answer, and the context of a fold is computed once for all of its replies.
"""

import statistics
from collections.abc import Sequence
from typing import Protocol

from service.domain.context import render
from service.domain.feedback import Message
from workers.consolidation.dataset import Example
from workers.context_search.candidates import Candidate, Pool

# Below this a difference of margins is numerical noise between two runs of the same weights.
NOISE_NATS = 1e-3
TRIMMED_SHARE = 0.2

Asked = tuple[Sequence[Message], Sequence[tuple[str, bool]]]
"""A conversation, and the replies to it, each with whether it ended by itself."""


class Scorer(Protocol):
    """Tells how likely replies are."""

    async def score(self, model: str, items: Sequence[Asked]) -> list[list[float]]:
        """Mean log-probability (nats per token) of each reply of each item.

        Raises:
            EngineUnavailable: it is away.
        """
        ...


class Judge:
    """Scores candidates on examples, each (context, example) once.

    Args:
        model: what vLLM is asked for: the adapter version in use, or the base model.
    """

    def __init__(self, pool: Pool, *, scorer: Scorer, model: str) -> None:
        self.pool = pool
        self.calls = 0
        """How often a context was scored on an example."""
        self._scorer = scorer
        self._model = model
        self._margins: dict[tuple[tuple[str, ...], str], float] = {}

    async def gains(self, asked: Sequence[tuple[Candidate, Sequence[Example]]]) -> list[list[float]]:
        """gain(c, i) for each candidate on its examples, in one request to the scorer."""
        keys = [[(self._items(candidate, example), example) for example in examples] for candidate, examples in asked]
        wanted = [((), example) for row in keys for _, example in row] + [key for row in keys for key in row]
        await self._score({(items, example.id): example for items, example in wanted})
        return [
            [self._margins[items, example.id] - self._margins[(), example.id] for items, example in row] for row in keys
        ]

    def _items(self, candidate: Candidate, example: Example) -> tuple[str, ...]:
        return self.pool.context(candidate.items, judged_by=example).items

    async def _score(self, wanted: dict[tuple[tuple[str, ...], str], Example]) -> None:
        # In the order of their items, so that those that share the front of a context follow each other into the prefix cache.
        missing = sorted((key for key in wanted if key not in self._margins), key=lambda key: key)
        if not missing:
            return
        items = [self._asked(names, wanted[names, example]) for names, example in missing]
        scored = await self._scorer.score(self._model, items)
        self.calls += len(missing)
        for key, logprobs in zip(missing, scored, strict=True):
            self._margins[key] = margin(wanted[key], logprobs)

    def _asked(self, items: tuple[str, ...], example: Example) -> Asked:
        messages = render(self.pool.context(items, judged_by=example), example.messages)
        replies = [(example.reply, example.reply_ended)]
        if example.rejected is not None:
            replies.append((example.rejected, example.rejected_ended))
        return messages, replies


def margin(example: Example, logprobs: Sequence[float]) -> float:
    """What mean log-probabilities say, in nats per token: the wanted reply's less the unwanted one's, or the rated one's."""
    return logprobs[0] - logprobs[1] if example.rejected is not None else example.rating * logprobs[0]


def median(gains: Sequence[float]) -> float:
    return statistics.median(gains)


def trimmed_mean(gains: Sequence[float], share: float = TRIMMED_SHARE) -> float:
    """The mean without the highest and lowest `share` of them: what is left to tell apart candidates of the same median."""
    cut = int(len(gains) * share)
    kept = sorted(gains)[cut : len(gains) - cut]
    return statistics.fmean(kept)


def noise(differences: Sequence[float]) -> float:
    """About one standard error of the median of paired differences, by their median absolute deviation; nats per token."""
    middle = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(d - middle) for d in differences)
    return max(1.2533 * deviation / len(differences) ** 0.5, NOISE_NATS)
