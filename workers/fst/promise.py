"""What contexts promise, by replies that a verifier has scored before; none is drawn or scored for it.

To first order another context changes the expected reward by what a step of policy gradient would follow (arXiv 2605.12484 takes that
step with the weights):

    E[r | x, new] - E[r | x, old]  ~  E[ A * (log pi(y | x, new) - log pi(y | x, old)) ],    y ~ pi(. | x, old)

A is a reply's reward less the mean of its problem's replies. Log-ratios are clipped, as a ratio is in PPO (arXiv 1707.06347), so that
one long reply doesn't speak for all.
"""

from collections.abc import Sequence
from typing import Self

import torch

from service.domain.feedback import Frozen
from workers.consolidation.base import Base
from workers.consolidation.rows import Row
from workers.consolidation.scoring import reply_logprobs
from workers.fst.contexts import TaskContext
from workers.fst.rollouts import Rollout

CLIP_NATS = 3.0
# Problems kept, those that were answered last.
MOST_GROUPS = 6
# Of a problem's replies so many of the best and of the worst are kept: forward passes are what a promise costs.
EXTREMES = 1


class Group(Frozen):
    """Replies to one problem that earned differently."""

    prompt: str
    replies: tuple[tuple[int, ...], ...]
    """In tokens."""
    rewards: tuple[float, ...]


class Evidence(Frozen):
    """Grows with every scored reply and forgets what is old; immutable, so that a checkpoint holds it as it was."""

    groups: tuple[Group, ...] = ()
    """The newest last."""

    def with_replies(self, rollouts: Sequence[Rollout]) -> Self:
        """With more scored replies. A problem whose replies all earned the same says nothing."""
        by_prompt: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            by_prompt.setdefault(rollout.asked.problem.prompt, []).append(rollout)
        new = [group for prompt, of in by_prompt.items() if (group := _group(prompt, of))]
        told = {group.prompt for group in new}
        kept = [group for group in self.groups if group.prompt not in told]
        return self.model_copy(update={"groups": (*kept, *new)[-MOST_GROUPS:]})


def _group(prompt: str, rollouts: Sequence[Rollout]) -> Group | None:
    ranked = sorted({rollout.reply: rollout for rollout in rollouts}.values(), key=lambda r: r.reward)
    some = ranked if len(ranked) <= 2 * EXTREMES else [*ranked[:EXTREMES], *ranked[-EXTREMES:]]
    if some[0].reward == some[-1].reward:
        return None
    return Group(prompt=prompt, replies=tuple(r.reply for r in some), rewards=tuple(r.reward for r in some))


def promises(model: Base, evidence: Evidence, parent: TaskContext, children: Sequence[TaskContext]) -> list[float]:
    """The estimate above of each child against its parent, a mean over the problems of `evidence`, of which there is one at least."""
    contexts = (parent, *children)
    rows = [Row(c.encode(model, group.prompt), group.replies) for c in contexts for group in evidence.groups]
    means = reply_logprobs(model, rows)
    sums = [mean * torch.tensor([len(r) for r in row.replies]) for row, mean in zip(rows, means, strict=True)]
    groups = len(evidence.groups)
    of_parent = sums[:groups]
    return [
        sum(_gain(group, sums[n * groups + g] - of_parent[g]) for g, group in enumerate(evidence.groups)) / groups
        for n in range(1, len(contexts))
    ]


def _gain(group: Group, ratios_R: torch.Tensor) -> float:
    """sum(A * clipped log-ratio) over a problem's replies."""
    rewards_R = torch.tensor(group.rewards)
    return ((rewards_R - rewards_R.mean()) * ratios_R.clamp(-CLIP_NATS, CLIP_NATS)).sum().item()
