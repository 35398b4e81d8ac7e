"""Losses and divergences against figures worked out by hand."""

import math

import pytest
import torch

from workers.consolidation.divergence import kl_base_adapter_nats, kl_of_states, summarize, t95
from workers.consolidation.objective import MARGIN_NATS, NLL_WEIGHT, next_beta, pair_loss, rate_loss


def test_kl_of_two_tokens_is_as_worked_out_by_hand():
    base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    adapter = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_base_adapter_nats(base, adapter).tolist() == pytest.approx([by_hand, 0.0], abs=1e-7)


def test_kl_is_forward_so_the_base_weighs_the_vocabulary():
    base, adapter = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl_base_adapter_nats(base, adapter).item() == pytest.approx(forward, abs=1e-6)
    assert forward != pytest.approx(reverse, abs=0.1)


def test_logits_shifted_by_a_constant_have_no_divergence():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    assert kl_base_adapter_nats(logits, logits + 5.0).abs().max().item() < 1e-6


def test_chunks_give_the_same_divergence_and_gradient_as_all_tokens_at_once():
    generator = torch.Generator().manual_seed(0)
    base, states, head = (torch.randn(n, 4, generator=generator) for n in (600, 600, 11))
    states.requires_grad_()
    whole = kl_base_adapter_nats(base @ head.T, states @ head.T)
    (expected,) = torch.autograd.grad(whole.sum(), states)
    chunked = kl_of_states(base, states, head)
    (gradient,) = torch.autograd.grad(chunked.sum(), states)
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_the_bound_over_anchors_is_students():
    # Mean 0.02, deviation 0.01, five anchors: t(4) = 2.132.
    values = torch.tensor([0.01, 0.03, 0.02, 0.01, 0.03])
    found = summarize(values, tokens=50, budget_nats=0.04)
    assert found.mean_nats == pytest.approx(0.02, abs=1e-6)
    assert found.upper95_nats == pytest.approx(0.02 + 2.132 * 0.01 / math.sqrt(5), abs=1e-6)
    assert found.worst_nats == pytest.approx(0.03, abs=1e-6)
    assert found.within


def test_one_anchor_alone_bounds_nothing():
    assert not summarize(torch.tensor([0.0]), tokens=9, budget_nats=1.0).within


@pytest.mark.parametrize(("freedom", "point"), [(1, 6.314), (4, 2.132), (5, 2.015), (10, 1.812), (47, 1.678)])
def test_points_of_students_t_are_those_of_the_tables(freedom, point):
    assert t95(freedom) == pytest.approx(point, abs=1e-3)


def test_a_pair_at_its_margin_costs_nothing_but_a_corrections_likelihood():
    wanted, unwanted = torch.tensor([MARGIN_NATS, MARGIN_NATS]), torch.zeros(2)
    nll = torch.tensor([2.0, 2.0])
    losses = pair_loss(wanted, unwanted, nll, torch.tensor([1.0, 0.0]))
    assert losses.tolist() == pytest.approx([NLL_WEIGHT * 2.0, 0.0])


def test_a_correction_keeps_what_it_gains_past_the_margin():
    h = torch.tensor([MARGIN_NATS - 0.3, MARGIN_NATS + 0.3], requires_grad=True)
    losses = pair_loss(h, torch.zeros(2), torch.zeros(2), torch.ones(2))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.09, 0.0])
    assert h.grad.tolist() == pytest.approx([-0.6, 0.0])


def test_a_preference_is_pulled_to_its_margin_from_both_sides():
    h = torch.tensor([MARGIN_NATS - 0.3, MARGIN_NATS + 0.3], requires_grad=True)
    losses = pair_loss(h, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.09, 0.09])
    assert h.grad.tolist() == pytest.approx([-0.6, 0.6])


def test_ratings_cost_as_worked_out_by_hand():
    h = torch.tensor([0.2, 0.2, 0.1])
    rating = torch.tensor([1.0, -0.5, 1.0])
    mismatched = torch.tensor([0.1, 0.1, 0.1])

    def cost(excess):
        return 1 - 1 / (1 + math.exp(-5 * excess))

    expected = [cost(0.1), 0.5 * cost(-0.1), 0.5]
    assert rate_loss(h, rating, mismatched).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_rating_pulls_its_reply_only_beyond_what_all_replies_get():
    mismatched = torch.tensor([0.4], requires_grad=True)
    h = torch.tensor([0.4], requires_grad=True)
    rate_loss(h, torch.tensor([1.0]), mismatched).sum().backward()
    assert h.grad.item() == pytest.approx(-5 / 4)
    assert mismatched.grad is None


def test_beta_grows_over_the_target_and_shrinks_under_it():
    assert next_beta(1.0, kl_nats=0.02, target_nats=0.01) == pytest.approx(math.exp(0.1))
    assert next_beta(1.0, kl_nats=0.005, target_nats=0.01) == pytest.approx(math.exp(-0.05))
    assert next_beta(1.0, kl_nats=100.0, target_nats=0.01) == pytest.approx(math.exp(0.1))
