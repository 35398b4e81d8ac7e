"""One step of the slow weights: CISPO on rewarded replies, or distillation from the frozen base with a context, without a reward.

    fst, rl   L = -E[ sg(min(rho, 4)) * A * log pi_theta ] + c * KL(pi_theta || pi_0)     (arXiv 2605.12484), c = 1e-3
    distill   L = KL(pi_theta(. | x) || pi_0(. | x, phi))                                 (arXiv 2602.12275)

Both divergences are per token of the model's own replies, exact over the vocabulary, nats; a mean over all tokens of the batch.

Letters: P problems, G rollouts of a problem, N reply tokens of a pass, D width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from service.errors import JobFailed
from workers.consolidation.divergence import reverse_kl_of_states
from workers.consolidation.policy_gradient import cispo_loss, group_advantages
from workers.consolidation.rows import Packed, Row, batches, pack, token_logprobs
from workers.fst.contexts import TaskContext
from workers.fst.plan import Plan
from workers.fst.policy import Policy
from workers.fst.rollouts import Rollout, rows_of

BETAS = (0.9, 0.99)
MAX_GRADIENT_NORM = 1.0
# Tokens with padding whose activations are held for the gradient at once: 1.5 MB each for the default model in float32.
GRADIENT_TOKENS = {"cpu": 1_024, "cuda": 16_384}

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """What a step did."""

    loss: float
    kl_nats: float
    """KL(trained || base) per token on this step's replies, before it; of a distilled model KL to its teacher."""
    gradient_norm: float
    reward: float | None
    """Mean of the rollouts; None where nothing was scored."""
    silent: float = 0.0
    """Share of problems whose rollouts all earned the same, which say nothing."""


class Learner:
    """The optimizer and its course."""

    def __init__(self, policy: Policy, plan: Plan) -> None:
        self.policy = policy
        self._plan = plan
        self.optimizer = torch.optim.AdamW(policy.parameters, lr=plan.peak_learning_rate, betas=BETAS, weight_decay=0.0)

    def reinforce(self, rollouts: Sequence[Rollout], *, step: int) -> Step:
        """A step of policy gradient; `rollouts` holds the plan's number for each problem, one problem after the other.

        Raises:
            JobFailed: the loss is not finite.
        """
        rewards_P_G = torch.tensor([r.reward for r in rollouts]).view(-1, self._plan.rollouts)
        advantages = group_advantages(rewards_P_G).flatten().tolist()
        rows = rows_of(rollouts)
        per_row = _split(list(zip(rollouts, advantages, strict=True)), [len(row.replies) for row in rows])
        tokens = sum(len(r.reply) for r in rollouts)
        loss = kl = 0.0
        with self._step(step) as norm:
            for batch in self._passes(rows):
                with self.policy.frozen() as base, torch.no_grad():
                    packed = pack([rows[i] for i in batch], device=base.device)
                    base_states_N_D = base.states(packed)
                with self.policy.trained() as model:
                    states_N_D = model.states(packed)
                    logprobs_N = token_logprobs(states_N_D, model.head, packed.target_N)
                    old_N, advantages_N = _tokens([per_row[i] for i in batch], packed)
                    gain = cispo_loss(logprobs_N, old_N, advantages_N, batch_tokens=tokens)
                    drift = (
                        reverse_kl_of_states(base_states_N_D.to(states_N_D.dtype), states_N_D, model.head).sum()
                        / tokens
                    )
                    (gain + self._plan.kl_coefficient * drift).backward()
                loss += gain.item() + self._plan.kl_coefficient * drift.item()
                kl += drift.item()
        flat = (rewards_P_G.amax(dim=1) == rewards_P_G.amin(dim=1)).float().mean().item()
        return Step(
            _finite(loss, step), kl_nats=kl, gradient_norm=norm[0], reward=rewards_P_G.mean().item(), silent=flat
        )

    def distill(self, rollouts: Sequence[Rollout], teacher: TaskContext, *, step: int) -> Step:
        """A step towards the base with the teacher's context, on replies of the model without one. No reward is looked at.

        Raises:
            JobFailed: the loss is not finite.
        """
        rows = rows_of(rollouts)
        first = _split(rollouts, [len(row.replies) for row in rows])
        tokens = sum(len(r.reply) for r in rollouts)
        loss = 0.0
        with self._step(step) as norm:
            for batch in self._passes(rows):
                with self.policy.frozen() as base, torch.no_grad():
                    shown = [
                        Row(teacher.encode(base, first[i][0].asked.problem.prompt), rows[i].replies) for i in batch
                    ]
                    teacher_states_N_D = base.states(pack(shown, device=base.device))
                with self.policy.trained() as model:
                    states_N_D = model.states(pack([rows[i] for i in batch], device=model.device))
                    part = (
                        reverse_kl_of_states(teacher_states_N_D.to(states_N_D.dtype), states_N_D, model.head).sum()
                        / tokens
                    )
                    part.backward()
                loss += part.item()
        return Step(_finite(loss, step), kl_nats=loss, gradient_norm=norm[0], reward=None)

    def _passes(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        device = self.policy.parameters[0].device
        return batches(rows, [len(row) for row in rows], max_tokens=GRADIENT_TOKENS[device.type])

    def _step(self, step: int) -> "_Updating":
        warm = min((step + 1) / (self._plan.warmup_steps + 1), 1.0)
        self.optimizer.param_groups[0]["lr"] = self._plan.peak_learning_rate * warm
        return _Updating(self.optimizer, self.policy)


class _Updating:
    """Gradients gathered inside are clipped and applied at the end; the one number that it gives is their norm before that."""

    def __init__(self, optimizer: torch.optim.Optimizer, policy: Policy) -> None:
        self._optimizer = optimizer
        self._policy = policy
        self._norm: list[float] = []

    def __enter__(self) -> list[float]:
        self._optimizer.zero_grad(set_to_none=True)
        return self._norm

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        norm = torch.nn.utils.clip_grad_norm_(self._policy.parameters, MAX_GRADIENT_NORM)
        self._norm.append(norm.item())
        if math.isfinite(self._norm[0]):
            self._optimizer.step()


def _tokens(of_rows: Sequence[Sequence[tuple[Rollout, float]]], packed: Packed) -> tuple[Tensor, Tensor]:
    """Old log-probabilities and advantages of the packed reply tokens, in their order, shape (N,) each."""
    pairs = [pair for row in of_rows for pair in row]
    old = [value for rollout, _ in pairs for value in rollout.logprobs]
    advantages = [advantage for rollout, advantage in pairs for _ in rollout.reply]
    device = packed.target_N.device
    return torch.tensor(old, device=device), torch.tensor(advantages, device=device)


def _split(items: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """The items in pieces of these sizes."""
    rest = iter(items)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise JobFailed(f"the loss is {loss} at step {step + 1}: try a lower --learning-rate")
    return loss
