"""Replies of the model in this process: batched, each row from its own seed, each under its own adapter.

A sample is the largest of logits plus Gumbel noise, which is a draw from their softmax; the noise of a row comes from its seed alone, so
what one scope's model says does not depend on who else is in the batch.

What rows of one adapter begin with alike, as all prompts of one user do with one context, is run once, and the rows branch off from
its cache.

Letters: G groups that begin alike, B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.consolidation.base import Base
from workers.consolidation.lora import LoraStack
from workers.consolidation.rows import in_common

# A row joins a group if that leaves at least this share of it to what is run once.
SHARED = 0.5

Tokens = tuple[int, ...]
Noise = Callable[[Tensor, Tensor], Tensor]
"""Called by transformers with what there is so far, shape (B, T), and the next token's logits, shape (B, V); gives other logits."""


def sample(
    base: Base,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    noise: Noise | None = None,
    stack: LoraStack | None = None,
    slots: Sequence[int] | None = None,
) -> list[Tokens]:
    """One reply a prompt, in tokens, with the end of turn where the model ended it.

    Args:
        noise: for a draw at temperature 1 without any cut or penalty, of a seed for each prompt; without it the likeliest token is taken,
            under the model's own penalty of repetition, as it is served.
        stack, slots: which adapter each prompt is replied to under; without them what is on already.
    """
    if not prompts:
        return []
    end = base.tokenizer.eos_token_id

    def under(rows: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext() if stack is None or slots is None else stack.on([slots[i] for i in rows])

    groups = _groups(prompts, slots or [0] * len(prompts))
    trunks = [prompts[group.rows[0]][: group.shared] for group in groups]
    of_row = {i: g for g, group in enumerate(groups) for i in group.rows}
    of_B = [of_row[i] for i in range(len(prompts))]
    trunks_G_T, shared_G_T = _padded(trunks, end, base.device)
    rest_B_T, seen_B_T = _padded([p[groups[g].shared :] for p, g in zip(prompts, of_B, strict=True)], end, base.device)
    branch_B = torch.tensor(of_B, device=base.device)
    with torch.inference_mode():
        with under([group.rows[0] for group in groups]):
            cache = _run(base, trunks_G_T, shared_G_T)
        cache.batch_select_indices(branch_B)
        # The rest's padding lies behind what is shared; it is not seen, and positions don't count it.
        ids_B_T = torch.cat([trunks_G_T[branch_B], rest_B_T], dim=1)
        with under(range(len(prompts))):
            output_B_T = base.model.generate(
                ids_B_T,
                attention_mask=torch.cat([shared_G_T[branch_B], seen_B_T], dim=1),
                past_key_values=cache,
                do_sample=False,
                temperature=None,
                top_k=None,
                top_p=None,
                repetition_penalty=served_penalty(base) if noise is None else 1.0,
                logits_processor=[] if noise is None else [noise],
                max_new_tokens=max_new_tokens,
                eos_token_id=end,
                pad_token_id=end,
            )
    return [until_end(tokens, end) for tokens in output_B_T[:, ids_B_T.shape[1] :].tolist()]


@dataclass
class _Group:
    """Rows of one slot that begin alike."""

    rows: list[int]
    shared: int
    """So many tokens; no row ends with them."""


def _groups(prompts: Sequence[Tokens], slots: Sequence[int]) -> list[_Group]:
    groups: list[_Group] = []
    for i in sorted(range(len(prompts)), key=lambda i: (slots[i], prompts[i])):
        if groups and slots[groups[-1].rows[0]] == slots[i]:
            group = groups[-1]
            shared = min(group.shared, len(prompts[i]) - 1, in_common(prompts[group.rows[0]], prompts[i]))
            longest = max(len(prompts[i]), *(len(prompts[row]) for row in group.rows))
            if shared >= SHARED * longest:
                group.rows.append(i)
                group.shared = shared
                continue
        groups.append(_Group([i], len(prompts[i]) - 1))
    return groups


def _padded(rows: Sequence[Tokens], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and a mask of what is not padding, which is at the left, both of shape (len(rows), T)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _run(base: Base, ids_G_T: Tensor, mask_G_T: Tensor) -> Any:
    """The model's cache of these."""
    return base.model(
        input_ids=ids_G_T,
        attention_mask=mask_G_T,
        position_ids=(mask_G_T.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values


def served_penalty(base: Base) -> float:
    """The model's own penalty of repetition, which vLLM takes from its generation config too; 1 is none."""
    return getattr(base.model.generation_config, "repetition_penalty", None) or 1.0


class GumbelNoise:
    """Noise of a seed for each row. On a GPU it is drawn there: on the CPU it would take longer than the model."""

    def __init__(self, seeds: Sequence[int], *, device: torch.device) -> None:
        self._device = device
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores_B_V: Tensor) -> Tensor:
        vocabulary = scores_B_V.shape[1]
        uniform_B_V = torch.stack([torch.rand(vocabulary, generator=g, device=self._device) for g in self._generators])
        # The ends of [0, 1) have no logarithm.
        tiny = torch.finfo(torch.float32).tiny
        noise_B_V = -(-uniform_B_V.clamp(tiny, 1 - 1e-7).log()).log()
        return scores_B_V.float() + noise_B_V


def until_end(tokens: list[int], end: int) -> Tokens:
    """A reply's tokens up to and with the end of turn."""
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
