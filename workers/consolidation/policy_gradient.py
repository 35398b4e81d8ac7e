"""Slow weights from rewards: group advantages and CISPO, pure functions on tensors (Fast-Slow Training, arXiv 2605.12484).

Each problem is rolled out G times, G/K under each of the K contexts, and all G are one group: a context that earns more than the others
lifts the advantage of what was said under it, so the weights learn from the best of the population.

Letters: P problems, G rollouts of a problem, N reply tokens of a pass.
"""

from torch import Tensor

# Largest importance ratio that counts: the paper's clip_high of 3 above one. Its clip_low of 1 puts the lower end at zero, where a ratio
# of probabilities never is, so there is none.
RATIO_CAP = 4.0
# Beside a standard deviation, so that a group whose rewards hardly differ is not blown up.
STD_EPS = 1e-4


def group_advantages(rewards_P_G: Tensor, eps: float = STD_EPS) -> Tensor:
    """Normalized in its problem, then over the batch, float32, shape (P, G), without gradient.

        A = (r - mean_G r) / (std_G r + eps),    then A / (std_PG A + eps)

    GRPO's (arXiv 2402.03300) with the second pass of Fast-Slow Training (arXiv 2605.12484). The mean over the batch is zero already. The
    deviations are the population's. A problem whose rollouts all earn the same says nothing and gets exactly 0: rounding in its mean
    would otherwise pass for a signal, which a batch of such problems alone would then scale to one.

    Raises:
        ValueError: a reward is not finite.
    """
    if not rewards_P_G.isfinite().all():
        raise ValueError("a reward is not a finite number")
    rewards = rewards_P_G.detach().double()
    flat_P_1 = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    deviation_P_1 = rewards.std(dim=1, keepdim=True, correction=0)
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (deviation_P_1 + eps)
    advantages = advantages.masked_fill(flat_P_1, 0.0)
    return (advantages / (advantages.std(correction=0) + eps)).float()


def cispo_tokens(logprobs_N: Tensor, old_logprobs_N: Tensor, advantages_N: Tensor, *, cap: float = RATIO_CAP) -> Tensor:
    """-sg(min(rho, cap)) * A * log pi_theta of each token, rho = pi_theta / pi_old, shape (N,); sg stops the gradient.

    CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is capped as a weight and the gradient of no token is cut off, as PPO's clip would. A
    token that has become unlikely weighs little, so a negative advantage does not push it down for ever.

    Args:
        logprobs_N: of the reply tokens under the model in training, nats, with gradient.
        old_logprobs_N: under the model that sampled them, nats.
        advantages_N: of each token: its rollout's, or its own.

    Raises:
        ValueError: the three differ in shape, or the cap is not above zero.
    """
    if not logprobs_N.shape == old_logprobs_N.shape == advantages_N.shape:
        raise ValueError(
            f"{len(logprobs_N)} log-probabilities, {len(old_logprobs_N)} old ones and {len(advantages_N)} advantages"
        )
    if cap <= 0:
        raise ValueError(f"a cap of {cap} leaves no token any weight")
    ratio_N = (logprobs_N.detach() - old_logprobs_N.detach()).exp().clamp(max=cap)
    return -ratio_N * advantages_N.detach() * logprobs_N


def cispo_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    batch_tokens: int | None = None,
    cap: float = RATIO_CAP,
) -> Tensor:
    """CISPO's mean over all tokens of the batch, a scalar: a long rollout counts for as much more as it has more tokens.

    Args:
        batch_tokens: of a batch that goes through in several passes, its reply tokens in all; the passes' losses then add up to the
            batch's. Else those of this pass.

    Raises:
        ValueError: as `cispo_tokens`; or there is no token.
    """
    tokens = len(logprobs_N) if batch_tokens is None else batch_tokens
    if tokens < 1:
        raise ValueError("a batch without a reply token")
    return cispo_tokens(logprobs_N, old_logprobs_N, advantages_N, cap=cap).sum() / tokens
