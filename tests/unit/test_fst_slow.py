"""One step of the slow half, by hand: who is reinforced, what is pooled."""

import copy
from dataclasses import replace

import pytest
import torch

from service.verifiers import Verdict
from tests.fst_tasks import find, roller
from workers.consolidation.policy_gradient import group_advantages
from workers.consolidation.rows import pack, token_logprobs
from workers.fst.contexts import EMPTY, TaskContext
from workers.fst.measure import reverse_kl
from workers.fst.plan import checked_plan
from workers.fst.policy import opened, snapshot
from workers.fst.rollouts import Sampling, roll_groups, rows_of
from workers.fst.slow import Learner

CONTEXT = TaskContext(guidelines=("Say e.",))
PLAN = checked_plan(tasks=("say-e",), arm="fst", contexts=2, rollouts=4, learning_rate=1e-3, warmup_steps=0)


@pytest.fixture
def rollouts(tiny_base):
    problems = find("say-e").problems("train", count=2, seed=0)
    return roll_groups(roller(tiny_base), problems, (EMPTY, CONTEXT), Sampling(6), rollouts=PLAN.rollouts, seed="s")


def rewarded(rollouts, rewards):
    verdicts = [Verdict(reward=reward, feedback="as the test says") for reward in rewards]
    return [replace(rollout, verdict=verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]


def logprobs(policy, rollouts):
    """Mean log-probability of each reply, as the policy is now."""
    with policy.trained() as model, torch.no_grad():
        packed = pack(rows_of(rollouts), device=model.device)
        return packed.mean_by_reply(token_logprobs(model.states(packed), model.head, packed.target_N))


def test_replies_that_earn_more_than_their_group_get_likelier_and_the_others_less_so(
    tiny_base, tiny_settings, rollouts
):
    # In the first group the second context earns, in the other one a reply under each.
    given = rewarded(rollouts, [0, 0, 1, 1, 1, 0, 1, 0])
    with opened(tiny_base, PLAN, tiny_settings) as policy:
        learner = Learner(policy, PLAN)
        before = logprobs(policy, given)
        done = [learner.reinforce(given, step=n) for n in range(4)]
        gained = logprobs(policy, given) - before
    better = torch.tensor([False, False, True, True, True, False, True, False])
    assert (gained[better] > 0).all()
    assert gained[better].min() > gained[~better].max()
    assert done[0].reward == 0.5
    assert done[0].silent == 0.0
    assert done[0].kl_nats == pytest.approx(0.0, abs=1e-6)
    assert done[-1].kl_nats > 1e-6


def test_the_advantage_of_a_context_over_the_others_counts(tiny_base, tiny_settings, rollouts):
    # Within each context all earn the same, so that only pooled groups say anything.
    given = rewarded(rollouts, [0, 0, 1, 1] * 2)
    with opened(tiny_base, PLAN, tiny_settings) as policy:
        learner = Learner(policy, PLAN)
        before = logprobs(policy, given)
        learner.reinforce(given, step=0)
        gained = logprobs(policy, given) - before
    assert gained.view(2, 2, 2)[:, 1].mean() > gained.view(2, 2, 2)[:, 0].mean()
    assert group_advantages(torch.tensor([[0.0, 0.0, 1.0, 1.0]])).tolist() == [pytest.approx([-1, -1, 1, 1], abs=1e-3)]


def test_a_group_that_earns_the_same_moves_nothing_but_for_the_kl_term(tiny_base, tiny_settings, rollouts):
    plan = PLAN.model_copy(update={"kl_coefficient": 0.0})
    with opened(tiny_base, plan, tiny_settings) as policy:
        learner = Learner(policy, plan)
        before = snapshot(policy)
        done = learner.reinforce(rewarded(rollouts, [0.5] * 8), step=0)
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(policy), strict=True))
    assert done.silent == 1.0


def test_passes_of_any_size_make_the_same_step(tiny_base, tiny_settings, rollouts, monkeypatch):
    given = rewarded(rollouts, [0, 0.2, 1, 0.7, 1, 0, 0.3, 0])
    moved = []
    for most in (16, 4096):
        monkeypatch.setattr("workers.fst.slow.GRADIENT_TOKENS", {"cpu": most})
        with opened(tiny_base, PLAN, tiny_settings) as policy:
            done = Learner(policy, PLAN).reinforce(given, step=0)
            moved.append((done.loss, done.gradient_norm, snapshot(policy)[0]))
    assert moved[0][0] == pytest.approx(moved[1][0], abs=1e-5)
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-3)
    assert torch.allclose(moved[0][2], moved[1][2], atol=1e-4)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_a_base_in_bfloat16_as_on_a_gpu_can_be_trained(tiny_base, tiny_settings, rollouts, weights):
    half = replace(tiny_base, model=copy.deepcopy(tiny_base.model).bfloat16())
    plan = PLAN.model_copy(update={"weights": weights})
    with opened(half, plan, tiny_settings) as policy:
        assert {p.dtype for p in policy.parameters} == {torch.float32}
        learner = Learner(policy, plan)
        given = rewarded(rollouts, [0, 0, 1, 1, 1, 0, 1, 0])
        before = logprobs(policy, given)
        for n in range(4):
            learner.reinforce(given, step=n)
        gained = logprobs(policy, given) - before
        assert gained[[2, 3, 4, 6]].mean() > gained[[0, 1, 5, 7]].mean()
        assert reverse_kl(policy, given) > 0.0
        assert learner.distill(given, CONTEXT, step=5).loss > 0.0


def test_the_kl_term_pulls_back_to_the_base(tiny_base, tiny_settings, rollouts):
    drifts = []
    for coefficient in (0.0, 30.0):
        plan = PLAN.model_copy(update={"kl_coefficient": coefficient})
        with opened(tiny_base, plan, tiny_settings) as policy:
            learner = Learner(policy, plan)
            steps = [learner.reinforce(rewarded(rollouts, [0, 0, 1, 1] * 2), step=n) for n in range(12)]
            drifts.append(steps[-1].kl_nats)
    assert drifts[1] < 0.7 * drifts[0]
