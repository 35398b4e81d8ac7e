"""Greedy replies of the base and of many adapters side by side, each said once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.consolidation.base import Base
from workers.consolidation.lora import LoraStack
from workers.consolidation.rows import batches
from workers.consolidation.sampling import sample

# Enough to see a style, a loop, and whether a short reply ends.
REPLY_TOKENS = 48
# Of all rows that are generated at once, with padding: their KV cache is 45 kB a token for the default model.
GENERATE_TOKENS = 8192

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A prompt, and the slot of what replies to it (None: the base)."""

    prompt: Tokens
    slot: int | None = None
    scale: float = 1.0
    """Of the candidate's export that the slot holds: at another one it says something else."""


@dataclass
class Speaker:
    """The base and its judges, with all that they have said."""

    base: Base
    judges: LoraStack
    _said: dict[Case, Tokens] = field(default_factory=dict)

    def replies(self, arms: Sequence[Sequence[Case]]) -> list[list[Tokens]]:
        """The likeliest reply to each case, without its end of turn. Slots hold the exports whose scales the cases name."""
        new = [case for case in dict.fromkeys(case for arm in arms for case in arm) if case not in self._said]
        for some in ([case for case in new if case.slot is None], [case for case in new if case.slot is not None]):
            lengths = [len(case.prompt) + REPLY_TOKENS for case in some]
            for batch in batches(some, lengths, max_tokens=GENERATE_TOKENS):
                self._say([some[i] for i in batch])
        return [[self._said[case] for case in arm] for arm in arms]

    def _say(self, cases: Sequence[Case]) -> None:
        slots = [case.slot for case in cases if case.slot is not None]
        with self.judges.on(None):
            replies = sample(
                self.base,
                [case.prompt for case in cases],
                max_new_tokens=REPLY_TOKENS,
                stack=self.judges,
                slots=slots or None,
            )
        end = self.base.tokenizer.eos_token_id
        for case, reply in zip(cases, replies, strict=True):
            self._said[case] = reply[:-1] if reply and reply[-1] == end else reply
