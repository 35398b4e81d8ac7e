"""Scoring replies in tokens: a prompt is run once, and every reply to it branches off.

A row is `prompt | reply 1 | reply 2 ...` in one sequence. A reply sees the prompt and itself, and its positions start after the prompt, so
its log-probabilities are those of a sequence of its own. Wanted and unwanted reply thus share the work on the prompt, which with a
context before it is the longest part.

Letters: B rows, T tokens of the longest row, N reply tokens of all rows, R replies of all rows, V vocabulary, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of this many tokens at once: 50 MB in float32 for a vocabulary of 50,000, a few times that with their gradient.
CHUNK_TOKENS = 256


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
    """Rows as tensors. Where and what: the state at flat position `at_N` predicts `target_N`, a token of reply `reply_N`."""

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
    """Rows padded at the right to the longest."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    segment = torch.full_like(tokens, -1)
    at: list[int] = []
    targets: list[int] = []
    replies: list[int] = []
    count = 0
    for b, row in enumerate(rows):
        start = len(row.prompt)
        tokens[b, :start] = torch.tensor(row.prompt)
        positions[b, :start] = torch.arange(start)
        segment[b, :start] = 0
        end = start
        for number, reply in enumerate(row.replies, start=1):
            tokens[b, end : end + len(reply)] = torch.tensor(reply)
            positions[b, end : end + len(reply)] = torch.arange(start, start + len(reply))
            segment[b, end : end + len(reply)] = number
            at += [b * longest + start - 1, *range(b * longest + end, b * longest + end + len(reply) - 1)]
            targets += reply
            replies += [count] * len(reply)
            end += len(reply)
            count += 1
    return Packed(
        tokens_B_T=tokens.to(device),
        positions_B_T=positions.to(device),
        # T x T numbers a row: where they are needed, not on the way there.
        mask_B_1_T_T=_mask(segment.to(device)),
        at_N=torch.tensor(at, device=device),
        target_N=torch.tensor(targets, device=device),
        reply_N=torch.tensor(replies, device=device),
        replies=count,
    )


def _mask(segment_B_T: Tensor) -> Tensor:
    """Causal inside a segment; everything sees the prompt, which is segment 0. Padding sees itself, so that no softmax is empty."""
    length = segment_B_T.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_B_T.device).tril()
    query, key = segment_B_T[:, :, None], segment_B_T[:, None, :]
    return (((query == key) | ((key == 0) & (query > 0))) & causal)[:, None]


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
