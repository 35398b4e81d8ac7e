"""How good a policy is on problems that training never saw, and how far it is from the base.

Letters: N tokens, A anchors, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.verifiers import Problem
from workers.consolidation.anchors import KINDS, PASS_TOKENS, Anchor, Anchors, Kind, Use
from workers.consolidation.divergence import kl_of_states, reverse_kl_of_states
from workers.consolidation.rows import batches, pack
from workers.fst.contexts import TaskContext
from workers.fst.plan import Plan
from workers.fst.policy import Policy
from workers.fst.rollouts import Asked, Rollers, Rollout, Sampling, rows_of


@dataclass(frozen=True)
class Tested:
    """A policy with a population of contexts, on the test problems."""

    reward: float
    kl_nats: float
    """KL(trained || base), both with the contexts, per token of the trained model's own replies: the paper's drift."""
    rollouts: list[Rollout]


def examine(
    policy: Policy,
    rollers: Rollers,
    population: Sequence[TaskContext],
    problems: Sequence[Problem],
    plan: Plan,
    *,
    base: bool,
) -> Tested:
    """Mean reward and drift with the contexts in turn, at temperature 1. All arms and cycles are sampled with the same noise.

    Args:
        base: test the frozen base instead of what was trained.
    """
    asked = [
        Asked(problem, population[(n + sample) % len(population)])
        for n, problem in enumerate(problems)
        for sample in range(plan.test_samples)
    ]
    rollouts: list[Rollout] = []
    roller = rollers.frozen if base else rollers.trained
    for sample in range(plan.test_samples):
        part = asked[sample :: plan.test_samples]
        rollouts += roller.roll(part, sampling(plan), samples=1, seed=f"test {sample}")
    reward = sum(r.reward for r in rollouts) / len(rollouts)
    return Tested(reward, 0.0 if base else reverse_kl(policy, rollouts), rollouts)


def sampling(plan: Plan, *, rewarded: bool = True) -> Sampling:
    """How a plan's replies are made, in steps, evolutions and tests alike."""
    return Sampling(new_tokens=plan.new_tokens, count_cut_off=plan.count_cut_off, rewarded=rewarded)


def reverse_kl(policy: Policy, rollouts: Sequence[Rollout]) -> float:
    """Mean KL(trained || base) over the tokens of the replies, nats; exact over the vocabulary."""
    rows = rows_of(rollouts)
    total, tokens = 0.0, 0
    for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
        with torch.no_grad():
            with policy.frozen() as base:
                packed = pack([rows[i] for i in batch], device=base.device)
                base_states_N_D = base.states(packed)
            with policy.trained() as model:
                states_N_D = model.states(packed)
                kl_N = reverse_kl_of_states(base_states_N_D.to(states_N_D.dtype), states_N_D, model.head)
        total += kl_N.double().sum().item()
        tokens += len(kl_N)
    return total / tokens


def anchors_kl(policy: Policy, anchors: Sequence[Anchor]) -> Tensor:
    """KL(base || trained) of each anchor, mean over its tokens, nats, shape (A,)."""
    kl_A = torch.zeros(len(anchors))
    rows = [anchor.row for anchor in anchors]
    for batch in batches(rows, [len(row) for row in rows], max_tokens=PASS_TOKENS):
        base_states_N_D = torch.cat([anchors[i].base_states_N_D for i in batch])
        with torch.no_grad(), policy.trained() as model:
            packed = pack([rows[i] for i in batch], device=model.device)
            states_N_D = model.states(packed)
            kl_N = kl_of_states(base_states_N_D.to(states_N_D.dtype), states_N_D, model.head)
            kl_A[batch] = packed.mean_by_reply(kl_N).cpu()
    return kl_A


def drift(policy: Policy, anchors: Anchors, use: Use) -> dict[Kind, float]:
    """Mean KL(base || trained) on each kind of anchor, nats per token."""
    return {kind: anchors_kl(policy, anchors.of(kind, use)).mean().item() for kind in KINDS}
