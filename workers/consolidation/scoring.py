"""Scores without gradient, many adapters in one pass: how likely replies are, and how far adapters are from the base.

Letters: R rows, S slots, A anchors, N tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.consolidation.anchors import PASS_TOKENS, Anchor
from workers.consolidation.base import Base
from workers.consolidation.divergence import kl_of_states
from workers.consolidation.lora import LoraStack
from workers.consolidation.rows import Packed, Row, batches, pack, token_logprobs


def reply_logprobs(
    base: Base,
    rows: Sequence[Row],
    *,
    stack: LoraStack | None = None,
    slots: Sequence[int] | None = None,
    max_tokens: int = PASS_TOKENS,
) -> list[Tensor]:
    """Mean log-probability of each row's replies, nats per token: one tensor a row, on the CPU.

    Args:
        stack, slots: which adapter each row is scored under; without them the base.
    """
    found: dict[int, Tensor] = {}
    for batch in batches(rows, [len(row) for row in rows], max_tokens=max_tokens):
        packed = pack([rows[i] for i in batch], device=base.device)
        states_N_D = _states(base, packed, stack, slots and [slots[i] for i in batch])
        with torch.no_grad():
            means = packed.mean_by_reply(token_logprobs(states_N_D, base.head, packed.target_N)).cpu()
        found.update(zip(batch, means.split([len(rows[i].replies) for i in batch]), strict=True))
    return [found[i] for i in range(len(rows))]


def anchors_under(
    base: Base, stack: LoraStack, anchors: Sequence[Anchor], *, slots: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Of each anchor under each slot the mean KL(base || adapter) and the adapter's mean loss, nats per token, both of shape (S, A)."""
    kl_S_A, loss_S_A = torch.zeros(2, len(slots), len(anchors))
    cases = [(s, a) for s in range(len(slots)) for a in range(len(anchors))]
    rows = [anchors[a].row for _, a in cases]
    for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
        packed = pack([rows[i] for i in batch], device=base.device)
        states_N_D = _states(base, packed, stack, [slots[cases[i][0]] for i in batch])
        base_states_N_D = torch.cat([anchors[cases[i][1]].base_states_N_D for i in batch])
        with torch.no_grad():
            kls = packed.mean_by_reply(kl_of_states(base_states_N_D, states_N_D, base.head)).cpu()
            logprobs = packed.mean_by_reply(token_logprobs(states_N_D, base.head, packed.target_N)).cpu()
        for i, kl, logprob in zip(batch, kls, logprobs, strict=True):
            kl_S_A[cases[i]], loss_S_A[cases[i]] = kl, -logprob
    return kl_S_A, loss_S_A


def _states(base: Base, packed: Packed, stack: LoraStack | None, slots: Sequence[int] | None) -> Tensor:
    with torch.no_grad():
        if stack is None:
            return base.states(packed)
        with stack.on(slots):
            return base.states(packed)
