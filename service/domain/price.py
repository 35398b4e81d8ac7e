"""What an adapter is worth: margin and tokens gained, less its drift, all in nats per token of reply.

    value = margin gain + TOKEN_NATS * tokens saved - BUDGET_NATS * (KL_text / budget_text + KL_chat / budget_chat)

All are nats per token of reply: a margin is the rise in log-likelihood of wanted over unwanted replies, KL on chat anchors the rise in
cross-entropy on everybody's. Drift is priced in shares of the budgets, for who sets a wider one says that it is cheaper to them, and low:
what is within a budget is what they have declared acceptable, so spending all of it costs what 50 tokens of context do. At three times that
the scale that was worth most was a quarter of what fits, and users were the better served the more of it they had (docs/benchmarks.md has
the table).

The margin grows about with the scale and KL with its square, so the last tenth of the scale costs most: where the value is nearly the same,
the smaller scale wins.
"""

from service.domain.measures import Price

# The whole of one budget.
BUDGET_NATS = 0.01
# A hundred tokens for what nobody could tell in a reply (2 % of likelihood per token, `handoff.COSTS_NOTHING_NATS`): three short exemplars
# are worth what both budgets cost together.
TOKEN_NATS = 0.02 / 100
# Below this a ratio says nothing.
LEAST_GAIN_NATS = 1e-3


def value_nats(*, margin_gain_nats: float, tokens_saved: int, text_share: float, chat_share: float) -> float:
    """The formula above.

    Args:
        margin_gain_nats: mean held-out margin as it would be served, less that of what serves now.
        text_share, chat_share: mean KL over its budget.
    """
    return margin_gain_nats + TOKEN_NATS * tokens_saved - BUDGET_NATS * (text_share + chat_share)


def price(
    *, kl_text_nats: float, kl_chat_nats: float, tokens_saved: int, margin_gain_nats: float, value_nats: float
) -> Price:
    """The figures with what each gain costs in chat KL."""
    saved, gained = tokens_saved > 0, margin_gain_nats >= LEAST_GAIN_NATS
    return Price(
        kl_text_nats=kl_text_nats,
        kl_chat_nats=kl_chat_nats,
        tokens_saved=tokens_saved,
        margin_gain_nats=margin_gain_nats,
        value_nats=value_nats,
        kl_per_hundred_tokens=100 * kl_chat_nats / tokens_saved if saved else None,
        kl_per_margin_nat=kl_chat_nats / margin_gain_nats if gained else None,
    )
