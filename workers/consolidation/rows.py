"""Scoring replies in tokens: a prompt is run once, and every reply to it branches off.

A row is `prompt | reply 1 | reply 2 ...` in one sequence. A reply sees the prompt and itself, and its positions start after the prompt, so
its log-probabilities are those of a sequence of its own. Wanted and unwanted reply thus share the work on the prompt, which with a
context before it is the longest part. Likewise rows whose prompts begin alike, as those of one user with one context do, can be one
sequence, a tree whose trunk is run once (tree attention, as in arXiv 2305.09781).

Letters: B sequences, T tokens of the longest one, S segments, N reply tokens of all rows, R replies of all rows, V vocabulary, D width.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of this many tokens at once: 50 MB in float32 for a vocabulary of 50,000, a few times that with their gradient.
CHUNK_TOKENS = 256
# A row joins a tree where that saves more than it costs. What they share is not run again; but attention is computed between all tokens
# of a sequence, whether they see each other or not, so each token that is added costs more the longer the tree is. In a tree of so many
# tokens that is as much as all else that a token costs (the default model on a CPU: 0.08 us a token and token, 147 us a token and layer).
SAVING_TOKENS = 1000


@dataclass(frozen=True)
class Row:
    """A prompt with replies to it, as token ids. Neither the prompt nor a reply is empty."""

    prompt: tuple[int, ...]
    replies: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.replies))


RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Packed:
    """Rows as tensors, a sequence each or several in one.

    Where and what: the state at flat position `at_N` predicts `target_N`, a token of reply `reply_N`.
    """

    tokens_B_T: Tensor
    positions_B_T: Tensor
    mask_B_1_T_T: Tensor
    """True where a query may see a key."""
    at_N: Tensor
    target_N: Tensor
    reply_N: Tensor
    replies: int

    def mean_by_reply(self, values_N: Tensor) -> Tensor:
        """Means over each reply's tokens, shape (R,)."""
        counts_R = torch.zeros(self.replies, device=values_N.device).index_add_(
            0, self.reply_N, torch.ones_like(values_N, dtype=torch.float32)
        )
        sums_R = torch.zeros(self.replies, device=values_N.device, dtype=values_N.dtype)
        return sums_R.index_add(0, self.reply_N, values_N) / counts_R

    def part(self, replies: Sequence[int]) -> "tuple[Packed, Tensor]":
        """These replies alone, numbered from 0 in their order in the rows, and where their tokens are among all N."""
        number_R = torch.full((self.replies,), -1, device=self.reply_N.device)
        number_R[list(replies)] = torch.arange(len(replies), device=self.reply_N.device)
        of_N = number_R[self.reply_N]
        tokens_M = (of_N >= 0).nonzero()[:, 0]
        some = replace(
            self,
            at_N=self.at_N[tokens_M],
            target_N=self.target_N[tokens_M],
            reply_N=of_N[tokens_M],
            replies=len(replies),
        )
        return some, tokens_M


def pack(rows: Sequence[Row], *, device: torch.device) -> Packed:
    """Rows, each a sequence of its own, padded at the right to the longest."""
    return pack_trees([[row] for row in rows], device=device)


