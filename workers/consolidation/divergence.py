"""How far an adapter moves the base model: KL, exact over the vocabulary.

The budget is of the forward one, KL(base || adapter) = sum over v of p_0(v) * (log p_0(v) - log p_theta(v)), in nats per token, at every
token of frozen completions that the base itself sampled: the rise in cross-entropy on the base's own text (0.02 is 2 % of perplexity). No
estimate of it from samples (k1, k3) is used: their gradients are not the gradient of KL. The reverse one is for distillation.

Letters: N tokens, V vocabulary, D width, A anchors.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from service.domain.slow_weights import Divergence
from workers.consolidation.rows import CHUNK_TOKENS


def kl_base_adapter_nats(base_logits_N_V: Tensor, logits_N_V: Tensor) -> Tensor:
    """KL(base || adapter) of each token, float32, shape (N,); differentiable in the second argument."""
    base_N_V = base_logits_N_V.float().log_softmax(dim=1)
    return (base_N_V.exp() * (base_N_V - logits_N_V.float().log_softmax(dim=1))).sum(dim=1)


def kl_adapter_base_nats(base_logits_N_V: Tensor, logits_N_V: Tensor) -> Tensor:
    """KL(adapter || base) of each token, float32, shape (N,): the reverse, where the adapter weighs the vocabulary.

        sum over v of p_theta(v) * (log p_theta(v) - log p_0(v)), nats

    Differentiable in the second argument. It is what distillation minimizes: the adapter is drawn to what the other finds likely and
    away from what it does not, and need not cover all of it.
    """
    adapter_N_V = logits_N_V.float().log_softmax(dim=1)
    return (adapter_N_V.exp() * (adapter_N_V - base_logits_N_V.float().log_softmax(dim=1))).sum(dim=1)


def kl_of_states(base_states_N_D: Tensor, states_N_D: Tensor, head_V_D: Tensor) -> Tensor:
    """KL(base || adapter) from last hidden states, in chunks, so that logits of all tokens never exist at once. Shape (N,).

    Raises:
        ValueError: the two are not states of as many tokens.
    """
    return _in_chunks(kl_base_adapter_nats, base_states_N_D, states_N_D, head_V_D)


def reverse_kl_of_states(teacher_states_N_D: Tensor, student_states_N_D: Tensor, head_V_D: Tensor) -> Tensor:
    """KL(student || teacher) of each token from last hidden states, nats, shape (N,); differentiable in the student alone.

    Raises:
        ValueError: the two are not states of as many tokens.
    """
    return _in_chunks(kl_adapter_base_nats, teacher_states_N_D.detach(), student_states_N_D, head_V_D)


def _in_chunks(
    kl: Callable[[Tensor, Tensor], Tensor], fixed_N_D: Tensor, states_N_D: Tensor, head_V_D: Tensor
) -> Tensor:
    if fixed_N_D.shape != states_N_D.shape:
        raise ValueError(f"states of shapes {tuple(fixed_N_D.shape)} and {tuple(states_N_D.shape)}")

    def chunk(fixed_D: Tensor, states_D: Tensor) -> Tensor:
        return kl(fixed_D @ head_V_D.T, states_D @ head_V_D.T)

    pairs = zip(fixed_N_D.split(CHUNK_TOKENS), states_N_D.split(CHUNK_TOKENS), strict=True)
    if not torch.is_grad_enabled() or len(states_N_D) <= CHUNK_TOKENS:
        return torch.cat([chunk(f, s) for f, s in pairs])
    return torch.cat([checkpoint(chunk, f, s, use_reentrant=False) for f, s in pairs])


def summarize(kl_A: Tensor, *, tokens: int, budget_nats: float) -> Divergence:
    """Mean, one-sided 95 % bound and worst over anchors.

    Args:
        kl_A: mean KL of each anchor, nats per token.
    """
    values = kl_A.double()
    count = len(values)
    mean = values.mean().item()
    deviation = values.std(correction=1).item() if count > 1 else math.inf
    return Divergence(
        mean_nats=mean,
        upper95_nats=mean + t95(count - 1) * deviation / math.sqrt(count),
        worst_nats=values.max().item(),
        anchors=count,
        tokens=tokens,
        budget_nats=budget_nats,
    )


# Student's t for few degrees of freedom, where the series below is too low.
T95_FEW = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132}


def t95(freedom: int) -> float:
    """Upper 95 % point of Student's t, to 0.001, by the Cornish-Fisher series (Abramowitz & Stegun 26.7.5); infinite for no degree."""
    if freedom < 5:
        return T95_FEW.get(freedom, math.inf)
    z = 1.6448536269514722
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
