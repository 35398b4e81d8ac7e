"""Replies of the model in this process: batched, each row from its own seed, under whichever adapters are on.

A sample is the largest of logits plus Gumbel noise, which is a draw from their softmax; the noise of a row comes from its seed alone, so
what one scope's model says does not depend on who else is in the batch.

Letters: B rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.consolidation.base import Base


def sample(
    base: Base, prompts: Sequence[tuple[int, ...]], *, max_new_tokens: int, seeds: Sequence[int] | None = None
) -> list[tuple[int, ...]]:
    """One reply a prompt, in tokens, with the end of turn where the model ended it.

    Args:
        seeds: one a prompt, for a draw at temperature 1 without any cut or penalty; without them the likeliest token is taken, under the
            model's own penalty of repetition, as it is served.
    """
    if not prompts:
        return []
    longest, end = max(map(len, prompts)), base.tokenizer.eos_token_id
    ids = torch.tensor([[end] * (longest - len(p)) + list(p) for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    with torch.inference_mode():
        output = base.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            repetition_penalty=served_penalty(base) if seeds is None else 1.0,
            logits_processor=[] if seeds is None else [GumbelNoise(seeds, device=base.device)],
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
        )
    return [until_end(tokens, end) for tokens in output[:, longest:].tolist()]


def served_penalty(base: Base) -> float:
    """The model's own penalty of repetition, which vLLM takes from its generation config too; 1 is none."""
    return getattr(base.model.generation_config, "repetition_penalty", None) or 1.0


class GumbelNoise:
    """Called by transformers with each step's logits. On a GPU the noise is drawn there: on the CPU it would take longer than the model."""

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


def until_end(tokens: list[int], end: int) -> tuple[int, ...]:
    """A reply's tokens up to and with the end of turn."""
    return tuple(tokens[: tokens.index(end) + 1] if end in tokens else tokens)
