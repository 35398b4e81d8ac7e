"""Group advantages and CISPO against figures worked out by hand; `test_objective_against_trl.py` holds CISPO against TRL's."""

import math

import pytest
import torch

from workers.consolidation.policy_gradient import RATIO_CAP, cispo_loss, group_advantages


def test_advantages_are_normalized_in_their_problem_and_then_over_the_batch():
    # Deviations of a half and of sqrt(3)/4: A is +-1 in the first, sqrt(3) once and -1/sqrt(3) thrice in the second; all have deviation 1.
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    expected = [1.0, 1.0, -1.0, -1.0, math.sqrt(3), *[-1 / math.sqrt(3)] * 3]
    assert group_advantages(rewards, 1e-9).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_a_problem_that_says_nothing_leaves_the_others_larger():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    # Half of the batch is 0, so its deviation is sqrt(1/2).
    expected = [math.sqrt(2), -math.sqrt(2), 0.0, 0.0]
    assert group_advantages(rewards, 1e-9).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3])
@pytest.mark.parametrize("rollouts", [1, 3, 6, 7])
def test_a_batch_where_all_earn_the_same_has_no_advantage_by_rounding(reward, rollouts):
    assert group_advantages(torch.full((4, rollouts), reward, dtype=torch.float64)).tolist() == [[0.0] * rollouts] * 4


def test_a_context_that_earns_more_lifts_what_was_said_under_it():
    # The first two of each four rollouts are under one context, the others under another.
    advantages = group_advantages(torch.tensor([[1.0, 0.8, 0.2, 0.0], [0.9, 0.9, 0.1, 0.1]]))
    assert (advantages[:, :2] > 0).all()
    assert (advantages[:, 2:] < 0).all()


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[1.0, math.nan]]))


def test_ratios_are_capped_above_and_not_below():
    ratios = torch.tensor([0.01, 1.0, 3.0, 9.0])
    old = torch.full((4,), -5.0)
    logprobs = (old + ratios.log()).requires_grad_()
    loss = cispo_loss(logprobs, old, torch.tensor([1.0, 1.0, -1.0, 1.0]))
    loss.backward()
    weights = [0.01, 1.0, -3.0, RATIO_CAP]
    assert logprobs.grad.tolist() == pytest.approx([-w / 4 for w in weights], rel=1e-5)
    by_hand = -sum(w * p for w, p in zip(weights, logprobs.tolist(), strict=True)) / 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_passes_of_a_batch_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(10, generator=generator) for _ in range(3))
    whole = cispo_loss(logprobs, old, advantages)
    parts = [
        cispo_loss(*part, batch_tokens=10)
        for part in zip(logprobs.split(4), old.split(4), advantages.split(4), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


def test_rewarded_tokens_gain_and_the_others_lose():
    # One state, five tokens, the third is right: sampled from the model itself, the loss learns it.
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(40):
        sampled = torch.multinomial(logits.detach().softmax(0), 16, replacement=True, generator=generator)
        advantages = group_advantages((sampled == 2).float().view(2, 8)).flatten()
        old = logits.detach().log_softmax(0)[sampled]
        optimizer.zero_grad()
        cispo_loss(logits.log_softmax(0)[sampled], old, advantages).backward()
        optimizer.step()
    assert logits.softmax(0)[2].item() > 0.9


@pytest.mark.parametrize(
    ("old", "cap", "message"), [(torch.zeros(2), 4.0, "2 old ones"), (torch.zeros(3), 0.0, "any weight")]
)
def test_what_cispo_refuses(old, cap, message):
    with pytest.raises(ValueError, match=message):
        cispo_loss(torch.zeros(3), old, torch.zeros(3), cap=cap)


def test_a_batch_without_a_token_is_refused():
    with pytest.raises(ValueError, match="without a reply token"):
        cispo_loss(*(torch.zeros(0) for _ in range(3)))
