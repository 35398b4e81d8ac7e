"""Scores without gradient, many adapters in one pass: how likely replies are, and how far adapters are from the base.

Letters: R rows, S slots, A anchors, N tokens, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.consolidation.anchors import PASS_TOKENS, Anchor
from workers.consolidation.base import Base
from workers.consolidation.divergence import kl_of_states
from workers.consolidation.lora import LoraStack
from workers.consolidation.rows import Packed, Row, batches, grow, pack, pack_trees, token_logprobs


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
    for of in _passes(base, rows, stack, slots, max_tokens):
        with torch.no_grad():
            means = of.packed.mean_by_reply(token_logprobs(of.states_N_D, base.head, of.packed.target_N)).cpu()
        found.update(zip(of.rows, means.split([len(rows[i].replies) for i in of.rows]), strict=True))
    return [found[i] for i in range(len(rows))]


def token_logprobs_of(
    base: Base,
    rows: Sequence[Row],
    *,
    stack: LoraStack | None = None,
    slots: Sequence[int] | None = None,
) -> list[Tensor]:
    """Log-probabilities of all tokens of each row's replies, nats, shape (N,) a row, where the base is."""
    found: dict[int, Tensor] = {}
    for of in _passes(base, rows, stack, slots, PASS_TOKENS):
        with torch.no_grad():
            logprobs_N = token_logprobs(of.states_N_D, base.head, of.packed.target_N)
        found.update(zip(of.rows, logprobs_N.split([_reply_tokens(rows[i]) for i in of.rows]), strict=True))
    return [found[i] for i in range(len(rows))]


def reply_states(base: Base, rows: Sequence[Row]) -> list[Tensor]:
    """The base's last hidden states that predict each row's reply tokens, shape (N, D) a row."""
    found: dict[int, Tensor] = {}
    for of in _passes(base, rows, None, None, PASS_TOKENS):
        found.update(zip(of.rows, of.states_N_D.split([_reply_tokens(rows[i]) for i in of.rows]), strict=True))
    # Each its own memory, so that one that is kept does not keep the pass.
    return [found[i].clone() for i in range(len(rows))]


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


@dataclass(frozen=True)
class _Pass:
    """Some of the rows, in the order in which they were packed."""

    rows: list[int]
    packed: Packed
    states_N_D: Tensor


def _passes(
    base: Base, rows: Sequence[Row], stack: LoraStack | None, slots: Sequence[int] | None, max_tokens: int
) -> Iterator[_Pass]:
    """All rows, those that begin alike under the same slot as trees."""
    trees = list(grow(rows, slots or [0] * len(rows), max_tokens=max_tokens))
    for batch in batches(trees, [tree.tokens for tree in trees], max_tokens=max_tokens):
        some = [trees[i].rows for i in batch]
        packed = pack_trees([[rows[i] for i in tree] for tree in some], device=base.device)
        states_N_D = _states(base, packed, stack, slots and [slots[tree[0]] for tree in some])
        yield _Pass([i for tree in some for i in tree], packed, states_N_D)


def _reply_tokens(row: Row) -> int:
    return sum(map(len, row.replies))


def _states(base: Base, packed: Packed, stack: LoraStack | None, slots: Sequence[int] | None) -> Tensor:
    with torch.no_grad():
        if stack is None:
            return base.states(packed)
        with stack.on(slots):
            return base.states(packed)
