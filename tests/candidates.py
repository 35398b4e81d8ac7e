"""Candidates for the gate's tests: random adapters, and what a scope is measured by."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from workers.consolidation.base import Base
from workers.consolidation.candidates import Candidate
from workers.consolidation.dataset import usable
from workers.consolidation.lora import LoraStack
from workers.consolidation.prepare import Prepared, prepare
from workers.consolidation.rows import Row, pack, token_logprobs
from workers.consolidation.work import UserLog


def random_adapter(stack: LoraStack, slot: int, *, size: float, seed: int = 0) -> None:
    """Fill a slot, A as it is at the start and B random, with a change of about this size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(stack.weights_U_N.shape[1], generator=generator) * size
        # B alone: a fresh one is zero.
        stack.weights_U_N[slot] += torch.where(stack.weights_U_N[slot] == 0.0, noise, 0.0)


def teach(base: Base, stack: LoraStack, slot: int, rows: Sequence[Row], *, steps: int, rate: float = 0.01) -> None:
    """Raise the likelihood of each row's first reply, and lower that of its second if there is one, by plain Adam."""
    optimizer = torch.optim.Adam([stack.weights_U_N], lr=rate)
    packed = pack(rows, device=base.device)
    sign_R = torch.tensor([(1.0, -0.3)[number] for row in rows for number in range(len(row.replies))])
    for _ in range(steps):
        optimizer.zero_grad()
        with stack.on(slot):
            logprobs_N = token_logprobs(base.states(packed), base.head, packed.target_N)
            (-(packed.mean_by_reply(logprobs_N) * sign_R).mean()).backward()
        optimizer.step()


def candidate(folder: Path, *, trained: int = 0, slot: int = 0, **changes: object) -> Candidate:
    """One with the default budgets, and nothing held out unless it is given."""
    folder.mkdir(exist_ok=True)
    fields = {"budgets": {"text": 0.02, "chat": 0.10}, "heldout": []}
    return Candidate(trained=trained, slot=slot, folder=folder, **{**fields, **changes})


def heldout(base: Base, log: UserLog, *, user: str = "ann", last: int, budget_tokens: int = 400) -> list[Prepared]:
    """The last examples of a user's log, in tokens."""
    dropped: Counter[str] = Counter()
    examples = usable(user, log, dropped)[-last:]
    return prepare(base, examples, {user: log.fast_weights}, budget_tokens=budget_tokens, dropped=dropped)
