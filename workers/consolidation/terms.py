"""One pass of a training step: rows of any scopes and any tasks, packed together, and the loss of each.

A row is asked one of four things: how likely its replies are (feedback), how far the adapter is from the base on it (an anchor), how far
the model without a context is from the one with it (distillation), or to be said rather or less (norms). Logits are computed of reply
tokens alone.

Letters: I items of a pass (a row each), R replies of a pass, N reply tokens of a pass, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.consolidation.anchors import Kind
from workers.consolidation.base import Base
from workers.consolidation.dataset import Example
from workers.consolidation.divergence import kl_of_states
from workers.consolidation.objective import distill_kl, hindsight_loss, pair_loss, rate_loss
from workers.consolidation.rows import Packed, Row, token_logprobs


@dataclass(frozen=True)
class Credited:
    """A reply whose tokens have credit: by a comment on it, or by the norms that it holds."""

    advantages_N: Tensor
    reference_N: Tensor
    """Their log-probabilities in this row under the model that they are compared with, nats: the base, or what sampled them."""


@dataclass(frozen=True)
class Judged:
    """Feedback: two replies, the one spoken of, and the rejected one or the base's own."""

    example: Example
    reference_2: Tensor
    """The base's mean log-probabilities of the two, nats per token."""
    hindsight: Credited | None = None
    """Of the first reply, where a comment gives credit."""


@dataclass(frozen=True)
class Anchored:
    """An anchor: one completion of the base."""

    base_states_N_D: Tensor
    kind: Kind


@dataclass(frozen=True)
class Distilled:
    """A sample of the model without its context, and the states of the base with the context on it."""

    teacher_states_N_D: Tensor


Task = Judged | Anchored | Distilled | Credited


@dataclass(frozen=True)
class Item:
    """One row of a step: whose it is, what is asked of it, and how much it counts in that scope's loss."""

    learner: int
    slot: int
    row: Row
    task: Task
    weight: float


def losses(base: Base, packed: Packed, states_N_D: Tensor, items: Sequence[Item]) -> Tensor:
    """Each item's loss before its weight, shape (I,): of feedback its kind's loss, of anchors and distillation nats per token.

    Args:
        packed: the items' rows in their order.
        states_N_D: last hidden states of the reply tokens, under each row's adapter.
    """
    first_I: list[int] = []
    count = 0
    for item in items:
        first_I.append(count)
        count += len(item.row.replies)
    loss_I = torch.zeros(len(items), device=states_N_D.device)
    for task in (Judged, Anchored, Distilled, Credited):
        chosen = [i for i, item in enumerate(items) if isinstance(item.task, task)]
        if chosen:
            replies = [first_I[i] + n for i in chosen for n in range(len(items[i].row.replies))]
            part, tokens_M = packed.part(replies)
            found = _of_one_kind(base, part, states_N_D[tokens_M], [items[i].task for i in chosen])
            loss_I = loss_I.index_put((torch.tensor(chosen, device=loss_I.device),), found)
    return loss_I


def _of_one_kind(base: Base, packed: Packed, states_N_D: Tensor, tasks: Sequence[Task]) -> Tensor:
    if judged := [task for task in tasks if isinstance(task, Judged)]:
        return _judged(base, packed, states_N_D, judged)
    if anchored := [task for task in tasks if isinstance(task, Anchored)]:
        return _anchored(base, packed, states_N_D, anchored)
    if distilled := [task for task in tasks if isinstance(task, Distilled)]:
        return _distilled(base, packed, states_N_D, distilled)
    return _credited(base, packed, states_N_D, [task for task in tasks if isinstance(task, Credited)])


def _judged(base: Base, packed: Packed, states_N_D: Tensor, tasks: Sequence[Judged]) -> Tensor:
    logprobs_N = token_logprobs(states_N_D, base.head, packed.target_N)
    means_E_2 = packed.mean_by_reply(logprobs_N).view(-1, 2)
    device = means_E_2.device
    h_E_2 = means_E_2 - torch.stack([task.reference_2 for task in tasks]).to(device)
    kinds = [task.example.kind for task in tasks]
    paired_E = torch.tensor([kind in ("correction", "preference") for kind in kinds], device=device)
    correction_E = torch.tensor([float(kind == "correction") for kind in kinds], device=device)
    rating_E = torch.tensor([task.example.rating for task in tasks], device=device)
    pairs_E = pair_loss(h_E_2[:, 0], h_E_2[:, 1], -means_E_2[:, 0], correction_E)
    rated_E = rate_loss(h_E_2[:, 0], rating_E, h_E_2[:, 1])
    return torch.where(paired_E, pairs_E, rated_E) + _hindsight(packed, logprobs_N, tasks)


def _hindsight(packed: Packed, logprobs_N: Tensor, tasks: Sequence[Judged]) -> Tensor:
    loss_E = torch.zeros(len(tasks), device=logprobs_N.device)
    told = {e: task.hindsight for e, task in enumerate(tasks) if task.hindsight is not None}
    if not told:
        return loss_E
    part, tokens_M = packed.part([2 * e for e in told])
    found = _credit(part, logprobs_N[tokens_M], list(told.values()))
    return loss_E.index_put((torch.tensor(list(told), device=loss_E.device),), found)


def _credited(base: Base, packed: Packed, states_N_D: Tensor, tasks: Sequence[Credited]) -> Tensor:
    return _credit(packed, token_logprobs(states_N_D, base.head, packed.target_N), tasks)


def _credit(packed: Packed, logprobs_N: Tensor, credited: Sequence[Credited]) -> Tensor:
    """Each reply's loss by the credit of its tokens, shape (R,)."""
    return hindsight_loss(
        logprobs_N,
        torch.cat([of.advantages_N for of in credited]),
        packed.reply_N,
        packed.replies,
        reference_N=torch.cat([of.reference_N for of in credited]),
    )


def _anchored(base: Base, packed: Packed, states_N_D: Tensor, tasks: Sequence[Anchored]) -> Tensor:
    return packed.mean_by_reply(
        kl_of_states(torch.cat([task.base_states_N_D for task in tasks]), states_N_D, base.head)
    )


def _distilled(base: Base, packed: Packed, states_N_D: Tensor, tasks: Sequence[Distilled]) -> Tensor:
    return distill_kl(
        teacher_states_N_D=torch.cat([task.teacher_states_N_D for task in tasks]),
        student_states_N_D=states_N_D,
        head_V_D=base.head,
        reply_N=packed.reply_N,
        replies=packed.replies,
    )