def pack_trees(trees: Sequence[Sequence[Row]], *, device: torch.device) -> Packed:
    """Trees of rows, each a sequence in which the beginning that neighbours' prompts have in common is there once.

    N and R go through the trees and their rows in their order. Rows that have much in common should be neighbours: sort them.
    """
    grown = [_grown(rows) for rows in trees]
    longest = max(len(tree.tokens) for tree in grown)
    segments = max(len(tree.sees) for tree in grown)
    tokens = torch.zeros(len(trees), longest, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    # The last segment is the padding's: it sees itself, so that no softmax is empty.
    segment = torch.full_like(tokens, segments)
    sees = torch.zeros(len(trees), segments + 1, segments + 1, dtype=torch.bool)
    sees[:, segments, segments] = True
    at: list[int] = []
    targets: list[int] = []
    replies: list[int] = []
    count = 0
    for b, tree in enumerate(grown):
        length = len(tree.tokens)
        tokens[b, :length] = torch.tensor(tree.tokens)
        positions[b, :length] = torch.tensor(tree.positions)
        segment[b, :length] = torch.tensor(tree.segments)
        for number, seen in enumerate(tree.sees):
            sees[b, number, list(seen)] = True
        for reply, states in tree.replies:
            at += [b * longest + state for state in states]
            targets += reply
            replies += [count] * len(reply)
            count += 1
    return Packed(
        tokens_B_T=tokens.to(device),
        positions_B_T=positions.to(device),
        # T x T numbers a sequence: where they are needed, not on the way there.
        mask_B_1_T_T=_mask(segment.to(device), sees.to(device)),
        at_N=torch.tensor(at, device=device),
        target_N=torch.tensor(targets, device=device),
        reply_N=torch.tensor(replies, device=device),
        replies=count,
    )


@dataclass(frozen=True)
class _Tree:
    """One sequence, token by token. A segment is a stretch without branches; `sees` has for each those that lead to it, and itself."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    sees: list[tuple[int, ...]]
    replies: list[tuple[tuple[int, ...], list[int]]]
    """Each reply's tokens, and where the states lie that predict them."""


def _grown(rows: Sequence[Row]) -> _Tree:
    tokens: list[int] = []
    parents: list[int] = []
    positions: list[int] = []
    replies: list[tuple[tuple[int, ...], list[int]]] = []

    def grow(path: list[int], more: Sequence[int]) -> list[int]:
        """Where these tokens lie, which follow those of the path."""
        start = len(tokens)
        tokens.extend(more)
        parents.extend([path[-1] if path else -1, *range(start, start + len(more))][: len(more)])
        positions.extend(range(len(path), len(path) + len(more)))
        return list(range(start, start + len(more)))

    path: list[int] = []
    before: Row | None = None
    for row in rows:
        path = path[: in_common(before.prompt, row.prompt)] if before else []
        path += grow(path, row.prompt[len(path) :])
        for reply in row.replies:
            replies.append((reply, [path[-1], *grow(path, reply)[:-1]]))
        before = row
    children = Counter(parents)
    segments: list[int] = []
    sees: list[tuple[int, ...]] = []
    for place, parent in enumerate(parents):
        if parent < 0 or parent != place - 1 or children[parent] > 1:
            sees.append((*(sees[segments[parent]] if parent >= 0 else ()), len(sees)))
        segments.append(len(sees) - 1)
    return _Tree(tokens, positions, segments, sees, replies)


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _mask(segment_B_T: Tensor, sees_B_S_S: Tensor) -> Tensor:
    """A query sees, of the segments that lead to its own, all keys before it, and itself."""
    length = segment_B_T.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_B_T.device).tril()
    of_B = torch.arange(len(segment_B_T), device=segment_B_T.device)[:, None, None]
    return (sees_B_S_S[of_B, segment_B_T[:, :, None], segment_B_T[:, None, :]] & causal)[:, None]


def token_logprobs(states_N_D: Tensor, head_V_D: Tensor, target_N: Tensor) -> Tensor:
    """Log-probability of each target under softmax(states @ head^T), float32, shape (N,).

    In chunks whose logits are computed again for the gradient, so that long replies fit the memory.
    """
    if len(target_N) <= CHUNK_TOKENS:
        return _token_logprobs(states_N_D, head_V_D, target_N)
    parts = zip(states_N_D.split(CHUNK_TOKENS), target_N.split(CHUNK_TOKENS), strict=True)
    return torch.cat([checkpoint(_token_logprobs, s, head_V_D, t, use_reentrant=False) for s, t in parts])


def _token_logprobs(states_N_D: Tensor, head_V_D: Tensor, target_N: Tensor) -> Tensor:
    logits_N_V = (states_N_D @ head_V_D.T).float()
    return logits_N_V.gather(1, target_N[:, None])[:, 0] - logits_N_V.logsumexp(dim=1)


def batches(items: Sequence[RowT], lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices of items in batches of similar length, each of at most `max_tokens` with its padding (or of a single item)."""
    batch: list[int] = []
    for index in sorted(range(len(items)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass
class Tree:
    """Indices of rows that are one sequence, and how long that is."""

    rows: list[int]
    tokens: int


def grow(rows: Sequence[Row], slots: Sequence[int], *, max_tokens: int) -> Iterator[Tree]:
    """All rows in trees of at most `max_tokens` (or of one row), each of one slot."""
    tree: Tree | None = None
    for i in sorted(range(len(rows)), key=lambda i: (slots[i], rows[i].prompt)):
        if tree is not None:
            before = tree.rows[-1]
            shared = in_common(rows[before].prompt, rows[i].prompt) if slots[before] == slots[i] else 0
            more = len(rows[i]) - shared
            if shared * SAVING_TOKENS >= more * tree.tokens and tree.tokens + more <= max_tokens:
                tree.rows.append(i)
                tree.tokens += more
                continue
            yield tree
        tree = Tree([i], len(rows[i]))
    if tree is not None:
        yield tree
