"""What an adapter is trained for: pure functions on tensors.

The measure of a reply is h(y) = (1/|y|) * log( pi_theta(y|x) / pi_0(y|x) ) in nats per token, pi_0 the base with no adapter. Being a mean
over tokens it favours neither long nor short replies. The whole loss is

    L = mean over examples of w_kind * (L_pair or L_rate, and L_hind where a comment gives credit)
        + w_ctx * L_ctx + beta_text * KL_text + beta_chat * KL_chat

with the exact KL of `divergence.py` on anchors that steer. L_hind is a policy gradient (`policy_gradient.py`), L_ctx a distillation.

Letters: E examples, R replies, N reply tokens, V vocabulary, D width.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from workers.consolidation.divergence import reverse_kl_of_states
from workers.consolidation.policy_gradient import cispo_tokens

# By how much a wanted reply should gain on an unwanted one, nats per token. What people write lies one to three nats below what the model
# says: at 0.2, and with a correction pulled back to it from above, nothing was learnt (measured).
MARGIN_NATS = 1.0
# Likelihood of the wanted text itself: without it a pair may be won by unlearning the unwanted reply alone.
NLL_WEIGHT = 1.0
# Steepness of a rating's sigmoid per nat per token; h is a mean, so it is tenths.
RATE_SLOPE = 5.0
# Most credit of one token. On the default model a comment moves half of the tokens by less than 0.07 and 19 in 20 by less than 0.44
# (measured); beyond this lies 1 in 250, which would have a twentieth of all credit.
CREDIT_CAP_NATS = 1.0
# So many examples of a kind are half believed: the strength of the prior that a new user's guidelines start from, too.
PRIOR_EXAMPLES = 4
# How fast log(beta) follows the excess of KL, per step, and the largest excess that counts, so that one odd batch does not throw it.
DUAL_RATE = 0.1
MAX_EXCESS = 1.0


def pair_loss(h_wanted_E: Tensor, h_unwanted_E: Tensor, nll_wanted_E: Tensor, correction_E: Tensor) -> Tensor:
    """Of a preference d^2, of a correction max(d, 0)^2 + NLL(y+), shape (E,); d = m - (h(y+) - h(y-)), m = 1.

    IPO's squared margin (arXiv 2310.12036; m = 1 / (2 tau)), on means per token. A preferred reply is only better than another one, so
    its gain ends at the margin. A correction is what a person wrote: it is imitated, and what the likelihood gains past the margin is
    kept.

    Args:
        h_wanted_E, h_unwanted_E: h(y+) and h(y-), nats per token.
        nll_wanted_E: -log pi_theta(y+|x) / |y+|, nats per token.
        correction_E: 1 for a correction, 0 for a preference.

    Raises:
        RuntimeError: the shapes differ.
    """
    short_E = MARGIN_NATS - (h_wanted_E - h_unwanted_E)
    squared_E = torch.where(correction_E > 0, short_E.clamp(min=0), short_E) ** 2
    return squared_E + NLL_WEIGHT * correction_E * nll_wanted_E


def rate_loss(h_E: Tensor, rating_E: Tensor, h_other_E: Tensor) -> Tensor:
    """|r| * (1 - sigmoid(5 * sign(r) * (h(y) - z))), shape (E,).

    KTO's shape (arXiv 2402.01306): z = max(0, h of another reply), without gradient, is what the adapter gives any reply, so only what it
    gives this one beyond that counts. KTO takes z as the mean over replies to other prompts of its batch. Those of one user are mostly of
    one style, so that z rises with it and takes off what praise of a style gains; here z is of what the base says to the same prompt by
    itself. So no user's loss depends on who else is in the batch either. KTO's sums over tokens are means here.

    Args:
        h_E: h(y), nats per token.
        rating_E: in [-1, 1]; 0 costs nothing.
        h_other_E: h of the base's own reply to the same prompt, for each example, nats per token.

    Raises:
        RuntimeError: they differ in shape.
    """
    z_E = h_other_E.detach().clamp(min=0)
    return rating_E.abs() * (1 - torch.sigmoid(RATE_SLOPE * rating_E.sign() * (h_E - z_E)))


def distill_kl(
    *, teacher_states_N_D: Tensor, student_states_N_D: Tensor, head_V_D: Tensor, reply_N: Tensor, replies: int
) -> Tensor:
    """(1/|y|) * sum_t KL( pi_theta(.|x, y_<t) || pi_0(.|c, x, y_<t) ) of each reply, nats per token, shape (R,).

    Context distillation (OPCD, arXiv 2602.12275; SDFT, arXiv 2601.19897): the student without the context c learns what the frozen base
    says with it. Exact over the vocabulary, so nothing is estimated from the sampled token. The replies are the student's own samples,
    taken as given: no gradient goes through the sampling. From logits instead of states: `divergence.kl_adapter_base_nats`.

    Args:
        teacher_states_N_D: last hidden states of the base on the same reply tokens, with the context before them; no gradient.
        student_states_N_D: those under the adapter, without the context.
        head_V_D: the base's output embedding, the same for both.
        reply_N: which reply each token is of, in [0, replies).

    Raises:
        ValueError: teacher and student have not as many tokens.
    """
    return _mean_by_reply(reverse_kl_of_states(teacher_states_N_D, student_states_N_D, head_V_D), reply_N, replies)


def hindsight_advantages(logprob_with_comment_N: Tensor, logprob_N: Tensor, reply_N: Tensor, replies: int) -> Tensor:
    """Each token's credit by a comment on its reply, nats, shape (N,), without gradient.

        d_t = log pi_0(y_t | x, comment, y_<t) - log pi_0(y_t | x, y_<t),    A_t = clip(d_t - mean of d over the reply, -1, 1)

    Who knew the comment beforehand would have said some tokens rather and others less: learning from users' replies by self-distillation
    (SDPO, arXiv 2603.12273). Centred, because any comment changes how likely the whole reply is, and that says nothing about
    which of its tokens were at fault; whether the reply was good is the rating's to say.

    Args:
        logprob_with_comment_N, logprob_N: of the reply's tokens under the frozen base, nats.
        reply_N: which reply each token is of, in [0, replies).

    Raises:
        ValueError: the two differ in shape.
    """
    if logprob_with_comment_N.shape != logprob_N.shape:
        raise ValueError(f"{len(logprob_with_comment_N)} tokens with the comment and {len(logprob_N)} without")
    change_N = (logprob_with_comment_N - logprob_N).detach()
    centred_N = change_N - _mean_by_reply(change_N, reply_N, replies)[reply_N]
    return centred_N.clamp(-CREDIT_CAP_NATS, CREDIT_CAP_NATS)


def hindsight_loss(
    logprobs_N: Tensor, advantages_N: Tensor, reply_N: Tensor, replies: int, *, reference_N: Tensor | None = None
) -> Tensor:
    """-(1/|y|) * sum_t sg(rho_t) * A_t * log pi_theta(y_t | x, y_<t) of each reply, shape (R,).

    The policy gradient of hindsight credit (arXiv 2603.12273), its tokens weighted as CISPO's (arXiv 2506.13585). Without a reference
    rho_t = 1, and then the loss has no lower bound: a token with negative credit is pushed down in every epoch alike. With one,
    rho_t = min(pi_theta / pi_0, 4), which goes out as the token becomes unlikely.

    Args:
        logprobs_N: of the reply's tokens under the adapter, nats, with gradient.
        advantages_N: of `hindsight_advantages`.
        reply_N: which reply each token is of, in [0, replies).
        reference_N: log pi_0(y_t | x, y_<t) of the same rows, nats.

    Raises:
        ValueError: the tensors over tokens differ in shape.
    """
    old_N = logprobs_N.detach() if reference_N is None else reference_N
    return _mean_by_reply(cispo_tokens(logprobs_N, old_N, advantages_N), reply_N, replies)


def signal_weights(counts: Mapping[str, int]) -> dict[str, float]:
    """How much an example of each kind of signal counts in a user's loss: w_k in proportion to n_k / (n_k + 4), and w = 1 on average.

    n / (n + 4) is how far n observations outweigh a prior as strong as 4 of them, so a kind that has been seen once is mostly noise yet
    and one that is frequent counts in full. The average is over examples, so that the loss keeps its size, and with it the meaning of a
    learning rate and of beta, whatever the mixture; a kind that is alone counts 1. Kinds without an example get 0.

    Raises:
        ValueError: a count is negative.
    """
    if any(count < 0 for count in counts.values()):
        raise ValueError(f"a negative count of signals: {dict(counts)}")
    trust = {kind: count / (count + PRIOR_EXAMPLES) for kind, count in counts.items()}
    mean = sum(count * trust[kind] for kind, count in counts.items()) / max(sum(counts.values()), 1)
    return {kind: value / mean if mean else 0.0 for kind, value in trust.items()}


def _mean_by_reply(values_N: Tensor, reply_N: Tensor, replies: int) -> Tensor:
    """Means over each reply's tokens, shape (R,); 0 for a reply without any."""
    sums_R = torch.zeros(replies, dtype=values_N.dtype, device=values_N.device).index_add(0, reply_N, values_N)
    return sums_R / reply_N.bincount(minlength=replies).clamp(min=1)


def next_beta(beta: float, *, kl_nats: float, target_nats: float) -> float:
    """One step of dual ascent in log space: log beta += 0.1 * (KL / target - 1); beta grows while KL is over its target."""
    excess = min(kl_nats / target_nats - 1.0, MAX_EXCESS)
    return beta * math.exp(DUAL_RATE * excess)
