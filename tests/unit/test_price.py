"""What an adapter is worth, by hand."""

import pytest

from service.domain.price import price, value_nats


def test_half_of_a_budget_costs_what_25_tokens_of_context_do() -> None:
    assert value_nats(margin_gain_nats=0.0, tokens_saved=25, text_share=0.0, chat_share=0.5) == pytest.approx(0.0)


def test_three_short_exemplars_are_worth_both_budgets() -> None:
    worth = value_nats(margin_gain_nats=0.0, tokens_saved=100, text_share=1.0, chat_share=1.0)
    assert worth == pytest.approx(0.0)


def test_for_nearly_the_same_gain_the_smaller_scale_is_worth_more() -> None:
    # KL grows with the square of the scale.
    whole = value_nats(margin_gain_nats=0.30, tokens_saved=0, text_share=0.9, chat_share=0.9)
    half = value_nats(margin_gain_nats=0.29, tokens_saved=0, text_share=0.225, chat_share=0.225)
    assert half > whole
    assert value_nats(margin_gain_nats=0.25, tokens_saved=0, text_share=0.225, chat_share=0.225) < whole


def test_the_price_of_each_gain_is_what_it_cost_in_chat_drift() -> None:
    found = price(kl_text_nats=0.01, kl_chat_nats=0.06, tokens_saved=300, margin_gain_nats=0.3, value_nats=0.2)
    assert found.kl_per_hundred_tokens == pytest.approx(0.02)
    assert found.kl_per_margin_nat == pytest.approx(0.2)


def test_what_was_not_gained_has_no_price() -> None:
    found = price(kl_text_nats=0.01, kl_chat_nats=0.06, tokens_saved=-20, margin_gain_nats=-0.1, value_nats=-0.3)
    assert found.kl_per_hundred_tokens is None
    assert found.kl_per_margin_nat is None
