"""Guidelines that nobody has said must prove themselves: with each the margins on the user's other feedback are higher, or it goes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain.population import MAX_MEMBERS
from workers.consolidation.dataset import Example
from workers.context_search.candidates import Candidate
from workers.context_search.judge import Judge, median
from workers.context_search.selection import ranked

# What a guideline must raise the median margin by, in nats per token: its place in every prompt costs something too.
PROOF_NATS = 0.01
# Fewer other feedbacks than this say less than all together do.
MIN_OTHERS = 3

Gains = dict[Candidate, list[float]]


@dataclass
class Proof:
    """Tries the inferred guidelines of the best candidates, one at a time."""

    judge: Judge
    examples: Sequence[Example]
    incumbents: Sequence[Candidate]

    async def of(self, gains: Mapping[Candidate, Sequence[float]]) -> Gains:
        """The candidates with no guideline among the best `MAX_MEMBERS` that has not proven itself."""
        left = {candidate: list(found) for candidate, found in gains.items()}
        proven: set[str] = set()
        while (unproven := self._unproven(left, proven)) is not None:
            candidate, name = unproven
            if await self._helps(name, candidate):
                proven.add(name)
            else:
                left = await self._without(name, left)
        return left

    def _best(self, gains: Gains) -> list[Candidate]:
        prices = {candidate: self.judge.pool.price(candidate) for candidate in gains}
        return ranked(gains, prices, incumbents=self.incumbents)[:MAX_MEMBERS]

    def _unproven(self, gains: Gains, proven: set[str]) -> tuple[Candidate, str] | None:
        guidelines = self.judge.pool.state.guidelines
        for candidate in self._best(gains):
            for name in candidate.guidelines:
                if name not in proven and not guidelines[name].stated:
                    return candidate, name
        return None

    async def _helps(self, name: str, candidate: Candidate) -> bool:
        sources = self.judge.pool.state.guidelines[name].sources
        others = [example for example in self.examples if example.id not in sources]
        judges = others if len(others) >= MIN_OTHERS else list(self.examples)
        having, lacking = await self.judge.gains([(candidate, judges), (candidate.without([name]), judges)])
        return median(having) > median(lacking) + PROOF_NATS

    async def _without(self, name: str, gains: Gains) -> Gains:
        """The candidates without those that hold the guideline, but with what the best of them are without it."""
        fallen = [c for c in self._best(gains) if name in c.guidelines]
        left = {c: found for c, found in gains.items() if name not in c.guidelines}
        instead = [c for c in dict.fromkeys(self.judge.pool.fitted(c.without([name])) for c in fallen) if c not in left]
        found = await self.judge.gains([(c, self.examples) for c in instead])
        return left | dict(zip(instead, found, strict=True))
