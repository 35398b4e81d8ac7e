"""Losses and divergences against figures worked out by hand."""

import math

import pytest
import torch

from workers.consolidation.divergence import (
    kl_adapter_base_nats,
    kl_base_adapter_nats,
    kl_of_states,
    reverse_kl_of_states,
    summarize,
    t95,
)
from workers.consolidation.objective import (
    CREDIT_CAP_NATS,
    MARGIN_NATS,
    NLL_WEIGHT,
    distill_kl,
    hindsight_advantages,
    hindsight_loss,
    next_beta,
    pair_loss,
    rate_loss,
    signal_weights,
)


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


def test_reverse_kl_of_two_tokens_is_as_worked_out_by_hand():
    base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    adapter = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    by_hand = [
        0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    ]
    assert kl_adapter_base_nats(base, adapter).tolist() == pytest.approx(by_hand, abs=1e-6)


def test_the_gradient_of_reverse_kl_is_as_worked_out_by_hand():
    # d/dz_v of sum p (log p - log q) is p_v * (log p_v - log q_v - KL).
    base, logits = torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2, requires_grad=True)
    kl = kl_adapter_base_nats(base, logits)
    kl.sum().backward()
    by_hand = [0.5 * (math.log(0.5 / q) - kl.item()) for q in (0.9, 0.1)]
    assert logits.grad[0].tolist() == pytest.approx(by_hand, abs=1e-6)


def test_chunks_give_the_same_reverse_divergence_and_a_gradient_in_the_student_alone():
    generator = torch.Generator().manual_seed(0)
    teacher, student, head = (torch.randn(n, 4, generator=generator) for n in (600, 600, 11))
    teacher.requires_grad_()
    student.requires_grad_()
    whole = kl_adapter_base_nats(teacher @ head.T, student @ head.T)
    (expected,) = torch.autograd.grad(whole.sum(), student)
    chunked = reverse_kl_of_states(teacher, student, head)
    chunked.sum().backward()
    assert torch.allclose(chunked, whole, atol=1e-6)
    assert torch.allclose(student.grad, expected, atol=1e-6)
    assert teacher.grad is None


def test_states_of_another_number_of_tokens_are_refused():
    head = torch.ones(5, 4)
    for kl in (kl_of_states, reverse_kl_of_states):
        with pytest.raises(ValueError, match="shapes"):
            kl(torch.ones(1, 4), torch.ones(3, 4), head)


def test_distillation_is_the_mean_over_each_replys_tokens():
    # The head is the identity, so states are logits.
    teacher, student = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1]]).log(), torch.zeros(3, 2)
    kl = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = distill_kl(
        teacher_states_N_D=teacher,
        student_states_N_D=student,
        head_V_D=torch.eye(2),
        reply_N=torch.tensor([0, 0, 1]),
        replies=2,
    )
    assert found.tolist() == pytest.approx([kl / 2, kl], abs=1e-6)


def test_a_student_that_follows_the_distillation_ends_at_its_teacher():
    generator = torch.Generator().manual_seed(0)
    teacher, head = torch.randn(6, 4, generator=generator), torch.randn(5, 4, generator=generator)
    student = torch.zeros(6, 4, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = reverse_kl_of_states(teacher, student, head).mean()
        loss.backward()
        optimizer.step()
    both = [(states @ head.T).softmax(dim=1) for states in (student, teacher)]
    assert torch.allclose(*both, atol=0.01)


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


def test_a_comments_credit_is_what_it_changes_beyond_the_replys_mean():
    reply = torch.tensor([0, 0, 0, 1, 1])
    plain = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0])
    # The comment makes the first reply likelier as a whole, its last token not; the second it changes all over alike.
    said = plain + torch.tensor([0.5, 0.5, -0.4, -2.0, -2.0])
    found = hindsight_advantages(said, plain, reply, 2)
    assert found.tolist() == pytest.approx([0.3, 0.3, -0.6, 0.0, 0.0], abs=1e-6)


def test_one_odd_token_has_no_more_than_the_most_credit():
    change = torch.tensor([9.0, 0.0, 0.0])
    found = hindsight_advantages(change, torch.zeros(3), torch.zeros(3, dtype=torch.long), 1)
    assert found.tolist() == pytest.approx([CREDIT_CAP_NATS, -CREDIT_CAP_NATS, -CREDIT_CAP_NATS])


def test_credit_of_other_tokens_is_refused():
    with pytest.raises(ValueError, match="3 tokens with the comment and 2"):
        hindsight_advantages(torch.zeros(3), torch.zeros(2), torch.zeros(2, dtype=torch.long), 1)


def test_credit_is_paid_as_a_mean_over_each_reply():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages, reply = torch.tensor([0.5, -0.5, 1.0]), torch.tensor([0, 0, 1])
    losses = hindsight_loss(logprobs, advantages, reply, 2)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([(0.5 * 1.0 - 0.5 * 2.0) / 2, 3.0])
    assert logprobs.grad.tolist() == pytest.approx([-0.25, 0.25, -1.0])


def test_with_a_reference_blame_ends_where_its_token_has_become_unlikely():
    blame, reply = torch.tensor([-1.0]), torch.tensor([0])
    pushes = []
    for logprob in (-1.0, -4.0):
        now = torch.tensor([logprob], requires_grad=True)
        hindsight_loss(now, blame, reply, 1, reference_N=torch.tensor([-1.0])).sum().backward()
        pushes.append(now.grad.item())
    assert pushes == pytest.approx([1.0, math.exp(-3.0)])


def test_a_kind_of_signal_alone_counts_one():
    assert signal_weights({"rating": 1}) == pytest.approx({"rating": 1.0})
    assert signal_weights({"correction": 50, "rating": 0}) == pytest.approx({"correction": 1.0, "rating": 0.0})


def test_signals_weigh_as_worked_out_by_hand():
    # n / (n + 4): a half and three quarters; over the 16 examples they are 11/16 on average.
    expected = {"correction": 0.5 * 16 / 11, "rating": 0.75 * 16 / 11}
    assert signal_weights({"correction": 4, "rating": 12}) == pytest.approx(expected)


@pytest.mark.parametrize("counts", [{"a": 1, "b": 30, "c": 7}, {"a": 5, "b": 5}, {"a": 1000, "b": 1}])
def test_signal_weights_keep_the_size_of_the_loss_and_favour_what_there_is_much_of(counts):
    weights = signal_weights(counts)
    total = sum(counts.values())
    assert sum(counts[kind] * weights[kind] for kind in counts) / total == pytest.approx(1.0)
    assert sorted(counts, key=counts.get) == sorted(counts, key=weights.get)


def test_no_signal_weighs_nothing_and_a_negative_count_is_refused():
    assert signal_weights({"rating": 0}) == {"rating": 0.0}
    with pytest.raises(ValueError, match="negative"):
        signal_weights({"rating": -1})


def test_beta_grows_over_the_target_and_shrinks_under_it():
    assert next_beta(1.0, kl_nats=0.02, target_nats=0.01) == pytest.approx(math.exp(0.1))
    assert next_beta(1.0, kl_nats=0.005, target_nats=0.01) == pytest.approx(math.exp(-0.05))
    assert next_beta(1.0, kl_nats=100.0, target_nats=0.01) == pytest.approx(math.exp(0.1))
