"""What an adapter is trained for: pure functions on tensors.

The measure of a reply is h(y) = (1/|y|) * log( pi_theta(y|x) / pi_0(y|x) ) in nats per token, pi_0 the base with no adapter. Being a mean
over tokens it favours neither long nor short replies. The whole loss is

    L = mean over examples of (L_pair or |r| * L_rate) + beta_text * KL_text + beta_chat * KL_chat

with the exact KL of `divergence.py` on anchors that steer.

Letters: E examples.
"""

import math

import torch
from torch import Tensor

# By how much a wanted reply should gain on an unwanted one, nats per token. What people write lies one to three nats below what the model
# says: at 0.2, and with a correction pulled back to it from above, nothing was learnt (measured).
MARGIN_NATS = 1.0
# Likelihood of the wanted text itself: without it a pair may be won by unlearning the unwanted reply alone.
NLL_WEIGHT = 1.0
# Steepness of a rating's sigmoid per nat per token; h is a mean, so it is tenths.
RATE_SLOPE = 5.0
# How fast log(beta) follows the excess of KL, per step, and the largest excess that counts, so that one odd batch does not throw it.
DUAL_RATE = 0.1
MAX_EXCESS = 1.0


def pair_loss(h_wanted_E: Tensor, h_unwanted_E: Tensor, nll_wanted_E: Tensor, correction_E: Tensor) -> Tensor:
    """Of a preference d^2, of a correction max(d, 0)^2 + NLL(y+), shape (E,); d = m - (h(y+) - h(y-)), m = 1.

    IPO's squared margin (arXiv 2310.12036), on means per token. A preferred reply is only better than another one, so its gain ends
    at the margin. A correction is what a person wrote: it is imitated, and what the likelihood gains past the margin is kept.

    Args:
        nll_wanted_E: -log pi_theta(y+|x) / |y+|, nats per token.
        correction_E: 1 for a correction, 0 for a preference.
    """
    short_E = MARGIN_NATS - (h_wanted_E - h_unwanted_E)
    squared_E = torch.where(correction_E > 0, short_E.clamp(min=0), short_E) ** 2
    return squared_E + NLL_WEIGHT * correction_E * nll_wanted_E


def rate_loss(h_E: Tensor, rating_E: Tensor, h_mismatched_E: Tensor) -> Tensor:
    """|r| * (1 - sigmoid(5 * sign(r) * (h(y) - z))), shape (E,).

    KTO's shape (arXiv 2402.01306): z = max(0, mean h of replies to other prompts), without gradient, is what the adapter gives any
    reply, so only what it gives this one beyond that counts.

    Args:
        rating_E: in [-1, 1].
        h_mismatched_E: h of a reply to another prompt, for each example.
    """
    z = h_mismatched_E.mean().detach().clamp(min=0)
    return rating_E.abs() * (1 - torch.sigmoid(RATE_SLOPE * rating_E.sign() * (h_E - z)))


def next_beta(beta: float, *, kl_nats: float, target_nats: float) -> float:
    """One step of dual ascent in log space: log beta += 0.1 * (KL / target - 1); beta grows while KL is over its target."""
    excess = min(kl_nats / target_nats - 1.0, MAX_EXCESS)
    return beta * math.exp(DUAL_RATE * excess)
