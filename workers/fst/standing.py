"""What the members of a population earned in the steps, beside each other: it costs no reply and says more than an anchor subset's few."""

from collections import defaultdict
from collections.abc import Sequence

from service.domain.feedback import Frozen
from workers.fst.contexts import TaskContext
from workers.fst.rollouts import Rollout


class Standing(Frozen):
    """Of one member, over the steps of the last cycle."""

    context: TaskContext
    replies: int
    """That were drawn in the steps: those of the evolution that chose it were lucky ones, perhaps."""
    advantage: float
    """Mean reward less that of all members on the same problems, by the same weights."""


class Standings:
    """Gathered step by step."""

    def __init__(self) -> None:
        self._advantages: dict[TaskContext, list[float]] = defaultdict(list)

    def add(self, group: Sequence[Rollout]) -> None:
        """Replies to one problem, under all members."""
        if not group:
            return
        mean = sum(r.reward for r in group) / len(group)
        for rollout in group:
            self._advantages[rollout.asked.context].append(rollout.reward - mean)

    def found(self) -> tuple[Standing, ...]:
        return tuple(
            Standing(context=context, replies=len(of), advantage=sum(of) / len(of))
            for context, of in self._advantages.items()
        )
